"""How much of an intervention: a sweep on the validation split, and the choice within a KL budget.

What is compared at equal side effects spends the same KL to the base on neutral prose; the budget
is what the study's tuned `dual` runs cost, on the very documents that are swept: between documents
KL differs by more than what is compared.
"""

import itertools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from reptune_jax.console import say
from reptune_jax.evals import arms, scoring
from reptune_jax.evals.arms import Condition
from reptune_jax.evals.bench import Bench, say_missing
from reptune_jax.evals.results import Row
from reptune_jax.folder import Run, RunName, Study


class Cell(NamedTuple):
    """One point of the sweep, on validation prompts and neutral prose."""

    layer: int  # -1 for tuned weights
    dose: float  # or times the change of tuned weights
    effect: float  # mean judge score or log-odds, in the direction of the sign
    kl: float  # nats/token


def sweep(bench: Bench, conditions: Iterable[Condition]) -> tuple[list[Cell], list[Row]]:
    """Each condition on the validation split and its neutral prose."""
    cells, rows = [], []
    for cond in conditions:
        say(f"sweeping {cond.title}")
        moved = bench.behavior_rows(cond, "val")
        kept = _prose_rows(bench, cond)
        say_missing(cond, moved + kept)
        cells.append(Cell(cond.layer, cond.k, cond.sign * bench.effect(moved), _kl(kept)))
        rows += moved + kept
    return cells, rows


def _prose_rows(bench: Bench, cond: Condition) -> list[Row]:
    labels, batch = bench.labels(cond), bench.c.eval.batch
    return scoring.retention_rows(cond, labels, bench.swept_prose, batch)


def _kl(kept: list[Row]) -> float:
    """nats/token."""
    return float(np.mean([row.value for row in kept if row.metric == "kl"]))


def tested(bench: Bench, rows: list[Row], cond: Condition) -> list[Row]:
    """The sweep's rows and those of a condition on test.

    A point of the sweep has retention rows already, on validation documents: they are left out.
    """
    at, kept = (cond.arm, cond.sign, cond.seed, cond.layer, cond.k), ("neutral", "chats")
    others = [r for r in rows if (r.arm, r.sign, r.seed, r.layer, r.k) != at or r.split not in kept]
    return others + bench.rows(cond)


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


def spends(cells: list[Cell], budget: float) -> float:
    """The scale of tuned weights whose KL is the budget, the largest swept where none costs it.

    Whatever its effect, which on few validation prompts is noise. Interpolated as in `choose`.
    """
    known = sorted((c for c in cells if math.isfinite(c.kl)), key=lambda c: c.dose)
    roots = np.sqrt(np.maximum.accumulate([0.0] + [c.kl for c in known]))
    return round(float(np.interp(math.sqrt(budget), roots, [0.0] + [c.dose for c in known])), 3)


def dual_runs(study: Study, sign: int) -> list[Run]:
    """The study's tuned dual runs of a sign that are evaluated."""
    named = ((RunName.parse(run.path.name), run) for run in study.runs())
    dual = [run for name, run in named if name and (name.arm, name.sign) == ("dual", sign)]
    return [run for run in dual if run.results.exists()]


def equal_to(study: Study) -> dict[str, Any]:
    """What is made at equal KL is made for these runs; for others it is made again."""
    signed = ((f"{sign:+d}", dual_runs(study, sign)) for sign in (1, -1))
    return {"dual runs": {sign: [run.path.name for run in runs] for sign, runs in signed}}


def dual_kl(bench: Bench, study: Study, sign: int) -> float | None:
    """Mean KL that the study's tuned dual models of this sign cost, on the prose of sweeps."""
    tuned = (arms.tuned(bench.base, run.path) for run in dual_runs(study, sign))
    kls = [_kl(_prose_rows(bench, cond)) for cond in tuned]
    if kls and not math.isfinite(sum(kls)):
        say(f"sign {sign:+d}: the KL of the tuned dual runs is not finite; no dose is equal to it")
    return float(np.mean(kls)) if kls and math.isfinite(sum(kls)) else None
