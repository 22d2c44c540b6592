"""Program: online steering. Sweeps layer and dose on the validation split, then tests the winner.

    python -m reptune_jax.evals.steering --config=sentiment --workdir=runs/sentiment

Two doses are chosen for each sign: the best one whose KL to the base on neutral prose stays under
`steer.max_kl`, and, where tuned `dual` runs are there, the best one at the KL that they cost.
Writes `results/steering.parquet`; skips it where it is there.
"""

import itertools
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from reptune_jax import distributed, program
from reptune_jax.console import say
from reptune_jax.data import neutral
from reptune_jax.evals import arms, results, scoring
from reptune_jax.evals.bench import Bench, prepare, say_missing
from reptune_jax.evals.results import Row, write_parquet
from reptune_jax.folder import RunName, Study


class Cell(NamedTuple):
    """One point of the sweep, on validation prompts and neutral prose."""

    layer: int
    dose: float
    effect: float  # mean judge score or log-odds, in the direction of the sign
    kl: float  # nats/token


def run(c: ConfigDict, workdir: Path, bench: Bench | None = None) -> Path:
    """Sweeps, chooses on validation, measures the choices on test."""
    study = Study(workdir)
    path = study.steering
    with study.writing():
        if distributed.exists(path):
            say(f"{path}: already there")
            return path
        rows = measure(bench or prepare(c, study), study)
        write_parquet(path, rows)
    say(f"steering: {len(rows)} rows -> {path}")
    return path


def measure(bench: Bench, study: Study) -> list[Row]:
    """The sweep's rows on validation and those of what it chose on test."""
    c = bench.c
    rows: list[Row] = []
    for sign in c.study.signs:
        cells, found = sweep(bench, sign)
        rows += found
        budgets = {"free": c.steer.max_kl or None, "equal KL": dual_kl(study, sign)}
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
                chosen[layer, dose] = arms.steered(bench.base, bench.vector, layer, dose, sign)
        swept = {(cell.layer, cell.dose) for cell in cells}
        for at, cond in chosen.items():
            # A chosen point of the sweep has retention rows already, on validation documents.
            again = {(sign, *at, split) for split in ("neutral", "chats") if at in swept}
            rows = [r for r in rows if (r.sign, r.layer, r.k, r.split) not in again]
            rows += bench.rows(cond)
            if "bake" in c.study.arms:
                rows += bench.rows(arms.baked(cond))
    return rows


def sweep(bench: Bench, sign: int) -> tuple[list[Cell], list[Row]]:
    """Every layer x dose on the validation split."""
    cells, rows = [], []
    batch = bench.c.eval.batch
    prose = neutral.prose(bench.base, "val", bench.c.steer.documents)
    known = scoring.refer(bench.base, prose, batch)
    for layer in bench.c.steer.layers:
        for dose in bench.c.steer.doses:
            cond = arms.steered(bench.base, bench.vector, layer, dose, sign)
            say(f"sweeping {cond.title}")
            moved = bench.behavior_rows(cond, "val")
            kept = scoring.retention_rows(cond, bench.labels(cond), known, batch)
            say_missing(cond, moved + kept)
            kl = float(np.mean([row.value for row in kept if row.metric == "kl"]))
            cells.append(Cell(layer, dose, sign * bench.effect(moved), kl))
            rows += moved + kept
    return cells, rows


def choose(cells: list[Cell], budget: float) -> tuple[int, float]:
    """The layer, and the dose at which its KL meets the budget, with the largest effect.

    Between swept points the effect is interpolated linearly in the dose, and so is the root of KL,
    which for small doses grows with their square; from (0, 0 KL). A point with missing values is
    not chosen, nor is a larger dose.

    Raises:
      ValueError: every layer's smallest dose has missing values.
    """
    best: tuple[float, int, float] | None = None
    for layer in sorted({cell.layer for cell in cells}):
        own = sorted((c for c in cells if c.layer == layer), key=lambda c: c.dose)
        own = list(itertools.takewhile(lambda c: math.isfinite(c.effect + c.kl), own))
        if not own:
            continue
        doses = np.array([0.0] + [c.dose for c in own])
        kls = np.maximum.accumulate([0.0] + [c.kl for c in own])
        effects = np.array([-np.inf] + [c.effect for c in own])
        effects[0] = effects[1]  # below the smallest swept dose its effect is an upper bound
        grid = np.linspace(0, doses[-1], 401)
        grid = grid[np.interp(grid, doses, np.sqrt(kls)) ** 2 <= budget]
        effect = np.interp(grid, doses, effects)
        i = len(effect) - 1 - int(np.argmax(effect[::-1]))  # of equals, the largest dose
        if best is None or effect[i] > best[0]:
            best = float(effect[i]), layer, round(float(grid[i]), 3)
    if best is None:
        raise ValueError(
            "steer: got no dose at which every number is finite, expected at least one. Use "
            "smaller steer.doses, or dtype bfloat16 or float32."
        )
    return best[1], best[2]


def dual_kl(study: Study, sign: int) -> float | None:
    """Mean KL on neutral prose that the study's tuned dual models of this sign cost."""
    names = ((RunName.parse(run.path.name), run) for run in study.runs())
    dual = [run for name, run in names if name and (name.arm, name.sign) == ("dual", sign)]
    each = [results.read(run.results) for run in dual if run.results.exists()]
    found = [rows[(rows.metric == "kl") & (rows.split == "neutral")] for rows in each]
    if not found:
        return None
    kl = float(np.mean([np.average(f["value"], weights=f["n_tokens"]) for f in found]))
    if not math.isfinite(kl):
        say(f"steer {sign:+d}: the KL of the tuned dual runs is not finite; no dose is equal to it")
        return None
    return kl


if __name__ == "__main__":
    program.main(run, __doc__)
