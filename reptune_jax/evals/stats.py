"""Statistics for paired, clustered evaluation results, in numpy and scipy only.

Items come in clusters (a question's templates, orders and twins) and tuned arms in several seeds.
Every seed is tested on the same items, so clusters and seeds are resampled as crossed factors (the
pigeonhole bootstrap, Owen 2007): resampling the items anew within each seed would divide their
variance by the number of seeds.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

Array = NDArray[Any]

DRAWS = 10_000
_CHUNK = 2_000  # bootstrap draws held in float64 at once


@dataclasses.dataclass(frozen=True)
class Interval:
    """A point estimate, its percentile interval, and what it was computed from."""

    estimate: float
    low: float
    high: float
    n: int = 0
    n_clusters: int = 0
    n_seeds: int = 1

    def excludes(self, value: float = 0.0) -> bool:
        """True if the whole interval lies on one side of `value`."""
        return self.low > value or self.high < value


def auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """P(score of a positive > of a negative) + half the ties; nan without both classes."""
    scores_I, labels_I = np.asarray(scores, float), np.asarray(labels).astype(bool)
    n_pos, n_neg = int(labels_I.sum()), int((~labels_I).sum())
    if n_pos == 0 or n_neg == 0:
        return math.nan
    if np.isnan(scores_I).any():
        return math.nan
    _, place_I, ties = np.unique(scores_I, return_inverse=True, return_counts=True)
    ranks_I = (np.cumsum(ties) - (ties - 1) / 2)[place_I]
    return float((ranks_I[labels_I].sum() - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg))


def dprime_c(hits: Array, n_pos: Array, fas: Array, n_neg: Array) -> tuple[Array, Array]:
    """Sensitivity d' = z(H) - z(FA) and criterion c = -(z(H) + z(FA))/2, rates (k + .5)/(n + 1)."""
    z_hit = special.ndtri((hits + 0.5) / (n_pos + 1))
    z_fa = special.ndtri((fas + 0.5) / (n_neg + 1))
    return z_hit - z_fa, -(z_hit + z_fa) / 2


def holm(p_values: ArrayLike) -> Array:
    """Holm step-down adjusted p-values, in the order given."""
    p = np.asarray(p_values, float)
    order = np.argsort(p, kind="stable")
    adjusted = np.minimum(1.0, np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order]))
    result = np.empty_like(adjusted)
    result[order] = adjusted
    return result


def cohen_dz(deltas: ArrayLike) -> float:
    """Paired effect, mean over SD (n - 1); 0 if nothing moved, nan if all moved alike."""
    deltas_I = np.asarray(deltas, float)
    if len(deltas_I) < 2:
        return math.nan
    mean, sd = float(deltas_I.mean()), float(deltas_I.std(ddof=1))
    if sd > 1e-12 * max(1.0, abs(mean)):
        return mean / sd
    return 0.0 if mean == 0 else math.nan


def negative_response_rate(deltas: ArrayLike, sign: int = 1) -> float:
    """Share of items that moved against the intended direction `sign`."""
    deltas_I = np.asarray(deltas, float)
    return float((sign * deltas_I < 0).mean()) if len(deltas_I) else math.nan


def non_inferiority(loss: Interval, margin: float) -> str:
    """Verdict on a loss (higher is worse): is the whole interval below, or above, the margin?"""
    if loss.high < margin:
        return "non-inferior"
    return "inferior" if loss.low > margin else "inconclusive"


def bootstrap_mean(
    values: ArrayLike,
    clusters: ArrayLike,
    seeds: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    *,
    draws: int = DRAWS,
    level: float = 0.95,
    rng_seed: int = 0,
) -> Interval:
    """Mean (or ratio Σwx/Σw) of per-row values, clusters and, if several, seeds resampled.

    Pass paired differences for the interval of a mean difference. Rows with nan are dropped.
    """
    values_I = np.asarray(values, float)
    weights_I = np.ones_like(values_I) if weights is None else np.asarray(weights, float)
    keep = np.isfinite(values_I)
    cells = _Cells.of(clusters, seeds, keep)
    if cells is None:
        return Interval(math.nan, math.nan, math.nan)
    num_SxC = cells.total((values_I * weights_I)[keep])
    den_SxC = cells.total(weights_I[keep])

    def statistic(w_RxC: Array, u_RxS: Array) -> Array:
        num_R = ((w_RxC @ num_SxC.T) * u_RxS).sum(1)
        return _ratio(num_R, ((w_RxC @ den_SxC.T) * u_RxS).sum(1))

    return cells.interval(statistic, draws, level, rng_seed)


