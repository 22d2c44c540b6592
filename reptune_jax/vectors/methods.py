"""Vector methods: what a pass over the pairs keeps, and how that becomes a direction per layer.

The pass is a fold (`init`, `add`, `finish`) over batches of residuals. It keeps sums on the device,
and where they are needed, or small, the rows themselves on the host, where directions are made. A
new method is an entry of `METHODS`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from reptune_jax import mesh as meshes
from reptune_jax.vectors import directions
from reptune_jax.vectors.directions import Array
from reptune_jax.vectors.steering_vector import SteeringVector

_NOTHING = 1e-5  # of a difference, left of it without the nuisance: rounding


class Method(NamedTuple):
    """A direction of one layer's rows, of any length: `finish` gives it the mean difference's."""

    direction: Callable[[Array, Array], Array]  # (positive_PxD, negative_PxD), float64
    of_rows: bool = True  # False: the sums are enough
    vote: bool = False  # the sign is that of most pairs; else positive less negative


METHODS = {
    "mean_diff": Method(directions.mean_difference, of_rows=False),
    "pca": Method(directions.first_component, vote=True),
    "pca_center": Method(directions.first_component, vote=True),  # the same, by repeng's name
    "logistic": Method(directions.logistic),
    "lda": Method(directions.lda),
    "whitened": Method(directions.whitened),
}


class Sums(NamedTuple):
    """What the mean difference and its quality need."""

    pairs: jax.Array
    positive_NxD: jax.Array
    negative_NxD: jax.Array
    norm_N: jax.Array
    unit_difference_NxD: jax.Array


class Kept(NamedTuple):
    """What a pass keeps; `nuisance_NxD` is of length 1, or 0 at layers where nothing is removed."""

    sums: Sums
    nuisance_NxD: jax.Array | None
    rows: list[Any] | None  # of each batch, (positive_NxBxD, negative_NxBxD)


class Rows(NamedTuple):
    """Every pair's residuals, the nuisance removed."""

    batches: list[Any]  # (positive_NxBxD, negative_NxBxD)
    order_P: Array  # sorts the pairs as they were read into the order that they were given in

    def layer(self, l: int) -> tuple[Array, Array]:
        """(positive_PxD, negative_PxD) of one layer, float64."""
        found = []
        for side in (0, 1):
            rows_PxD = np.concatenate([batch[side][l] for batch in self.batches])
            found.append(rows_PxD[self.order_P].astype(np.float64))
        return found[0], found[1]


def init(N: int, D: int, nuisance_NxD: Array | None = None, rows: bool = True) -> Kept:
    """Nothing yet; with `rows`, they are kept too, and not only sums."""
    zeros_NxD = jnp.zeros((N, D))
    sums = Sums(jnp.int32(0), zeros_NxD, zeros_NxD, jnp.zeros(N), zeros_NxD)
    u_NxD = None if nuisance_NxD is None else jnp.asarray(unit_rows(nuisance_NxD), jnp.float32)
    return Kept(sums, u_NxD, [] if rows else None)


def unit_rows(rows_NxD: Array) -> Array:
    """At length 1, float64; rows of zeros stay."""
    rows_NxD = np.asarray(rows_NxD, np.float64)
    norm_Nx1 = np.linalg.norm(rows_NxD, axis=1, keepdims=True)
    return rows_NxD / np.where(norm_Nx1 > 0, norm_Nx1, 1)


def add(kept: Kept, positive_NxBxD: jax.Array, negative_NxBxD: jax.Array) -> Kept:
    """Folds matched pairs in."""
    sums, *sides = _add(kept.sums, kept.nuisance_NxD, positive_NxBxD, negative_NxBxD)
    if kept.rows is not None:
        if kept.rows:  # one batch late: meanwhile the device goes on
            kept.rows[-1] = meshes.fetch(kept.rows[-1])
        kept.rows.append(tuple(sides))
    return kept._replace(sums=sums)


@jax.jit
def _add(
    sums: Sums, nuisance_NxD: Any, positive_NxBxD: jax.Array, negative_NxBxD: jax.Array
) -> tuple[Sums, jax.Array, jax.Array]:
    """The sums with these pairs, and the pairs without the nuisance."""
    sides = [positive_NxBxD, negative_NxBxD]
    if nuisance_NxD is not None:
        u_Nx1xD = nuisance_NxD[:, None]
        sides = [side - (side * u_Nx1xD).sum(-1, keepdims=True) * u_Nx1xD for side in sides]
    difference = sides[0] - sides[1]
    length = jnp.linalg.norm(difference, axis=-1, keepdims=True)
    norms_NxB = jnp.linalg.norm(jnp.concatenate([positive_NxBxD, negative_NxBxD], 1), axis=-1)
    sums = Sums(
        sums.pairs + positive_NxBxD.shape[1],
        sums.positive_NxD + positive_NxBxD.sum(1),
        sums.negative_NxD + negative_NxBxD.sum(1),
        sums.norm_N + norms_NxB.sum(1) / 2,
        sums.unit_difference_NxD + (difference / jnp.maximum(length, 1e-8)).sum(1),
    )
    return sums, sides[0], sides[1]


