"""One layer's rows to a direction, float64 in and out; its length means nothing, `methods` sets it.

`positive_PxD` and `negative_PxD` are the two sides of the pairs, in the same order.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_LEAST = 1e-6  # shrinkage: of two rows Ledoit and Wolf want none, and Σ would have no inverse


def mean_difference(positive_PxD: Array, negative_PxD: Array) -> Array:
    """Mean of the positive side less that of the negative one."""
    return positive_PxD.mean(0) - negative_PxD.mean(0)


def first_component(positive_PxD: Array, negative_PxD: Array) -> Array:
    """First principal component of the pairs' differences, of either sign.

    The differences are not centred: their mean is what is looked for. Centring each pair's two rows
    on their midpoint and taking all rows gives the same component, since they are ±half of it.
    """
    rows_PxD = positive_PxD - negative_PxD
    P, D = rows_PxD.shape
    if P < D:
        return rows_PxD.T @ _top(rows_PxD @ rows_PxD.T)
    return _top(rows_PxD.T @ rows_PxD)


def _top(square_KxK: Array) -> Array:
    import scipy.linalg  # as below: not every program waits for it

    last = len(square_KxK) - 1
    return scipy.linalg.eigh(square_KxK, subset_by_index=[last, last])[1][:, 0]


def logistic(positive_PxD: Array, negative_PxD: Array) -> Array:
    """Normal of a logistic regression (L2, C = 1) on the rows.

    They are centred, and divided by one number, their deviation in a mean coordinate: the penalty
    then weighs the same at every layer, and the space is not stretched.
    """
    from sklearn.linear_model import LogisticRegression  # seconds, and only this method needs it

    rows = np.concatenate([positive_PxD, negative_PxD])
    sides = np.repeat([1, 0], [len(positive_PxD), len(negative_PxD)])
    rows = rows - rows.mean(0)
    rows /= np.sqrt(np.square(rows).mean())
    return LogisticRegression(max_iter=1000).fit(rows, sides).coef_[0]


def lda(positive_PxD: Array, negative_PxD: Array) -> Array:
    """Linear discriminant analysis: scikit-learn's (shrinkage="auto"), without its [D, D] matrices.

    Each side has a Ledoit-Wolf covariance of its own, of coordinates scaled to unit variance; Σ is
    their mean, weighted by rows.
    """
    sides = positive_PxD, negative_PxD
    total, diagonal_D, parts = sum(map(len, sides)), np.zeros(positive_PxD.shape[1]), []
    for side_nxD in sides:
        rows_nxD = side_nxD - side_nxD.mean(0)
        scale_D = rows_nxD.std(0)
        scale_D = np.where(scale_D > 0, scale_D, 1.0)
        shrinkage, ridge = _ledoit_wolf(rows_nxD / scale_D)
        diagonal_D += len(rows_nxD) / total * ridge * np.square(scale_D)
        parts.append(np.sqrt((1 - shrinkage) / total) * rows_nxD)
    return _solve(diagonal_D, np.concatenate(parts), mean_difference(*sides))


def whitened(positive_PxD: Array, negative_PxD: Array) -> Array:
    """Σ⁻¹ (μ⁺ − μ⁻), Σ the Ledoit-Wolf covariance of all rows about their own side's mean."""
    sides = positive_PxD, negative_PxD
    rows_nxD = np.concatenate([side_PxD - side_PxD.mean(0) for side_PxD in sides])
    shrinkage, ridge = _ledoit_wolf(rows_nxD)
    rows_nxD *= np.sqrt((1 - shrinkage) / len(rows_nxD))
    return _solve(np.full(rows_nxD.shape[1], ridge), rows_nxD, mean_difference(*sides))


def _ledoit_wolf(rows_nxD: Array) -> tuple[float, float]:
    """(s, r) of the covariance (1 − s) XᵀX/n + r·I of centred rows, by Ledoit and Wolf (2004).

    Traces of [D, D] matrices are taken from the [n, n] one.
    """
    n, D = rows_nxD.shape
    gram_nxn = rows_nxD @ rows_nxD.T / n
    mean, squared = np.trace(gram_nxn) / D, np.square(gram_nxn).sum()
    noise = np.square(np.diag(gram_nxn)).sum() - squared / n
    spread = squared - D * mean**2
    shrinkage = min(noise, spread) / spread if spread > 0 else 1.0
    shrinkage = max(shrinkage, _LEAST)
    return float(shrinkage), float(shrinkage * mean)


def _solve(diagonal_D: Array, rows_nxD: Array, target_D: Array) -> Array:
    """(diag + XᵀX)⁻¹ target, in the space of the rows (Woodbury)."""
    if not diagonal_D.all():  # rows without any spread
        return target_D
    scaled_nxD = rows_nxD / diagonal_D
    import scipy.linalg

    inner_nxn = np.eye(len(rows_nxD)) + scaled_nxD @ rows_nxD.T
    along_n = scipy.linalg.solve(inner_nxn, scaled_nxD @ target_D, assume_a="pos")
    return target_D / diagonal_D - scaled_nxD.T @ along_n
