"""Reads the residual stream at chosen positions, all layers at once, batch by batch.

Only [N, B, D] at the chosen positions leaves the forward pass, and stays on the device.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from reptune_jax import mesh as meshes
from reptune_jax.lm import Model
from reptune_jax.model.padding import batches_by_length, pad
from reptune_jax.model.read import read_at_once
from reptune_jax.vectors.methods import METHODS
from reptune_jax.vectors.steering_vector import SteeringVector


class Span(NamedTuple):
    """Token ids and the [start, stop) tokens whose residuals are averaged."""

    ids: list[int]
    start: int
    stop: int


def make_vector(
    model: Model,
    positives: Sequence[Span],
    negatives: Sequence[Span],
    method: str,
    meta: dict[str, Any],
    batch_size: int = 16,
) -> SteeringVector:
    """One pass over matched pairs, folded by one of `METHODS` as they are read."""
    fold = METHODS[method]
    kept = fold.init(model.arch.N, model.arch.D)
    longest = [max(len(p.ids), len(n.ids)) for p, n in zip(positives, negatives, strict=True)]
    batches = list(batches_by_length(longest, batch_size))
    for rows in tqdm(batches, desc="reading residuals", delay=2, leave=False):
        kept = fold.add(
            kept,
            read_batch(model, [positives[r] for r in rows], batch_size),
            read_batch(model, [negatives[r] for r in rows], batch_size),
        )
    about = {"model": model.name, "model_sha": model.sha}
    return fold.finish(kept, about | meta)


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