def finish(kept: Kept, rows: Rows | None, method: str, meta: dict[str, Any]) -> SteeringVector:
    """A direction per layer, as long as the class-mean difference there, so that doses compare.

    `meta["agreement"]` is the mean cosine between two pairs' differences, per layer: near 0 the
    contrast has no common direction and steering with it will be unreliable (arXiv 2505.22637).
    Of one pair it is unknown, None. `meta["sign"]` says what the sign is by, and the share of the
    pairs whose difference has it, None where the rows were not kept.

    Raises:
      ValueError: both means are the same at every layer, or differ along the nuisance only.
    """
    found = meshes.fetch(kept.sums)
    n = int(found.pairs)
    positive, negative = found.positive_NxD / n, found.negative_NxD / n
    squared_N = np.square(found.unit_difference_NxD).sum(1)
    agreement_N = (squared_N - n) / (n * (n - 1)) if n > 1 else [None] * len(squared_N)
    difference_NxD = (positive - negative).astype(np.float32)
    if kept.nuisance_NxD is not None:
        difference_NxD = _without(difference_NxD, meshes.fetch(kept.nuisance_NxD))
    layers = tuple(np.flatnonzero(difference_NxD.any(axis=1)).tolist())
    if not layers:
        raise ValueError(
            f"pairs: got {n} whose positive and negative sides have the same mean at every layer"
            f"{'' if kept.nuisance_NxD is None else ', but for what is projected out'}, "
            "expected a contrast. Read another position, or give pairs that differ before it."
        )
    directions_NxD = difference_NxD
    if METHODS[method].of_rows and rows is not None:
        directions_NxD = _of_rows(METHODS[method], rows, layers, kept, difference_NxD)
    share_N: list[float | None] = [None] * len(directions_NxD)
    if rows is not None:
        for l in layers:
            positive_PxD, negative_PxD = rows.layer(l)
            along_P = (positive_PxD - negative_PxD) @ directions_NxD[l]
            share_N[l] = round(float((along_P > 0).mean()), 4)
    about = {
        **meta,
        "method": method,
        "norm": "raw",
        "pairs": n,
        "operation": "add",
        "hook": "residual stream, output of block l = hidden_states[l+1]",
        "layer_base": 0,
        "agreement": [None if a is None else round(float(a), 4) for a in agreement_N],
        "sign": {"by": "pairs" if METHODS[method].vote else "classes", "share": share_N},
    }
    return SteeringVector(
        directions_NxD=directions_NxD,
        residual_norm_N=(found.norm_N / n).astype(np.float32),
        mean_NxD=((positive + negative) / 2).astype(np.float32),
        layers=layers,
        meta=about,
    )


def _of_rows(
    method: Method, rows: Rows, layers: Sequence[int], kept: Kept, difference_NxD: Array
) -> Array:
    """The method's direction at each of `layers`, as long as the difference there."""
    found_NxD = np.zeros(difference_NxD.shape)
    for l in layers:
        found_NxD[l] = directed(method, *rows.layer(l))
    if kept.nuisance_NxD is not None:
        found_NxD = _without(found_NxD, meshes.fetch(kept.nuisance_NxD))
    length_Nx1 = np.linalg.norm(difference_NxD, axis=1, keepdims=True)
    return (unit_rows(found_NxD) * length_Nx1).astype(np.float32)


def directed(method: Method, positive_PxD: Array, negative_PxD: Array) -> Array:
    """The method's direction of these rows, from the negative side to the positive one."""
    direction_D = method.direction(positive_PxD, negative_PxD)
    if method.vote:
        along_P = (positive_PxD - negative_PxD) @ direction_D
        if (np.sign(along_P).sum() or along_P.sum()) < 0:  # a tie: by the mean difference
            return -direction_D
    return direction_D


def _without(rows_NxD: Array, nuisance_NxD: Array) -> Array:
    """Each layer's row less its part along the nuisance; 0 where that leaves rounding only."""
    u_NxD, rows_NxD = unit_rows(nuisance_NxD), rows_NxD.astype(np.float64)
    left_NxD = rows_NxD - (rows_NxD * u_NxD).sum(1, keepdims=True) * u_NxD
    before, after = (np.linalg.norm(x, axis=1, keepdims=True) for x in (rows_NxD, left_NxD))
    return np.where(after > _NOTHING * before, left_NxD, 0).astype(np.float32)
