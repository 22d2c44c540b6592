"""Reads the residual stream at chosen positions, all layers at once, batch by batch.

Only [N, B, D] at the chosen positions leaves the forward pass; sums are kept on the device.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from reptune_jax import mesh as meshes
from reptune_jax.lm import Model, batches_by_length, pad
from reptune_jax.model.prefix import apply_after
from reptune_jax.model.transformer import Decoder, collect


class Span(NamedTuple):
    """Token ids and the [start, stop) tokens whose residuals are averaged."""

    ids: list[int]
    start: int
    stop: int


def read_batch(model: Model, spans: Sequence[Span], rows: int) -> jax.Array:
    """Each span's mean residual at every layer, float32 [N, len(spans), D]; padded to `rows`."""
    prefix, P = model.split_prefix([s.ids for s in spans], min(s.start for s in spans))
    tokens, mask = pad([s.ids[P:] for s in spans], model.pad_id, left=False, rows=rows)
    weight_Bx1xT = np.zeros((len(tokens), 1, tokens.shape[1]), np.float32)
    for b, s in enumerate(spans):
        weight_Bx1xT[b, 0, s.start - P : s.stop - P] = 1 / (s.stop - s.start)
    batch = meshes.put_rows((tokens, mask, weight_Bx1xT), model.mesh)
    return _read(model.decoder, model.params, prefix, *batch)[:, : len(spans)]


class Sums(NamedTuple):
    """What the mean difference and its quality need; running sums over pairs, on the device."""

    pairs: int
    positive_NxD: jax.Array
    negative_NxD: jax.Array
    norm_N: jax.Array
    unit_difference_NxD: jax.Array

    def add(self, positive_NxBxD: jax.Array, negative_NxBxD: jax.Array) -> "Sums":
        return Sums(
            self.pairs + positive_NxBxD.shape[1], *_add(self[1:], positive_NxBxD, negative_NxBxD)
        )


def sum_pairs(
    model: Model, positives: Sequence[Span], negatives: Sequence[Span], batch_size: int = 16
) -> Sums:
    """One pass over matched pairs, whose difference is taken before anything is summed."""
    zeros_NxD = jnp.zeros((model.arch.N, model.arch.D))
    sums = Sums(0, zeros_NxD, zeros_NxD, jnp.zeros(model.arch.N), zeros_NxD)
    longest = [max(len(p.ids), len(n.ids)) for p, n in zip(positives, negatives, strict=True)]
    batches = list(batches_by_length(longest, batch_size))
    for rows in tqdm(batches, desc="reading residuals", delay=2, leave=False):
        sums = sums.add(
            read_batch(model, [positives[r] for r in rows], batch_size),
            read_batch(model, [negatives[r] for r in rows], batch_size),
        )
    return sums


@partial(jax.jit, static_argnames=("decoder",))
def _read(decoder: Decoder, params, prefix, tokens_BxT, mask_BxT, weight_Bx1xT):
    _, sown = apply_after(
        decoder,
        params,
        prefix,
        tokens_BxT,
        mask_BxT,
        read_BxPxT=weight_Bx1xT,
        mutable=["intermediates"],
    )
    return collect(sown["intermediates"], decoder.segments, "read")[:, :, 0]


@jax.jit
def _add(sums, positive_NxBxD, negative_NxBxD):
    positive_NxD, negative_NxD, norm_N, unit_NxD = sums
    difference = positive_NxBxD - negative_NxBxD
    length = jnp.linalg.norm(difference, axis=-1, keepdims=True)
    norms_NxB = jnp.linalg.norm(jnp.concatenate([positive_NxBxD, negative_NxBxD], 1), axis=-1)
    return (
        positive_NxD + positive_NxBxD.sum(1),
        negative_NxD + negative_NxBxD.sum(1),
        norm_N + norms_NxB.sum(1) / 2,
        unit_NxD + (difference / jnp.maximum(length, 1e-8)).sum(1),
    )
