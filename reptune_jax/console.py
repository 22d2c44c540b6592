"""Saying things to the person at the terminal, for programs and libraries alike."""

import functools
import time

from reptune_jax import distributed


def say(message: str) -> None:
    """One line with the time of day; only the first of several processes speaks."""
    if distributed.is_first():
        print(f"[{time.strftime('%H:%M:%S')}] {message}", flush=True)


@functools.cache
def note(message: str) -> None:
    """What was decided without asking: said once, however often a model is opened."""
    say(f"note: {message}")


def clock(seconds: float) -> str:
    """3 min 05 s."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours} h {m:02d} min" if hours else f"{m} min {s:02d} s" if m else f"{s} s"
