"""Whether steering with a vector is likely to work, as cheaply as extraction can tell.

All of it goes by layer. What predicts reliability: agreement of the pairs' differences and
separation along the vector (arXiv 2505.22637), and what the logit lens reads in it (2604.15557).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from reptune_jax import mesh as meshes
from reptune_jax.lm import Model
from reptune_jax.model.transformer import Decoder
from reptune_jax.vectors.directions import Array
from reptune_jax.vectors.lens import as_residuals, lens_logits
from reptune_jax.vectors.methods import METHODS, Method, Rows, directed
from reptune_jax.vectors.steering_vector import SteeringVector

FOLDS, DRAWS = 5, 100
_SHOWN = 32  # layers in a table; of more, the best
_BEST = 12


def measure(
    model: Model,
    vector: SteeringVector,
    sides: tuple[Sequence[Any], Sequence[Any]],
    rows: Rows | None,
    clusters: Sequence[Any],
) -> dict[str, list[float | None]]:
    """By layer; None where there is no direction, or the number is unknown.

    length: the vector's, in mean residual norms. lens: how far its logit lens favours the positive
    answers' tokens. stability: mean cosine between the mean difference and those of 100 bootstrap
    resamples of the pairs; noise alone has about .71. auroc: of the projections of held-out pairs
    on the direction that the method makes of the others, mean over 5 folds. Both take a cluster's
    pairs together, and are unknown with one cluster or without `rows`.
    """
    N, names = len(vector.directions_NxD), list(dict.fromkeys(clusters))
    found: dict[str, list[float | None]]
    found = {key: [None] * N for key in ("stability", "auroc", "length", "lens")}
    for l in vector.layers:
        length = np.linalg.norm(vector.directions_NxD[l]) / max(vector.residual_norm_N[l], 1e-30)
        found["length"][l] = _rounded(length)
    for l, score in zip(vector.layers, _lens_scores(model, vector, *sides), strict=False):
        found["lens"][l] = _rounded(score)
    cluster_P = np.array([names.index(name) for name in clusters])
    if rows is None or len(names) < 2:
        return found
    for l in vector.layers:
        positive_PxD, negative_PxD = rows.layer(l)
        found["stability"][l] = _stability(positive_PxD - negative_PxD, cluster_P)
        method = METHODS[vector.meta["method"]]
        found["auroc"][l] = _held_out(method, positive_PxD, negative_PxD, cluster_P % FOLDS)
    return found


def _stability(difference_PxD: Array, cluster_P: Array) -> float:
    C = int(cluster_P.max()) + 1
    counts_RxC = np.random.default_rng(0).multinomial(C, np.full(C, 1 / C), size=DRAWS)
    drawn_RxD, all_D = counts_RxC[:, cluster_P] @ difference_PxD, difference_PxD.sum(0)
    lengths_R = np.linalg.norm(drawn_RxD, axis=1) * np.linalg.norm(all_D)
    return _rounded((drawn_RxD @ all_D / np.maximum(lengths_R, 1e-30)).mean())


def _held_out(method: Method, positive_PxD: Array, negative_PxD: Array, fold_P: Array) -> float:
    """Within each fold, P(a positive row projects further than a negative one); ties are half."""
    found, weights = [], []
    for fold in np.unique(fold_P):
        out_P = fold_P == fold
        direction_D = directed(method, positive_PxD[~out_P], negative_PxD[~out_P])
        positive, negative = (side[out_P] @ direction_D for side in (positive_PxD, negative_PxD))
        found.append((1 + np.sign(positive[:, None] - negative)).mean() / 2)
        weights.append(out_P.sum())
    return _rounded(np.average(found, weights=weights))


def _lens_scores(
    model: Model, vector: SteeringVector, positives: Sequence[Any], negatives: Sequence[Any]
) -> Array:
    """How far the vector's logit lens favours the positive answers' tokens, at each of its layers.

    The mean over pairs of the mean logit of the positive answer's tokens less that of the negative
    answer's, in standard deviations over the vocabulary; the logits are those of the final norm of
    the vector alone. Nothing where both sides' answers have the same tokens, as often.
    """
    weight_V = np.zeros(model.arch.V)
    for sign, side in ((1, positives), (-1, negatives)):
        for span in side:
            answer = span.ids[span.answer :]
            np.add.at(weight_V, answer, sign / len(answer) / len(side))
    tokens = np.flatnonzero(np.abs(weight_V) > 1e-9)
    if not len(tokens):
        return np.empty(0)
    at = list(vector.layers)
    hidden_LxD = as_residuals(vector)[at]
    weights = weight_V[tokens].astype(np.float32)
    return meshes.fetch(_lens(model.decoder, model.params, hidden_LxD, tokens, weights))


@partial(jax.jit, static_argnames=("decoder",))
def _lens(
    decoder: Decoder, params: Any, hidden_LxD: jax.Array, tokens: jax.Array, weights: jax.Array
) -> jax.Array:
    logits_LxV = lens_logits(decoder, params, hidden_LxD)
    deviation_L = jnp.maximum(logits_LxV.std(-1), 1e-30)
    return (logits_LxV[:, tokens] * weights).sum(-1) / deviation_L


def _rounded(value: Any) -> float:
    return round(float(value), 4)


def table(vector: SteeringVector) -> str:
    """What is known of a new vector, a line per layer, and a hint: its best layers."""
    about = vector.meta
    columns = {
        "agreement": about["agreement"],
        "stability": about["quality"]["stability"],
        "AUROC": about["quality"]["auroc"],
        "|v|/|h|": about["quality"]["length"],
        "pairs +": about["sign"]["share"],
        "lens": about["quality"]["lens"],
    }

    def rank(l: int) -> tuple[float, float]:
        known = (columns[name][l] for name in ("AUROC", "agreement"))
        auroc, agreement = (-1.0 if value is None else value for value in known)
        return -auroc, -agreement

    best = sorted(vector.layers, key=rank)
    shown = vector.layers if len(vector.layers) <= _SHOWN else sorted(best[:_BEST])
    lines = ["".join(f"{name:>11}" for name in ("layer", *columns))]
    for l in shown:
        cells = (
            "-" if row[l] is None else f"{row[l]:.{3 if '|h|' in name else 2}f}"
            for name, row in columns.items()
        )
        lines.append("".join(f"{cell:>11}" for cell in (str(l), *cells)))
    lines.append(
        f"best by AUROC, then agreement: layers {', '.join(map(str, best[:3]))}; a hint, the sweep "
        "of doses decides. Where agreement is near 0, steering is unreliable; without any common "
        "direction stability is about .71 and AUROC about .5."
    )
    return "\n".join(lines)
