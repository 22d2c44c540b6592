"""Made-up residuals with a planted direction, and the fold over them."""

import numpy as np

from reptune_jax.vectors import methods
from reptune_jax.vectors.methods import Rows


def planted(N=2, P=60, D=24, strength=3.0, seed=0, noise_D=1.0):
    """(positive_NxPxD, negative_NxPxD, direction_NxD); the pairs share a part of their noise."""
    rng = np.random.default_rng(seed)
    direction_NxD = rng.standard_normal((N, D))
    direction_NxD /= np.linalg.norm(direction_NxD, axis=1, keepdims=True)
    shared = 2 * rng.standard_normal((N, P, D)) + 20 * rng.standard_normal((N, 1, D))
    sides = [shared + rng.standard_normal((N, P, D)) * noise_D for _ in range(2)]
    half = strength / 2 * direction_NxD[:, None]
    return *(side.astype(np.float32) for side in (sides[0] + half, sides[1] - half)), direction_NxD


def folded(method, positive, negative, batch=1000, nuisance=None, order=None):
    """(vector, rows) of one pass over the pairs, read in `order`."""
    N, P, D = positive.shape
    order = np.arange(P) if order is None else order
    kept = methods.init(N, D, nuisance)
    for start in range(0, P, batch):
        read = order[start : start + batch]
        kept = methods.add(kept, positive[:, read], negative[:, read])
    rows = Rows(kept.rows, np.argsort(order))
    return methods.finish(kept, rows, method, {}), rows


def cosines(a_NxD, b_NxD):
    """Row by row."""
    lengths = np.linalg.norm(a_NxD, axis=1) * np.linalg.norm(b_NxD, axis=1)
    return (a_NxD * b_NxD).sum(1) / lengths
