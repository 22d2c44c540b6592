"""Program: one tuning run, the main job.

    python -m reptune_jax.train --config=configs/sentiment.py --workdir=runs/sentiment \\
        --config.arm=dual --config.sign=-1 --config.seed=0

Trains into `<workdir>/<arm><sign>_s<seed>/`, making the vector and the targets first where they are
missing. The same command resumes a run that was stopped; a SIGTERM saves first. On several hosts,
run it on each: TPU pods, Slurm and MPI are detected, elsewhere give --coordinator, --processes and
--process_id.
"""

import dataclasses
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from ml_collections import ConfigDict

from reptune_jax import distributed, program
from reptune_jax.config import TUNED_ARMS, armed
from reptune_jax.lm import Model
from reptune_jax.tuning import adapters, checkpoint, fleet, loop
from reptune_jax.tuning.corpus import make_corpus
from reptune_jax.tuning.run import Job
from reptune_jax.vectors import extraction
from reptune_jax.vectors.steering_vector import SteeringVector


def run(c: ConfigDict, workdir: Path, model: Model | None = None) -> Path:
    """Tunes `c.arm`; returns its folder. Skips what is finished."""
    folder = claim(c, workdir)
    if not checkpoint.finished(folder):
        model = model or program.load_model(c)
        loop.tune(make_job(c, workdir, model), model)
    else:
        program.say(f"{folder.name}: already trained")
    return folder


def together(runs: Iterable[ConfigDict], workdir: Path, model: Model) -> None:
    """Tunes LoRA runs of one study in one program. Skips those that are finished."""
    left = [c for c in runs if not checkpoint.finished(claim(c, workdir))]
    fleet.tune([make_job(c, workdir, model) for c in left], model)


def claim(c: ConfigDict, workdir: Path) -> Path:
    """The run's folder, with its config in it."""
    if c.arm not in TUNED_ARMS:
        raise ValueError(
            f"arm: got {c.arm!r}, expected one of {', '.join(TUNED_ARMS)}. "
            "The others train nothing: see evals.baseline and evals.steering."
        )
    folder = workdir / program.run_name(c)
    program.heed_stop("before training")
    program.claim_study(workdir, c)
    program.claim_run(folder, c)
    return folder


def make_job(c: ConfigDict, workdir: Path, model: Model) -> Job:
    """The vector and the rows of a run, made first where they are missing."""
    folder = workdir / program.run_name(c)
    vector = extraction.run(c, workdir, model)
    vector.check_model(model.sha, model.name)
    settings = armed(c)
    also = settings.loss.also
    others = {name: _other(f"loss.also.{name}", also[name].folder, model) for name in also}
    if settings.vector.random:
        vector = vector.random_like(c.seed)
        others = {name: v.random_like(c.seed) for name, v in others.items()}
    named = {"vector": vector} | {f"vector_{name}": v for name, v in others.items()}
    for stem, v in named.items():
        distributed.once(partial(v.save, folder / f"{stem}.safetensors"))
    meta = {
        "config": c.to_dict(),
        "model": model.name,
        "model_sha": model.sha,
        "arch": dataclasses.asdict(model.arch),
        "vector": vector.digest,
        "also": {name: v.digest for name, v in others.items()},
        "layers": list(c.train.layers),
        "lora": adapters.about(model.arch, c.train),
    }
    corpus = make_corpus(settings, workdir, model)
    distributed.same(model=model.sha, vector=vector.digest, data=corpus.digest())
    return Job(settings, folder, vector, corpus, meta, others)


def _other(name: str, folder: str, model: Model) -> SteeringVector:
    """The vector of a further behavior."""
    if absent := [f for f in ("config.json", "vector.safetensors") if not Path(folder, f).exists()]:
        raise ValueError(
            f"{name}.folder: {folder} has no {', '.join(absent)}, expected a study folder. "
            "Make one with the extract program and that behavior's config."
        )
    vector = SteeringVector.load(Path(folder, "vector.safetensors"))
    vector.check_model(model.sha, model.name)
    return vector


if __name__ == "__main__":
    program.main(run, __doc__, trains=True)