def bootstrap_of_means(
    values_IxK: ArrayLike,
    statistic: Callable[[Array], Array],
    clusters: ArrayLike,
    seeds: ArrayLike | None = None,
    *,
    draws: int = DRAWS,
    level: float = 0.95,
    rng_seed: int = 0,
) -> Interval:
    """statistic(means [R, K]) -> [R] of K values a row, resampled as in `bootstrap_mean`.

    E.g. a ratio of two means. Rows with any nan are dropped, and so are draws that give one.
    """
    values = np.asarray(values_IxK, float)
    keep = np.isfinite(values).all(1)
    cells = _Cells.of(clusters, seeds, keep)
    if cells is None:
        return Interval(math.nan, math.nan, math.nan)
    sums_KxSxC = np.stack([cells.total(column) for column in values[keep].T])
    count_SxC = cells.total(np.ones(int(keep.sum())))

    def of_means(w_RxC: Array, u_RxS: Array) -> Array:
        n_R = ((w_RxC @ count_SxC.T) * u_RxS).sum(1)
        each = [((w_RxC @ sums_SxC.T) * u_RxS).sum(1) for sums_SxC in sums_KxSxC]
        return statistic(np.stack([_ratio(sum_R, n_R) for sum_R in each], axis=1))

    return cells.interval(of_means, draws, level, rng_seed)


def chance_cosine(width: int, level: float = 0.999, tries: int = 1) -> float:
    """The |cos| with a fixed direction that the best of `tries` random ones stays under.

    cos^2 of a random direction is Beta(1/2, (width - 1)/2); `level` is the probability.
    """
    each = level ** (1 / tries)
    return float(np.sqrt(special.betaincinv(0.5, (width - 1) / 2, each)))


def bootstrap_auroc(
    scores: ArrayLike,
    labels: ArrayLike,
    clusters: ArrayLike,
    seeds: ArrayLike | None = None,
    other: ArrayLike | None = None,
    *,
    draws: int = DRAWS,
    level: float = 0.95,
    rng_seed: int = 0,
) -> Interval:
    """AUROC, averaged over seeds; with `other` (same rows), the paired difference to its AUROC."""
    scores_I, labels_I = np.asarray(scores, float), np.asarray(labels, float)
    other_I = None if other is None else np.asarray(other, float)
    keep = np.isfinite(scores_I) & np.isfinite(labels_I)
    keep &= True if other_I is None else np.isfinite(other_I)
    cells = _Cells.of(clusters, seeds, keep)
    if cells is None:
        return Interval(math.nan, math.nan, math.nan)
    forms = [_pair_forms(cells, scores_I[keep], labels_I[keep])]
    if other_I is not None:
        forms.append(_pair_forms(cells, other_I[keep], labels_I[keep]))

    def statistic(w_RxC: Array, u_RxS: Array) -> Array:
        aurocs = [_weighted_auroc(w_RxC, form) for form in forms]
        values_RxS = aurocs[0] - aurocs[1] if len(aurocs) == 2 else aurocs[0]
        return (values_RxS * u_RxS).sum(1) / u_RxS.sum(1)

    return cells.interval(statistic, draws, level, rng_seed)


def bootstrap_dprime(
    says_yes: ArrayLike,
    labels: ArrayLike,
    clusters: ArrayLike,
    seeds: ArrayLike | None = None,
    *,
    draws: int = DRAWS,
    level: float = 0.95,
    rng_seed: int = 0,
) -> tuple[Interval, Interval]:
    """Intervals of d' and of the criterion c, from counts pooled over seeds."""
    yes_I, labels_I = np.asarray(says_yes, float), np.asarray(labels, float)
    keep = np.isfinite(yes_I) & np.isfinite(labels_I)
    cells = _Cells.of(clusters, seeds, keep)
    if cells is None:
        nothing = Interval(math.nan, math.nan, math.nan)
        return nothing, nothing
    yes_I, labels_I = yes_I[keep], labels_I[keep]
    parts = [yes_I * labels_I, labels_I, yes_I * (1 - labels_I), 1 - labels_I]
    counts = [cells.total(part) for part in parts]

    def statistic(which: int, w_RxC: Array, u_RxS: Array) -> Array:
        return dprime_c(*(((w_RxC @ n_SxC.T) * u_RxS).sum(1) for n_SxC in counts))[which]

    dprime, c = (
        cells.interval(functools.partial(statistic, which), draws, level, rng_seed)
        for which in (0, 1)
    )
    return dprime, c


