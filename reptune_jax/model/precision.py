"""float32 means float32.

GPUs and TPUs would round the factors of a float32 product (to TensorFloat-32, to bfloat16): losses
that are 1e-2 apart, a residual that is read 1e-3 off. Who asks JAX for something else gets that.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def in_full(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a module of dtype float32, its products in full.

    JAX_DEFAULT_MATMUL_PRECISION goes first. In 16 bits nothing is asked for: factors are exact as
    they are, and kernels for TPUs refuse to multiply them as if they were float32.
    """

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
        if asked or self.dtype != jnp.float32:
            return method(self, *args, **kwargs)
        with jax.default_matmul_precision("highest"):
            return method(self, *args, **kwargs)

    return wrapped


def in_float32(spec: str, *factors: jax.Array) -> jax.Array:
    """An einsum of float32, in full unless JAX was asked for something else."""
    asked = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return jnp.einsum(spec, *factors, precision=None if asked else "highest")
