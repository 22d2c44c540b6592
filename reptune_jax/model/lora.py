"""Low-rank adapters: y = W x + scale (x A) B on any projection; the merged weight is never made.

Adapters are a flax collection of their own beside an unchanged `params` tree, and are applied by
intercepting the projection's call, so that no module of the decoder knows of them. A leaf is named
by its projection: `attn/v/lora_a` [D, R] and `attn/v/lora_b` [R, K, Dh], stacked over layers.
"""

import functools
import math
import zlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from reptune_jax.model.arch import Arch
from reptune_jax.model.projection import Projection
from reptune_jax.model.transformer import whole

Flat = dict[str, jax.Array]  # path -> array

COLLECTION = "lora"
A, B = "lora_a", "lora_b"


def applied() -> AbstractContextManager[None]:
    """Within it, every projection that has adapter variables adds its adapter's output."""
    return nn.intercept_methods(_add_adapter)


def _add_adapter(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    y = call(*args, **kwargs)
    if not _is_projection(context) or not context.module.has_variable(COLLECTION, A):
        return y
    a, b = (context.module.get_variable(COLLECTION, name) for name in (A, B))
    # The leading axes of A are the projection's inputs: one, or heads and head dim.
    h_BxTxR = jnp.tensordot(args[0].astype(a.dtype), a, axes=a.ndim - 1)
    return y + jnp.tensordot(h_BxTxR, b, axes=1).astype(y.dtype)


def _is_projection(context: Any) -> bool:
    return context.method_name == "__call__" and isinstance(context.module, Projection)


@functools.lru_cache
def input_axes(arch: Arch) -> dict[str, int]:
    """Projection of a block ("attn/o") -> how many leading axes of its kernel are inputs."""
    found: dict[str, int] = {}

    def note(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if _is_projection(context):
            found["/".join(context.module.path[1:])] = context.module.inputs
        return call(*args, **kwargs)

    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    with nn.intercept_methods(note):
        jax.eval_shape(whole(arch).init, jax.random.key(0), tokens, tokens)
    return found


def init(
    arch: Arch, kernels: Mapping[str, tuple[int, ...]], layers: int, rank: int, seed: int
) -> Flat:
    """Float32 adapters of `layers` layers for projections of these (unstacked) kernel shapes.

    As PEFT begins: A uniform within 1/sqrt(inputs), B zero, so that nothing changes at first.
    """
    out: Flat = {}
    for path, shape in kernels.items():
        inputs = input_axes(arch)[path]
        # Keyed by name: a projection begins the same whatever else is adapted.
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
        a_shape = (layers, *shape[:inputs], rank)
        fan_in = math.prod(shape[:inputs])
        out[f"{path}/{A}"] = jax.random.uniform(key, a_shape, jnp.float32, -1.0, 1.0) * fan_in**-0.5
        out[f"{path}/{B}"] = jnp.zeros((layers, rank, *shape[inputs:]), jnp.float32)
    return out


def variables(trained: Flat, scale: jax.Array | float, segment: str, dtype: Any) -> dict[str, Any]:
    """The collection that `applied` reads, cast once, before the scan; {} without adapters."""
    flat = {p: leaf * scale if p.endswith(B) else leaf for p, leaf in trained.items() if is_leaf(p)}
    cast = {path: leaf.astype(dtype) for path, leaf in flat.items()}
    return {COLLECTION: {segment: traverse_util.unflatten_dict(cast, sep="/")}} if cast else {}


def is_leaf(path: str) -> bool:
    """Whether a trained leaf is an adapter's rather than a whole weight."""
    return path.endswith((A, B))


def delta(a: Any, b: Any, scale: float) -> jax.Array:
    """What an adapter adds to its stacked kernels: [L, *in, R], [L, R, *out] -> [L, *in, *out]."""
    a_LxIxR = jnp.asarray(a, jnp.float32).reshape(a.shape[0], -1, a.shape[-1])
    b_LxRxO = jnp.asarray(b, jnp.float32).reshape(*b.shape[:2], -1)
    both = scale * jnp.einsum("lir,lro->lio", a_LxIxR, b_LxRxO, precision="highest")
    return both.reshape(*a.shape[:-1], *b.shape[2:])
