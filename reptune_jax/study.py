"""Program: a whole study in one process: vector, arms, evaluations, report, export.

    python -m reptune_jax.study --config=sentiment --workdir=runs/sentiment

Runs the other programs' mains one after the other (so the model is loaded and compiled once) over
`study.arms` x `study.signs` x `study.seeds`. Run again, it skips what is done.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ml_collections import ConfigDict

from reptune_jax import cards, convert, distributed, frozen, program, train, tuned_run
from reptune_jax.config import CONTRASTS, TUNED_ARMS
from reptune_jax.console import say
from reptune_jax.data import behavior as behaviors
from reptune_jax.evals import arms, baseline, dial, steering, tuned
from reptune_jax.evals.bench import prepare
from reptune_jax.folder import RunName, Study
from reptune_jax.hub.export import save_hf
from reptune_jax.lm import Model
from reptune_jax.report import html, outcomes
from reptune_jax.report import study as studies


def run(c: ConfigDict, workdir: Path) -> None:
    """Everything, in order; prints each step's time and the report's path."""
    if c.study.export and c.study.export not in c.study.arms:
        raise ValueError(
            f"study.export: got {c.study.export!r}, expected '' or one of {c.study.arms}. "
            "Add the arm, or export another."
        )
    if any(arm in TUNED_ARMS for arm in c.study.arms):
        behaviors.load(c.behavior).check(c, "train", "tune", "val")
    for arm in (arm for arm in c.study.arms if arm in CONTRASTS):
        if CONTRASTS[arm] not in c.study.arms:
            raise ValueError(
                f"study.arms: got {arm!r} with arms {c.study.arms}, expected {CONTRASTS[arm]} too, "
                "which it is made of. Add it, or leave it out."
            )
    if unknown := set(c.dial.arms) - set(c.study.arms):
        raise ValueError(
            f"dial.arms: got {', '.join(sorted(unknown))}, expected arms of the study, which are "
            f"{', '.join(c.study.arms)}."
        )
    with Study(workdir).writing():
        make(c, workdir)


def make(c: ConfigDict, workdir: Path) -> None:
    """Everything that is missing."""
    study, began = Study(workdir), time.monotonic()
    with timed("model, vector and targets"):
        bench = prepare(c, study)
    with timed("baseline: base and prompt arms"):
        baseline.run(c, workdir, bench)
    tuning = frozen.hold(bench.base, c)
    for one in runs(c):
        with timed(f"training {RunName.of(one)}"):
            train.run(one, workdir, tuning)
        if one.sign not in c.study.signs:
            continue
        with timed(f"evaluating {RunName.of(one)}"):
            tuned.run(one, workdir, bench)
    if "steer" in c.study.arms:
        with timed("steering: sweep on validation, test of the chosen doses"):
            steering.run(c, workdir, bench)
    if dial.dialled(c):
        with timed("dial: tuned weights scaled, test at the KL of dual"):
            dial.run(c, workdir, bench)
    with timed("report"):
        known = studies.read(workdir, c.study.primary or None)
        distributed.once(lambda: html.write(known))
    if c.study.export:
        with timed("export to Hugging Face"):
            for sign in c.study.signs:
                export_run(c, study, bench.base, sign, known)
    for line in outcomes.headline(known):
        say(line)
    say(f"done in {time.monotonic() - began:.0f} s. Report: {study.report}")


def runs(c: ConfigDict) -> Iterator[ConfigDict]:
    """The config of every tuned run, seed by seed so that a stopped study is already balanced.

    `out` has no sign: |cos| and label-neutral targets are the same for both, so it is run once.
    What a contrast is made of is trained on both sides, also where one of them is not evaluated.
    """
    halves = {CONTRASTS[arm] for arm in c.study.arms if arm in CONTRASTS}
    for seed in c.study.seeds:
        for arm in (a for a in c.study.arms if a in TUNED_ARMS):
            signs = c.study.signs[:1] if arm == "out" else c.study.signs
            for sign in dict.fromkeys((*signs, 1, -1)) if arm in halves else signs:
                one = c.copy_and_resolve_references()
                one.arm, one.sign, one.seed = arm, sign, seed
                yield one


def export_run(c: ConfigDict, study: Study, base: Model, sign: int, known: studies.Study) -> None:
    """The exported arm's first seed as an ordinary checkpoint, with what is known of it."""
    one = c.copy_and_resolve_references()
    one.arm, one.sign, one.seed = c.study.export, sign, c.study.seeds[0]
    name = RunName.of(one)
    if c.train.lora.rank:
        export_adapter(study, base, name)
    folder = study.export(name)
    if distributed.exists(folder / "config.json"):
        say(f"{folder}: already there")
        return
    model = arms.tuned(base, study.run(name).path).model
    save_hf(model, folder, cards.study_card(one, known))
    say(f"{folder}: an ordinary Hugging Face checkpoint")


def export_adapter(study: Study, base: Model, name: RunName) -> None:
    """A LoRA run's adapters as a folder for peft."""
    folder = study.adapter(name)
    if not distributed.exists(folder):
        tuned = tuned_run.load(study.run(name).path)
        distributed.once(lambda: convert.write_adapter(folder, tuned, base.arch, base.name))
    say(f"{folder}: its LoRA alone, for peft")


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Says what begins, and how long it took."""
    say(f"==> {what}")
    began = time.monotonic()
    yield
    say(f"<== {what}: {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    program.main(run, __doc__)
