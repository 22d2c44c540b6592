"""From captured sums to a vector: mean difference (paper section 2)."""

from typing import Any

import numpy as np

from reptune_jax import mesh as meshes
from reptune_jax.vectors.capture import Sums
from reptune_jax.vectors.steering_vector import SteeringVector


def mean_diff(sums: Sums, meta: dict[str, Any]) -> SteeringVector:
    """v[l] = mean(h+) - mean(h-), raw length. Sign is by construction: positive minus negative.

    `meta["agreement"]` is the mean cosine between two pairs' differences, per layer: near 0 the
    contrast has no common direction and steering with it will be unreliable (arXiv 2505.22637).
    """
    n, found = sums.pairs, meshes.fetch(sums)
    positive, negative = found.positive_NxD / n, found.negative_NxD / n
    squared_N = np.square(found.unit_difference_NxD).sum(1)
    agreement_N = (squared_N - n) / max(n * (n - 1), 1)
    about = {
        **meta,
        "method": "mean_diff",
        "norm": "raw",
        "pairs": n,
        "layer_convention": "output of 0-based block l = hidden_states[l+1]",
        "agreement": [round(float(a), 4) for a in agreement_N],
    }
    return SteeringVector(
        directions_NxD=(positive - negative).astype(np.float32),
        residual_norm_N=(found.norm_N / n).astype(np.float32),
        mean_NxD=((positive + negative) / 2).astype(np.float32),
        layers=tuple(range(len(positive))),
        meta=about,
    )


METHODS = {"mean_diff": mean_diff}
