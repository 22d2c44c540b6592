"""How the cosines of the chosen tokens are spread: by value, and along the answer.

Counted on the device in bins that never move, so that batches, hosts and evaluations add up.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

Array = Any  # jax.Array on the device, numpy once batches are added up

BINS = 400  # of equal width over [-1, 1]


@flax.struct.dataclass
class Spread:
    """Sums over the chosen tokens; K bins, P places: the p-th chosen token of its row."""

    count_NxK: Array
    cosine_NxP: Array
    count_P: Array


def spread(cosine_NxBxT: jax.Array, weight_BxT: jax.Array) -> Spread:
    """The spread of one batch; `weight_BxT` is 1 at the chosen tokens and 0 elsewhere."""
    N, _, T = cosine_NxBxT.shape
    bin_NxBxT = jnp.clip(jnp.floor((cosine_NxBxT + 1) / 2 * BINS).astype(jnp.int32), 0, BINS - 1)
    layer_Nx1x1 = jnp.arange(N)[:, None, None]
    place_BxT = jnp.maximum(jnp.cumsum(weight_BxT > 0, axis=1) - 1, 0)
    return Spread(
        jnp.zeros((N, BINS)).at[layer_Nx1x1, bin_NxBxT].add(weight_BxT),
        jnp.zeros((N, T)).at[layer_Nx1x1, place_BxT].add(cosine_NxBxT * weight_BxT),
        jnp.zeros(T).at[place_BxT].add(weight_BxT),
    )


def buckets(count_K: np.ndarray) -> np.ndarray:
    """[k, 3]: left edge, right edge and count of the bins from the first filled one to the last."""
    edges = np.linspace(-1, 1, len(count_K) + 1)
    rows_Kx3 = np.stack([edges[:-1], edges[1:], count_K], axis=1)
    filled = np.flatnonzero(count_K)
    return rows_Kx3[filled[0] : filled[-1] + 1] if len(filled) else rows_Kx3[:0]


def by_place(found: Spread) -> np.ndarray:
    """[N, P]: mean cosine at each place that any row has."""
    has_P = np.asarray(found.count_P) > 0
    return np.asarray(found.cosine_NxP)[:, has_P] / np.asarray(found.count_P)[has_P]
