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
from pathlib import Path

from ml_collections import ConfigDict

from reptune_jax import distributed, program
from reptune_jax.config import TUNED_ARMS, armed
from reptune_jax.lm import Model
from reptune_jax.tuning import adapters, checkpoint, fleet, loop
from reptune_jax.tuning.corpus import make_corpus
from reptune_jax.tuning.run import Job
from reptune_jax.vectors import extraction


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
    if settings.vector.random:
        vector = vector.random_like(c.seed)
    distributed.once(lambda: vector.save(folder / "vector.safetensors"))
    meta = {
        "config": c.to_dict(),
        "model": model.name,
        "model_sha": model.sha,
        "arch": dataclasses.asdict(model.arch),
        "vector": vector.digest,
        "layers": list(c.train.layers),
        "lora": adapters.about(model.arch, c.train),
    }
    corpus = make_corpus(settings, workdir, model)
    distributed.same(model=model.sha, vector=vector.digest, data=corpus.digest())
    return Job(settings, folder, vector, corpus, meta)


if __name__ == "__main__":
    program.main(run, __doc__, trains=True)
