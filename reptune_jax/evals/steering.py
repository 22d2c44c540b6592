"""Program: online steering. Sweeps layer and dose on the validation split, then tests the winner.

    python -m reptune_jax.evals.steering --config=sentiment --workdir=runs/sentiment

Two doses are chosen for each sign: the best one whose KL to the base on neutral prose stays under
`steer.max_kl`, and, where tuned `dual` runs are there, the best one at the KL that they cost.
Writes `results/steering.parquet`; skips it where it is there, for as long as those runs are the
same.
"""

import itertools
from pathlib import Path

from ml_collections import ConfigDict

from reptune_jax import program
from reptune_jax.console import say
from reptune_jax.evals import arms
from reptune_jax.evals.bench import Bench, prepare
from reptune_jax.evals.results import Row, to_make, write_parquet
from reptune_jax.evals.sweep import choose, dual_kl, equal_to, sweep, tested
from reptune_jax.folder import Study


def run(c: ConfigDict, workdir: Path, bench: Bench | None = None) -> Path:
    """Sweeps, chooses on validation, measures the choices on test."""
    study = Study(workdir)
    path = study.steering
    with study.writing():
        signs = list(c.study.signs)
        baked = signs if "bake" in c.study.arms else []
        made_for = to_make(path, {"steer": signs, "bake": baked} | equal_to(study))
        if made_for is None:
            return path
        rows = measure(bench or prepare(c, study), study, made_for["steer"], made_for["bake"])
        write_parquet(path, rows, made_for)
    say(f"steering: {len(rows)} rows -> {path}")
    return path


def measure(bench: Bench, study: Study, signs: list[int], baked: list[int]) -> list[Row]:
    """The sweep's rows on validation and those of what it chose on test, of some signs baked."""
    c = bench.c
    rows: list[Row] = []
    for sign in signs:
        at = itertools.product(c.steer.layers, c.steer.doses)
        cells, found = sweep(
            bench, (arms.steered(bench.base, bench.vector, *one, sign, c.steer) for one in at)
        )
        rows += found
        budgets = {"free": c.steer.max_kl or None, "equal KL": dual_kl(bench, study, sign)}
        if not any(budgets.values()):
            raise ValueError(
                "steer.max_kl: got 0 and found no tuned dual run to be equal to, expected one of "
                "the two. Set it, or tune and evaluate `dual` first."
            )
        chosen = {}
        for name, budget in budgets.items():
            if budget is not None:
                layer, dose = choose(cells, budget)
                say(f"steer {sign:+d} ({name} <= {budget:.3g}): layer {layer}, dose {dose:.3g}")
                at_best = bench.base, bench.vector, layer, dose, sign
                chosen[layer, dose] = arms.steered(*at_best, c.steer)
        for cond in chosen.values():
            rows = tested(bench, rows, cond)
            if sign in baked:
                rows += bench.rows(arms.baked(cond))
    return rows


if __name__ == "__main__":
    program.main(run, __doc__)
