"""Program: one tuning run, the main job.

    python -m reptune_jax.train --config=sentiment --workdir=runs/sentiment \\
        --config.arm=dual --config.sign=-1 --config.seed=0

Trains into `<workdir>/<arm><sign>_s<seed>/`, making the vector and the targets first where they are
missing. The same command resumes a run that was stopped; a SIGTERM saves first. On several hosts,
run it on each: TPU pods, Slurm and MPI are detected, elsewhere give --coordinator, --processes and
--process_id.
"""

import dataclasses
import functools
from pathlib import Path

from ml_collections import ConfigDict

from reptune_jax import depth, distributed, frozen, program
from reptune_jax.config import TUNED_ARMS, armed
from reptune_jax.console import say
from reptune_jax.data import behavior as behaviors
from reptune_jax.folder import Run, RunName, Study
from reptune_jax.lm import Model
from reptune_jax.tuning import loop, partition
from reptune_jax.tuning.corpus import make_corpus
from reptune_jax.tuning.run import Job
from reptune_jax.vectors import extraction
from reptune_jax.vectors.steering_vector import SteeringVector


def run(c: ConfigDict, workdir: Path, model: Model | None = None) -> Path:
    """Tunes `c.arm`; returns its folder. Skips what is finished."""
    if c.arm not in TUNED_ARMS:
        raise ValueError(
            f"arm: got {c.arm!r}, expected one of {', '.join(TUNED_ARMS)}. "
            "The others train nothing: see evals.baseline and evals.steering."
        )
    base = functools.cache(lambda: model or program.load_model(c, for_tuning=True))
    depth.settle(c, lambda: base().arch.N)
    study = Study(workdir)
    tuned = study.run(RunName.of(c))
    study.check(c)
    tuned.check(c)
    with tuned.writing():
        if tuned.finished():
            say(f"{tuned.path.name}: already trained")
            return tuned.path
        behaviors.load(c.behavior).check(c, "tune", "val")
        vector = extraction.run(c, study, base)
        tuning = frozen.hold(base(), c)
        loop.tune(make_job(c, study, tuned, vector, tuning), tuning)
    return tuned.path


def make_job(c: ConfigDict, study: Study, tuned: Run, vector: SteeringVector, model: Model) -> Job:
    """What a run trains on, its vectors saved in its folder."""
    extraction.fit(vector, model)
    settings = armed(c)
    further = settings.loss.also
    also = {name: _also(f"loss.also.{name}", further[name].folder, model) for name in further}
    if settings.vector.random:
        vector = vector.random_like(c.seed)
        also = {name: v.random_like(c.seed) for name, v in also.items()}
    corpus = make_corpus(settings, study.path, model)
    tuned.claim(c)
    files = {tuned.vector: vector} | {tuned.vector_of(name): v for name, v in also.items()}
    for path, v in files.items():
        distributed.once(functools.partial(v.save, path))
    meta = {
        "config": c.to_dict(),
        "model": model.name,
        "model_sha": model.sha,
        "arch": dataclasses.asdict(model.arch),
        "vector": vector.digest,
        "also": {name: v.digest for name, v in also.items()},
        "layers": list(c.train.layers),
        "lora": partition.about(model.arch, c.train),
    }
    distributed.same(model=model.sha, vector=vector.digest, data=corpus.digest())
    return Job(settings, tuned.path, vector, corpus, meta, also)


def _also(name: str, folder: str, model: Model) -> SteeringVector:
    """The vector of a further behavior."""
    study = Study(Path(folder))
    if absent := [path.name for path in (study.config, study.vector) if not path.exists()]:
        raise ValueError(
            f"{name}.folder: {folder} has no {', '.join(absent)}, expected a study folder. "
            "Make one with the extract program and that behavior's config."
        )
    vector = SteeringVector.load(study.vector)
    vector.check_model(model.sha, model.name)
    return vector


if __name__ == "__main__":
    program.main(run, __doc__)
