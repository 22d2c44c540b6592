"""The key/value cache: a plain dict of arrays, carried through the scan over layers."""

from typing import Any

import jax
import jax.numpy as jnp

from reptune_jax.model.arch import Arch

Cache = dict[str, jax.Array]  # k, v: [N, B, K, S, Dh]


def init_cache(arch: Arch, B: int, S: int, dtype: Any) -> Cache:
    """An empty key/value cache for S tokens."""
    shape = (arch.N, B, arch.K, S, arch.Dh)
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}


def write(
    cache_NxBxKxSxDh: jax.Array, new_BxKxTxDh: jax.Array, layer: jax.Array, slot: jax.Array | int
) -> jax.Array:
    """Writes in place (the cache is the scan's carry, so XLA does not copy it layer by layer)."""
    return jax.lax.dynamic_update_slice(
        cache_NxBxKxSxDh, new_BxKxTxDh[None].astype(cache_NxBxKxSxDh.dtype), (layer, 0, 0, slot, 0)
    )