def sign_flip_p(
    deltas: ArrayLike, clusters: ArrayLike, *, draws: int = DRAWS, rng_seed: int = 0
) -> float:
    """Two-sided sign-flip permutation p of a mean paired difference; a cluster flips as one.

    Exact when all 2^clusters sign patterns fit into `draws`. It treats the checkpoints as given:
    variation between training seeds is in the bootstrap interval, not here.
    """
    deltas_I = np.asarray(deltas, float)
    keep = np.isfinite(deltas_I)
    cells = _Cells.of(clusters, None, keep)
    if cells is None:
        return math.nan
    sums_C = cells.total(deltas_I[keep])[0]
    observed = abs(sums_C.sum()) * (1 - 1e-12)
    C = len(sums_C)
    if draws >= 2**C:
        bits = (np.arange(2**C)[:, None] >> np.arange(C)) & 1
        return float((np.abs((2 * bits - 1) @ sums_C) >= observed).mean())
    rng = np.random.default_rng(rng_seed)
    extreme = 0
    for start in range(0, draws, _CHUNK):
        flips = rng.integers(0, 2, (min(_CHUNK, draws - start), C), dtype=np.int8)
        extreme += int((np.abs((2 * flips - 1) @ sums_C) >= observed).sum())
    return (1 + extreme) / (1 + draws)


@dataclasses.dataclass(frozen=True)
class _Cells:
    """Rows as (seed, cluster) cells, and resampling over both."""

    seed_I: Array
    cluster_I: Array
    S: int
    C: int

    @classmethod
    def of(cls, clusters: ArrayLike, seeds: ArrayLike | None, keep: Array) -> "_Cells | None":
        if not keep.any():
            return None
        names, cluster_I = np.unique(np.asarray(clusters)[keep], return_inverse=True)
        if seeds is None:
            return cls(np.zeros(len(cluster_I), int), cluster_I, 1, len(names))
        seed_names, seed_I = np.unique(np.asarray(seeds)[keep], return_inverse=True)
        return cls(seed_I, cluster_I, len(seed_names), len(names))

    def total(self, values_I: Array) -> Array:
        """Sums of the rows' values per cell, [S, C]."""
        flat = np.bincount(self.seed_I * self.C + self.cluster_I, values_I, self.S * self.C)
        return flat.reshape(self.S, self.C)

    def interval(self, statistic: Any, draws: int, level: float, rng_seed: int) -> Interval:
        """Percentile interval of statistic(cluster counts [R, C], seed counts [R, S]) -> [R]."""
        estimate = float(statistic(np.ones((1, self.C)), np.ones((1, self.S)))[0])
        w_RxC = _counts(self.C, draws, rng_seed)
        u_RxS = _counts(self.S, draws, rng_seed + 1)
        chunks = [
            statistic(w_RxC[i : i + _CHUNK].astype(float), u_RxS[i : i + _CHUNK].astype(float))
            for i in range(0, draws, _CHUNK)
        ]
        drawn = np.concatenate(chunks)
        drawn = drawn[np.isfinite(drawn)]
        tail = (1 - level) / 2
        low, high = np.quantile(drawn, [tail, 1 - tail]) if len(drawn) else (math.nan, math.nan)
        n = len(self.cluster_I)
        return Interval(estimate, float(low), float(high), n, self.C, self.S)


@functools.lru_cache(maxsize=8)
def _counts(n: int, draws: int, rng_seed: int) -> Array:
    """How often each of n units is drawn in each resample, [draws, n]."""
    rng = np.random.default_rng(rng_seed)
    return rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(np.uint16)


def _pair_forms(cells: _Cells, scores_I: Array, labels_I: Array) -> list[tuple[Array, ...]]:
    """Per seed: wins_CxC (row cluster's positives over column's negatives), n_pos_C, n_neg_C."""
    forms: list[tuple[Array, ...]] = []
    for s in range(cells.S):
        pos, neg = ((cells.seed_I == s) & (labels_I == y) for y in (1, 0))
        diff_PxQ = scores_I[pos][:, None] - scores_I[neg][None, :]
        wins_PxQ = (np.sign(diff_PxQ) + 1) / 2
        eye = np.eye(cells.C)
        pos_PxC, neg_QxC = eye[cells.cluster_I[pos]], eye[cells.cluster_I[neg]]
        forms.append((pos_PxC.T @ wins_PxQ @ neg_QxC, pos_PxC.sum(0), neg_QxC.sum(0)))
    return forms


def _weighted_auroc(w_RxC: Array, forms: list[tuple[Array, ...]]) -> Array:
    columns = [
        _ratio(((w_RxC @ wins_CxC) * w_RxC).sum(1), (w_RxC @ pos_C) * (w_RxC @ neg_C))
        for wins_CxC, pos_C, neg_C in forms
    ]
    return np.stack(columns, axis=1)


def _ratio(num: Array, den: Array) -> Array:
    return np.divide(num, den, out=np.full_like(num, np.nan), where=den > 0)
