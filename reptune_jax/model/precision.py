"""float32 means float32.

GPUs and TPUs would round the factors of a float32 product (to TensorFloat-32, to bfloat16): losses
that are 1e-2 apart, a residual that is read 1e-3 off. Who asks JAX for something else gets that.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax


def in_full(compute: Callable[..., Any]) -> Callable[..., Any]:
    """`compute` with products of float32 in float32; JAX_DEFAULT_MATMUL_PRECISION goes first."""

    @functools.wraps(compute)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        asked = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
        with jax.default_matmul_precision(asked or "highest"):
            return compute(*args, **kwargs)

    return wrapped
