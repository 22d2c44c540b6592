"""Saying things to the person at the terminal, for programs and libraries alike."""

import functools
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm import tqdm

from reptune_jax import distributed

T = TypeVar("T")
_counting: list[Any] = []  # bars that stand for all that is done within them


def say(message: str) -> None:
    """One line with the time of day; only the first of several processes speaks."""
    if distributed.is_first():
        print(f"[{time.strftime('%H:%M:%S')}] {message}", flush=True)


@functools.cache
def note(message: str) -> None:
    """What was decided without asking: said once, however often a model is opened."""
    say(f"note: {message}")


def watched(steps: Iterable[T], doing: str) -> Iterable[T]:
    """The steps, with a bar and the time left where they take more than two seconds."""
    return tqdm(steps, desc=doing, delay=2, leave=False, disable=not _draws())


@contextmanager
def counted(total: int, doing: str, quiet: bool = False, **how: Any) -> Iterator[tqdm]:
    """As `watched`, for who counts by itself; what is watched meanwhile has no bar of its own."""
    draws = _draws() and not quiet
    with tqdm(total=total, desc=doing, delay=2, leave=False, disable=not draws, **how) as bar:
        _counting.append(bar)
        try:
            yield bar
        finally:
            _counting.pop()


def _draws() -> bool:
    return distributed.is_first() and not _counting


def clock(seconds: float) -> str:
    """3 min 05 s."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours} h {m:02d} min" if hours else f"{m} min {s:02d} s" if m else f"{s} s"
