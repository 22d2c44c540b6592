"""Vector methods, each a fold over batches of residuals: `init`, `add`, `finish`.

A mean keeps sums, a PCA or a probe keeps what it needs; what is kept lies on the device, and only
`finish` fetches it. A new method is an entry of `METHODS`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from reptune_jax import mesh as meshes
from reptune_jax.vectors.steering_vector import SteeringVector


class Method(NamedTuple):
    """How a vector is made of matched pairs of residuals, [N, B, D] at a time."""

    init: Callable[[int, int], Any]  # (N, D) -> what is kept
    add: Callable[[Any, jax.Array, jax.Array], Any]  # (kept, positive_NxBxD, negative_NxBxD)
    finish: Callable[[Any, dict[str, Any]], SteeringVector]  # (kept, meta) -> the vector


class Sums(NamedTuple):
    """What the mean difference and its quality need."""

    pairs: jax.Array
    positive_NxD: jax.Array
    negative_NxD: jax.Array
    norm_N: jax.Array
    unit_difference_NxD: jax.Array


def _no_sums(N: int, D: int) -> Sums:
    zeros_NxD = jnp.zeros((N, D))
    return Sums(jnp.int32(0), zeros_NxD, zeros_NxD, jnp.zeros(N), zeros_NxD)


@jax.jit
def _add(sums: Sums, positive_NxBxD: jax.Array, negative_NxBxD: jax.Array) -> Sums:
    difference = positive_NxBxD - negative_NxBxD
    length = jnp.linalg.norm(difference, axis=-1, keepdims=True)
    norms_NxB = jnp.linalg.norm(jnp.concatenate([positive_NxBxD, negative_NxBxD], 1), axis=-1)
    return Sums(
        sums.pairs + positive_NxBxD.shape[1],
        sums.positive_NxD + positive_NxBxD.sum(1),
        sums.negative_NxD + negative_NxBxD.sum(1),
        sums.norm_N + norms_NxB.sum(1) / 2,
        sums.unit_difference_NxD + (difference / jnp.maximum(length, 1e-8)).sum(1),
    )


def _mean_difference(sums: Sums, meta: dict[str, Any]) -> SteeringVector:
    """v[l] = mean(h+) - mean(h-), raw length (paper section 2). Sign: positive minus negative.

    `meta["agreement"]` is the mean cosine between two pairs' differences, per layer: near 0 the
    contrast has no common direction and steering with it will be unreliable (arXiv 2505.22637).
    Of one pair it is unknown, None.

    Raises:
      ValueError: both means are the same at every layer.
    """
    found = meshes.fetch(sums)
    n = int(found.pairs)
    positive, negative = found.positive_NxD / n, found.negative_NxD / n
    squared_N = np.square(found.unit_difference_NxD).sum(1)
    agreement_N = (squared_N - n) / (n * (n - 1)) if n > 1 else [None] * len(squared_N)
    difference_NxD = (positive - negative).astype(np.float32)
    layers = tuple(np.flatnonzero(difference_NxD.any(axis=1)).tolist())
    if not layers:
        raise ValueError(
            f"pairs: got {n} whose positive and negative sides have the same mean at every layer, "
            "expected a contrast. Read another position, or give pairs that differ before it."
        )
    about = {
        **meta,
        "method": "mean_diff",
        "norm": "raw",
        "pairs": n,
        "operation": "add",
        "hook": "residual stream, output of block l = hidden_states[l+1]",
        "layer_base": 0,
        "agreement": [None if a is None else round(float(a), 4) for a in agreement_N],
    }
    return SteeringVector(
        directions_NxD=difference_NxD,
        residual_norm_N=(found.norm_N / n).astype(np.float32),
        mean_NxD=((positive + negative) / 2).astype(np.float32),
        layers=layers,
        meta=about,
    )


METHODS = {"mean_diff": Method(_no_sums, _add, _mean_difference)}
