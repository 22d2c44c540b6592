"""Reads the residual stream at chosen positions, all layers at once, batch by batch.

Only [N, B, D] at the chosen positions leaves the forward pass, and stays on the device.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from reptune_jax import mesh as meshes
from reptune_jax.console import say, watched
from reptune_jax.hub import templates
from reptune_jax.hub.side_files import public_name
from reptune_jax.lm import Model
from reptune_jax.model.padding import batches_by_length, pad
from reptune_jax.model.read import read_at_once
from reptune_jax.vectors import methods, quality
from reptune_jax.vectors.methods import METHODS, Rows
from reptune_jax.vectors.steering_vector import SteeringVector

_MOST_BYTES = 2**30  # of rows that are kept for the sake of stability and AUROC alone


class Span(NamedTuple):
    """Token ids and the [start, stop) tokens whose residuals are averaged."""

    ids: list[int]
    start: int
    stop: int
    answer: int = 0  # where the answer in it begins; 0: all of it says what its side is about
    cluster: str = ""  # pairs of one cluster are held out together; "": the pair is alone


def make_vector(
    model: Model,
    positives: Sequence[Span],
    negatives: Sequence[Span],
    method: str,
    meta: dict[str, Any],
    batch_size: int = 16,
    nuisance_NxD: np.ndarray | None = None,
) -> SteeringVector:
    """One pass over matched pairs, folded as they are read, for one of `METHODS`.

    What lies along `nuisance_NxD` (of any length, 0 where nothing is to go) is removed from what is
    read, before anything else. `meta["quality"]` is what `quality` makes of the rows, which are
    kept on the host for it while they have at most 1 GiB.

    Raises:
      ValueError: pairs whose sides are the same up to what is read; residuals that are not finite.
    """
    _check_contrast(positives, negatives)
    N, D, both = model.arch.N, model.arch.D, (positives, negatives)
    small = 8 * N * len(positives) * D <= _MOST_BYTES
    if not small:
        say("vector: the rows have more than 1 GiB, so stability and AUROC are not computed.")
    kept = methods.init(N, D, nuisance_NxD, rows=small or METHODS[method].of_rows)
    longest = [max(len(p.ids), len(n.ids)) for p, n in zip(*both, strict=True)]
    batches = batches_by_length(longest, batch_size)
    finite = []  # stays on the device, like the sums
    for rows in watched(batches, "reading residuals"):
        sides = [read_batch(model, [side[r] for r in rows], batch_size) for side in both]
        finite.append(_finite(*sides))
        kept = methods.add(kept, *sides)
    read = np.concatenate([meshes.fetch(ok_B) for ok_B in finite])
    order_P = np.argsort([r for rows in batches for r in rows])
    model.check_finite(read[order_P], "pairs")
    rows_of = None if kept.rows is None else Rows(meshes.fetch(kept.rows), order_P)
    about = {
        "model": public_name(model.name),
        "model_sha": model.sha,
        "model_type": model.config["model_type"],
        "template": templates.template_sha(model.tokenizer),
        "data_sha": hashlib.sha256(json.dumps(both).encode()).hexdigest()[:16],
    }
    vector = methods.finish(kept, rows_of, method, about | meta)
    clusters = [span.cluster or i for i, span in enumerate(positives)]
    measured = quality.measure(model, vector, both, rows_of if small else None, clusters)
    return dataclasses.replace(vector, meta=vector.meta | {"quality": measured})


def _check_contrast(positives: Sequence[Span], negatives: Sequence[Span]) -> None:
    """Attention is causal: sides that are the same so far have the same residuals."""
    pairs = list(zip(positives, negatives, strict=True))
    same = [i for i, (p, n) in enumerate(pairs) if _as_read(p) == _as_read(n)]
    if same:
        raise ValueError(
            f"pairs: got the same tokens on both sides, up to where they are read, in {len(same)} "
            f"of {len(pairs)} (number {', '.join(map(str, same[:8]))}"
            f"{', …' if len(same) > 8 else ''}, from 0), expected sides that differ. Drop them, "
            "or read a position behind the difference."
        )
    first = sum(span.start == 0 for pair in pairs for span in pair)
    if first:
        say(
            f"pairs: {first} of {2 * len(pairs)} texts are read at their first token, whose "
            "residual is long whatever it says: norms, and doses of a unit vector, will be too "
            "large. Give longer texts, or another position."
        )


def _as_read(span: Span) -> tuple[int, list[int]]:
    return span.start, span.ids[: span.stop]


@jax.jit
def _finite(positive_NxBxD: jax.Array, negative_NxBxD: jax.Array) -> jax.Array:
    both = jnp.isfinite(positive_NxBxD) & jnp.isfinite(negative_NxBxD)
    return both.all(axis=(0, 2))


def read_batch(model: Model, spans: Sequence[Span], rows: int) -> jax.Array:
    """Each span's mean residual at every layer, float32 [N, len(spans), D]; padded to `rows`."""
    prefix, P = model.split_prefix([s.ids for s in spans], min(s.start for s in spans))
    tokens, mask = pad([s.ids[P:] for s in spans], model.pad_id, left=False, rows=rows)
    weight_BxPxT = np.zeros((len(tokens), 1, tokens.shape[1]), np.float32)
    for b, s in enumerate(spans):
        weight_BxPxT[b, 0, s.start - P : s.stop - P] = 1 / (s.stop - s.start)
    tokens, mask, weight_BxPxT = meshes.put_rows((tokens, mask, weight_BxPxT), model.mesh)
    inputs = model.decoder, model.params, tokens, mask, prefix
    found = read_at_once(*inputs, hidden=False, read_BxPxT=weight_BxPxT)
    return found.mean_NxBxPxD[:, : len(spans), 0]
