"""Program: tuned weights as a dial. Scales what tuning changed, and tests it at the KL of `dual`.

    python -m reptune_jax.evals.dial --config=sentiment --workdir=runs/sentiment

base + k (tuned - base) for the arms of `dial.arms`; for the arms `weights` and `contrast` base + k
(token, or dual, of the sign - that of the other sign), contrastive weight steering (arXiv
2511.05408), whenever they are in `study.arms`. The first seed's
runs are swept over `dial.scales` on the validation split; every seed is tested at the scale that
costs what the tuned `dual` runs cost. Writes `results/dial_<arm>.parquet`; skips what is there, for
as long as the study has no more runs.
"""

import functools
from pathlib import Path

from ml_collections import ConfigDict

from reptune_jax import distributed, program
from reptune_jax.config import CONTRASTS
from reptune_jax.console import say
from reptune_jax.evals import arms
from reptune_jax.evals.arms import Condition
from reptune_jax.evals.bench import Bench, prepare
from reptune_jax.evals.results import Row, to_make, write_parquet
from reptune_jax.evals.sweep import dual_kl, equal_to, spends, sweep, tested
from reptune_jax.folder import RunName, Study


def run(c: ConfigDict, workdir: Path, bench: Bench | None = None) -> list[Path]:
    """Sweeps and tests every dialled arm, both signs; the files of their results."""
    study = Study(workdir)
    check(c, study)
    make = functools.cache(lambda: bench or prepare(c, study))
    budget = functools.cache(lambda sign: dual_kl(make(), study, sign))
    for arm in dialled(c):
        path = study.dial(arm)
        with study.writing():
            asked = {"signs": list(c.study.signs), "seeds": list(c.study.seeds)}
            made_for = to_make(path, asked | equal_to(study))
            if made_for is None:
                continue
            rows: list[Row] = []
            for sign in made_for["signs"]:
                rows += measure(make(), study, arm, sign, made_for["seeds"], budget(sign))
            write_parquet(path, rows, made_for)
        say(f"dial: {len(rows)} rows -> {path}")
    return [study.dial(arm) for arm in dialled(c)]


def dialled(c: ConfigDict) -> tuple[str, ...]:
    """The arms that are scaled."""
    return (*c.dial.arms, *(arm for arm in c.study.arms if arm in CONTRASTS))


def check(c: ConfigDict, study: Study) -> None:
    """That the runs are there that are to be scaled.

    Raises:
      ValueError: nothing to scale. FileNotFoundError: a run that has no checkpoint.
    """
    if not dialled(c):
        raise ValueError(
            "dial.arms: got none, and study.arms has neither 'weights' nor 'contrast', expected "
            "tuned arms to scale. Example: --config.dial.arms=token,random"
        )
    for arm in dialled(c):
        of = CONTRASTS.get(arm, arm)
        for sign in (1, -1) if arm in CONTRASTS else c.study.signs:
            for seed in c.study.seeds:
                run = study.run(RunName(of, sign, seed))
                if not distributed.exists(run.checkpoints):
                    raise FileNotFoundError(
                        f"{run.path}: no checkpoints there, expected those of a run that `{arm}` "
                        "is made of. Train it first."
                    )


def measure(
    bench: Bench, study: Study, arm: str, sign: int, seeds: list[int], budget: float | None
) -> list[Row]:
    """An arm's sweep on validation, and every seed on test at the scale that costs the budget."""
    at = functools.partial(_condition, bench, study, arm, sign)
    cells, rows = sweep(bench, (at(seeds[0], scale) for scale in bench.c.dial.scales))
    if budget is None:
        say(f"{arm} {sign:+d}: no tuned dual run to be equal to, so no scale is tested")
        return rows
    scale = spends(cells, budget)
    say(f"{arm} {sign:+d} (KL {budget:.3g}): {scale:.3g} times its change")
    for seed in seeds if scale else ():
        rows = tested(bench, rows, at(seed, scale))
    return rows


def _condition(
    bench: Bench, study: Study, arm: str, sign: int, seed: int, scale: float
) -> Condition:
    if arm not in CONTRASTS:
        return arms.tuned(bench.base, study.run(RunName(arm, sign, seed)).path, scale)
    toward, away = (study.run(RunName(CONTRASTS[arm], s, seed)).path for s in (sign, -sign))
    return arms.contrasted(arm, bench.base, toward, away, scale)


if __name__ == "__main__":
    program.main(run, __doc__)
