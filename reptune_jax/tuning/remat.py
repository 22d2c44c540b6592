"""`train.remat=auto`: of what can be stored or computed again, the fastest choice that fits."""

import math
from collections.abc import Callable
from typing import Any

import jax

from reptune_jax import distributed
from reptune_jax.console import say

_FASTEST_FIRST = ("none", "dots", "full")  # on accelerators: what is stored is not computed again
_SPARE = 0.05  # of the memory: what no count has


def choices(remat: str, platform: str) -> tuple[str, ...]:
    """What to try, one after another.

    A CPU is the faster the less is stored, its memory is slow and large: nothing to weigh there.
    """
    if remat != "auto":
        return (remat,)
    return ("dots",) if platform == "cpu" else _FASTEST_FIRST


def fitting(remat: str, platform: str, compiled: Callable[[str], Any]) -> Any:
    """`compiled(choice)` of the first choice that fits, by the compiler's count; else of the last.

    All processes take what the first one finds.
    """
    *tried, last = choices(remat, platform)
    for choice in tried:
        left = free()
        program = _unless_too_large(compiled, choice)
        need = needed(program)
        if distributed.agree(need <= left):
            say(f"remat: {choice}")
            return program
        say(f"remat: {choice} needs {need / 2**30:.2f} GiB of the {left / 2**30:.2f} that are free")
    return compiled(last)


def needed(program: Any) -> float:
    """Bytes that a compiled step takes on a device, besides its arguments; inf: not known."""
    m = program.memory_analysis() if program else None
    if m is None:
        return math.inf
    made = m.output_size_in_bytes - m.alias_size_in_bytes
    return float(m.temp_size_in_bytes + made + m.generated_code_size_in_bytes)


def free() -> float:
    """Bytes left on this process's first device, where the arguments lie already; 0: not known."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return max(0.0, stats.get("bytes_limit", 0) * (1 - _SPARE) - stats.get("bytes_in_use", 0))


def is_too_large(error: Exception) -> bool:
    """Whether a compiler refused a program for the memory that it takes."""
    return "RESOURCE_EXHAUSTED" in str(error) or "memory" in str(error)


def _unless_too_large(compiled: Callable[[str], Any], choice: str) -> Any:
    try:
        return compiled(choice)
    except jax.errors.JaxRuntimeError as error:
        if not is_too_large(error):
            raise
        return None
