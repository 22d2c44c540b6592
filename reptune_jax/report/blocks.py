"""What a section of the report is made of, as data: page and Markdown lay it out each its way."""

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from reptune_jax.evals.stats import Interval

if TYPE_CHECKING:  # importing matplotlib takes a second, and `convert` draws nothing
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Table:
    """Text, ready to be laid out."""

    title: str
    caption: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""  # said instead of the rows when there are none


@dataclasses.dataclass(frozen=True)
class Plot:
    """A figure that is drawn when it is laid out."""

    name: str  # of its PNG
    title: str
    caption: str
    draw: Callable[[], "Figure | None"]  # None: its data are missing
    note: str = ""  # said then


@dataclasses.dataclass(frozen=True)
class Cards:
    """Texts side by side: `item`, `prompt`, and `answers` with arm, color, text and value."""

    title: str
    caption: str
    cards: list[dict[str, Any]]
    note: str = ""  # said instead of the cards when there are none


@dataclasses.dataclass(frozen=True)
class Lines:
    """Sentences: a list, or a note where there is nothing else to show."""

    lines: list[str]
    note: bool = False


Block = Table | Plot | Cards | Lines


def number(x: float | None, digits: int = 3, signed: bool = False) -> str:
    """Fixed decimals with a real minus sign; an en dash for what is missing."""
    if x is None or not math.isfinite(x):
        return "–"
    text = f"{x:{'+' if signed else ''}.{digits}f}"
    return text.replace("-", "−")


def interval(x: Interval | None, digits: int = 3, signed: bool = True) -> str:
    """Estimate [low, high]."""
    if not isinstance(x, Interval) or not math.isfinite(x.estimate):
        return "–"
    low, high = (number(v, digits, signed) for v in (x.low, x.high))
    return f"{number(x.estimate, digits, signed)} [{low}, {high}]"


def divergence(x: float | Interval | None) -> str:
    """A KL: three decimals, or two digits of one that is smaller: 0.013, 0.00042."""
    middle = x.estimate if isinstance(x, Interval) else x or 0.0
    digits = 1 - math.floor(math.log10(middle)) if 1e-6 < middle < 0.01 else 3
    return interval(x, digits, signed=False) if isinstance(x, Interval) else number(x, digits)


def percent(x: float | None) -> str:
    """A share as a percentage."""
    return "–" if x is None or not math.isfinite(x) else f"{100 * x:.1f} %"


def p_value(p: float) -> str:
    """Three decimals, or "< .001"."""
    return "–" if math.isnan(p) else ("< .001" if p < 0.001 else f"{p:.3f}")
