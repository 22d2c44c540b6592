"""Kernels held as integers, for a base that is frozen: a quarter to a seventh of float32's memory.

Rounded to nearest, symmetric. As a matrix of inputs and outputs (what of a kernel's axes is which,
its projection says):
  int8  codes [I, O], a step for every output
  int4  two codes a byte, [I/2, O], a step for every output and 32 inputs (the last ones filled up)
A kernel is codes x step. It is whole while it is multiplied, and is made again for the backward
pass: kept for that, the float kernels of all layers would be stacked.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Kind(NamedTuple):
    """How a weight is rounded."""

    bits: int
    group: int  # inputs that share a step; 0: all of an output


KINDS = {"int8": Kind(8, 0), "int4": Kind(4, 32)}
CODES, STEP = "codes", "step"  # the leaves that stand for `kernel`
_ZERO = 8  # what is added to a code of 4 bits, so that a byte holds two


def nearest(w_xIxO: jax.Array, kind: Kind, step_dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """(codes [..., G, I of a group, O] as float32, steps [..., G, 1, O]); behind I they are 0."""
    *stack, I, O = w_xIxO.shape
    group = kind.group or I
    w_xIxO = jnp.pad(w_xIxO.astype(jnp.float32), [(0, 0)] * len(stack) + [(0, -I % group), (0, 0)])
    grouped = w_xIxO.reshape(*stack, -1, group, O)
    top = 2 ** (kind.bits - 1) - 1
    step = (jnp.abs(grouped).max(-2, keepdims=True) / top).astype(step_dtype)
    divisor = jnp.where(step > 0, step, 1).astype(jnp.float32)
    return jnp.clip(jnp.round(grouped / divisor), -top, top), step


def hold(kernel: jax.Array, inputs: int, stack: int, how: str) -> dict[str, jax.Array]:
    """A kernel's two leaves, of axes `stack` of layers, `inputs` of inputs, then outputs.

    Steps are bfloat16 and codes are of the step as it is stored.
    """
    front, I = kernel.shape[:stack], math.prod(kernel.shape[stack : stack + inputs])
    codes, step = nearest(kernel.reshape(*front, I, -1), KINDS[how], jnp.dtype(jnp.bfloat16))
    if KINDS[how].bits == 4:  # the halves of a group share bytes
        low, high = jnp.split((codes + _ZERO).astype(jnp.uint8), 2, axis=-2)
        codes = low | high << 4
    else:
        codes = codes.astype(jnp.int8)
    O = codes.shape[-1]
    return {CODES: codes.reshape(*front, -1, O), STEP: step.reshape(*front, -1, O)}


def whole(codes_RxO: jax.Array, step_GxO: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The kernel of this shape, float32: every product of a code and a step is exact."""
    G, O = step_GxO.shape
    codes = codes_RxO.reshape(G, -1, O)
    if codes.dtype == jnp.uint8:
        halves = [(codes & 15).astype(jnp.int8), (codes >> 4).astype(jnp.int8)]
        codes = jnp.concatenate(halves, axis=1) - _ZERO
    w_IxO = (codes.astype(jnp.float32) * step_GxO[:, None].astype(jnp.float32)).reshape(-1, O)
    return w_IxO[: math.prod(shape) // O].reshape(shape)


# Within a scan, common subexpressions cannot undo the rematerialisation.
@functools.partial(
    jax.checkpoint,
    prevent_cse=False,
    policy=jax.checkpoint_policies.nothing_saveable,
    static_argnums=(3, 4),
)
def product(
    x: jax.Array, codes_RxO: jax.Array, step_GxO: jax.Array, inputs: int, outs: tuple[int, ...]
) -> jax.Array:
    """x, whose last axes are `inputs` of inputs, times the kernel, rounded to x's type."""
    shape = (*x.shape[-inputs:], *outs)
    return times(x, whole(codes_RxO, step_GxO, shape).astype(x.dtype), inputs)


def times(x: jax.Array, kernel: jax.Array, inputs: int) -> jax.Array:
    """x times a kernel, over as many axes of inputs."""
    axes = tuple(range(x.ndim - inputs, x.ndim)), tuple(range(inputs))
    return jax.lax.dot_general(x, kernel, (axes, ((), ())))
