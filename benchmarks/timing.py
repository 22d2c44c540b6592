"""Fair timing of two callables, and one row of a Markdown table for each pair."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

Call = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of every run; `ratio`: median over rounds of b / a, how many times faster a is."""

    answers: tuple[Any, Any]  # of the first calls, a's and b's
    first_a: float
    first_b: float
    times_a: tuple[float, ...]
    times_b: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Of the runs of one round, which met the same machine."""
        return statistics.median(b / a for a, b in zip(self.times_a, self.times_b, strict=True))


@dataclasses.dataclass(frozen=True)
class Case:
    """The same work on both sides; `agreement` says in words how alike the two answers are."""

    jax: Call
    torch: Call
    agreement: Callable[[Any, Any], str]


def alternate(fn_a: Call, fn_b: Call, runs: int = 5) -> Timing:
    """Runs a and b in turns, the order swapped each round, so that a drifting clock favors neither.

    Both must wait for their own result. With no runs the first calls are the one round, compilation
    included: for work so long that it is done once.
    """
    (answer_a, first_a), (answer_b, first_b) = _timed(fn_a), _timed(fn_b)
    times_a, times_b = ([], []) if runs else ([first_a], [first_b])
    for i in range(runs):
        turns = ((fn_a, times_a), (fn_b, times_b))
        for fn, times in turns if i % 2 == 0 else turns[::-1]:
            times.append(_timed(fn)[1])
    return Timing((answer_a, answer_b), first_a, first_b, tuple(times_a), tuple(times_b))


HEADER = """\
| case | jax s (median) | torch s (median) | torch / jax | all jax s | all torch s | first call s |
|---|---|---|---|---|---|---|"""


def row(name: str, timing: Timing) -> str:
    """One row of the table HEADER starts; a is jax, b is torch."""

    def each(times: Sequence[float]) -> str:
        return " ".join(f"{t:.3f}" for t in times)

    cells = [
        name,
        f"{statistics.median(timing.times_a):.3f}",
        f"{statistics.median(timing.times_b):.3f}",
        f"**{timing.ratio:.2f}**",
        each(timing.times_a),
        each(timing.times_b),
        f"{timing.first_a:.1f} / {timing.first_b:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def _timed(fn: Call) -> tuple[Any, float]:
    """Its result, and its seconds."""
    start = time.perf_counter()
    result = fn()
    return result, time.perf_counter() - start
