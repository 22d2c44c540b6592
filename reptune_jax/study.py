"""Program: a whole study in one process: vector, arms, evaluations, report, export.

    python -m reptune_jax.study --config=configs/sentiment.py --workdir=runs/sentiment

Runs the other programs' mains one after the other (so the model is loaded and compiled once) over
`study.arms` x `study.signs` x `study.seeds`. Run again, it skips what is done. LoRA runs can be
trained in one program, with the same folders and, up to rounding, results; what that saves, and
where it saves nothing, is in benchmarks/README.md:

    … --config.train.lora.rank=8 --config.study.together=True
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ml_collections import ConfigDict

from reptune_jax import convert, distributed, program, train
from reptune_jax.config import TUNED_ARMS
from reptune_jax.evals import arms, baseline, steering, tuned
from reptune_jax.evals.bench import prepare
from reptune_jax.lm import Model, save_hf
from reptune_jax.report import card, html
from reptune_jax.report import study as studies


def run(c: ConfigDict, workdir: Path) -> None:
    """Everything, in order; prints each step's time and the report's path."""
    if c.study.export and c.study.export not in c.study.arms:
        raise ValueError(
            f"study.export: got {c.study.export!r}, expected '' or one of {c.study.arms}. "
            "Add the arm, or export another."
        )
    began = time.monotonic()
    with timed("model, vector and targets"):
        bench = prepare(c, workdir)
    with timed("baseline: base and prompt arms"):
        baseline.run(c, workdir, bench)
    if c.study.together:
        with timed("training all runs together"):
            train.together(runs(c), workdir, bench.base)
    for one in runs(c):
        with timed(f"training {program.run_name(one)}"):
            train.run(one, workdir, bench.base)
        with timed(f"evaluating {program.run_name(one)}"):
            tuned.run(one, workdir, bench)
    if "steer" in c.study.arms:
        with timed("steering: sweep on validation, test of the chosen doses"):
            steering.run(c, workdir, bench)
    report = workdir / "report" / "index.html"
    with timed("report"):
        distributed.once(lambda: html.write(studies.read(workdir, c.study.primary or None)))
    if c.study.export:
        with timed("export to Hugging Face"):
            for sign in c.study.signs:
                export_run(c, workdir, bench.base, sign)
    program.say(f"done in {time.monotonic() - began:.0f} s. Report: {report}")


def runs(c: ConfigDict) -> Iterator[ConfigDict]:
    """The config of every tuned run, seed by seed so that a stopped study is already balanced.

    `out` has no sign: |cos| and label-neutral targets are the same for both, so it is run once.
    """
    for seed in c.study.seeds:
        for arm in (a for a in c.study.arms if a in TUNED_ARMS):
            for sign in c.study.signs[:1] if arm == "out" else c.study.signs:
                one = c.copy_and_resolve_references()
                one.arm, one.sign, one.seed = arm, sign, seed
                yield one


def export_run(c: ConfigDict, workdir: Path, base: Model, sign: int) -> None:
    """The exported arm's first seed as an ordinary checkpoint, with what is known of it."""
    one = c.copy_and_resolve_references()
    one.arm, one.sign, one.seed = c.study.export, sign, c.study.seeds[0]
    name = program.run_name(one)
    if c.train.lora.rank:
        export_adapter(workdir, base, name)
    folder = workdir / "export" / name
    if distributed.exists(folder / "config.json"):
        program.say(f"{folder}: already there")
        return
    cond = arms.tuned(base, workdir / name)
    save_hf(
        cond.model, folder, card.model_card(one, studies.read(workdir, c.study.primary or None))
    )
    program.say(f"{folder}: an ordinary Hugging Face checkpoint")


def export_adapter(workdir: Path, base: Model, name: str) -> Path:
    """A LoRA run's adapters as a folder for peft."""
    folder = workdir / "export" / f"{name}_adapter"
    if distributed.exists(folder):
        program.say(f"{folder}: already there")
        return folder
    run = convert.read_run(workdir / name)
    distributed.once(lambda: convert.write_adapter(folder, run, base.arch, base.name))
    program.say(f"{folder}: its LoRA alone, for peft")
    return folder


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Says what begins, and how long it took; a SIGTERM is heeded before it."""
    program.heed_stop(f"before {what}")
    program.say(f"==> {what}")
    began = time.monotonic()
    yield
    program.say(f"<== {what}: {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    program.main(run, __doc__, trains=True)
