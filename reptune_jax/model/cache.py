"""The key/value cache: for each segment of a decoder the arrays that its scan carries."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from reptune_jax.model.arch import Arch

KeysValues = dict[str, jax.Array]  # k, v: [layers of the segment, B, K, S, Dh]
Cache = dict[str, KeysValues]  # by segment


def init_cache(
    arch: Arch, segments: tuple[tuple[str, int], ...], B: int, S: int, dtype: Any
) -> Cache:
    """An empty key/value cache for S tokens."""
    shape = B, arch.K, S, arch.Dh
    return {
        name: {kind: jnp.zeros((layers, *shape), dtype) for kind in "kv"}
        for name, layers in segments
    }


@functools.lru_cache
def born(where: jax.sharding.NamedSharding | None) -> Any:
    """`init_cache`, in its layout from the start: on one device it might not fit."""
    if where is None:
        return init_cache
    return jax.jit(init_cache, static_argnums=(0, 1, 2, 3, 4), out_shardings=where)


def write(
    cache_NxBxKxSxDh: jax.Array, new_BxKxTxDh: jax.Array, layer: jax.Array, slot: jax.Array | int
) -> jax.Array:
    """Writes in place (the cache is the scan's carry, so XLA does not copy it layer by layer)."""
    return jax.lax.dynamic_update_slice(
        cache_NxBxKxSxDh, new_BxKxTxDh[None].astype(cache_NxBxKxSxDh.dtype), (layer, 0, 0, slot, 0)
    )
