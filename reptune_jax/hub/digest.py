"""Digests: which model this is, and every array of a state, to notice that a file has changed.

That of an array is two sums of the bit patterns as integers: one plain, one weighted by an odd
number of the position. Integer sums do not depend on the order, so that the digest is that of the
whole array however it is sharded; any single changed word changes both, and exchanged words change
the second.
"""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from reptune_jax import mesh as meshes
from reptune_jax.model.arch import Arch

_UINT = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def digests(tree: Any) -> dict[str, str]:
    """path -> 16 hex digits, for every leaf; computed where the leaves lie."""
    paths, leaves = zip(*jax.tree_util.tree_flatten_with_path(tree)[0], strict=True)
    # Leaves on the host go to the device one by one: all at once need not fit.
    on_host = any(isinstance(leaf, np.ndarray) for leaf in leaves)
    groups = [[a] for a in leaves] if on_host else [list(leaves)]
    found = np.concatenate([meshes.fetch(_sums(group)) for group in groups])
    names = [leaf_name(path) for path in paths]
    return {n: f"{a:08x}{b:08x}" for n, (a, b) in zip(names, found.tolist(), strict=True)}


def weights_sha(arch: Arch, norm_D: Any, table_64xD: Any) -> str:
    """Of what tuning leaves alone, at bfloat16 precision so that storage dtype does not matter."""
    parts = norm_D, table_64xD
    data = b"".join(meshes.fetch(p.astype(jnp.bfloat16)).tobytes() for p in parts)
    return hashlib.sha256(repr(arch).encode() + data).hexdigest()[:16]


def leaf_name(path: tuple[Any, ...]) -> str:
    """opt/1/0/mu/attn/v/kernel."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def describe(leaf: Any) -> str:
    """float32[4, 64]."""
    return f"{jnp.dtype(leaf.dtype).name}{list(leaf.shape)}"


@jax.jit
def _sums(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([_sum(leaf) for leaf in leaves])


def _sum(leaf: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(leaf, _UINT[leaf.dtype.itemsize]).astype(jnp.uint32)
    at, stride = jnp.zeros(leaf.shape, jnp.uint32), 1
    for axis in reversed(range(leaf.ndim)):
        at = at + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * jnp.uint32(
            stride % 2**32
        )
        stride *= leaf.shape[axis]
    odd = at * jnp.uint32(2654435769) * 2 + 1
    return jnp.stack([jnp.sum(bits, dtype=jnp.uint32), jnp.sum(bits * odd, dtype=jnp.uint32)])
