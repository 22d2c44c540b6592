"""Retention text as a run trains on it, with what the base model computes there.

The set is small and fixed, so the base model reads it once; a step then needs one forward less.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from reptune_jax.data import neutral
from reptune_jax.data.batches import Retention
from reptune_jax.hub import text
from reptune_jax.lm import Model
from reptune_jax.model.read import read_at_once


class Piece(NamedTuple):
    """One row's tokens."""

    ids: list[int]
    start: int  # first token that is predicted
    own: bool = False  # whether the base model wrote it


def pieces(model: Model, split: str, T: int, new_tokens: int) -> list[Piece]:
    """Neutral documents cut into pieces of at most T tokens, and chats that the base answered."""
    before = text.put_before(model.tokenizer)  # a piece is a text: BOS stands before each
    documents = [(d.prompt + d.answer)[len(before) :] for d in neutral.prose(model, split)]
    size = T - len(before)
    cut = [before + ids[i : i + size] for ids in documents for i in range(0, len(ids), size)]
    chats = neutral.chats(model, split, new_tokens)
    return [Piece(ids, 1) for ids in cut if len(ids) >= T // 2] + [
        Piece(chat.prompt + chat.answer, len(chat.prompt), own=True) for chat in chats
    ]


def make_retention(
    model: Model,
    found: Sequence[Piece],
    T: int,
    L: int,
    seed: int = 0,
    batch: int = 8,
    layers: tuple[int, int] | None = None,
) -> Retention:
    """Padded rows of at most T tokens, L random positions of each, the base's states there.

    With `layers` also the output of blocks [first, stop) there.
    """

    def states(tokens_BxT: Any, mask_BxT: Any, at_BxL: Any) -> dict[str, jax.Array]:
        at_BxLxT = None if layers is None else jax.nn.one_hot(at_BxL, tokens_BxT.shape[1])
        inputs = model.decoder, model.params, tokens_BxT, mask_BxT
        got = read_at_once(*inputs, read_BxPxT=at_BxLxT)
        out = {"hidden_BxLxD": jnp.take_along_axis(got.hidden_BxTxD, at_BxL[..., None], axis=1)}
        if layers is not None:
            out["residual_BxMxLxD"] = jnp.swapaxes(got.mean_NxBxPxD[slice(*layers)], 0, 1)
        return out

    kept = _positions(model, found, T, L, np.random.default_rng(seed))
    inputs = kept.tokens_BxT, kept.mask_BxT, kept.at_BxL
    return dataclasses.replace(kept, **model.in_batches(states, inputs, batch))


def _positions(model: Model, found: Sequence[Piece], T: int, L: int, rng: Any) -> Retention:
    """All but what the base computes."""
    R = len(found)
    kept = Retention(
        tokens_BxT=np.full((R, T), model.pad_id, np.int32),
        mask_BxT=np.zeros((R, T), np.int32),
        at_BxL=np.zeros((R, L), np.int32),
        weight_BxL=np.zeros((R, L), np.float32),
        hidden_BxLxD=None,
        next_BxL=np.zeros((R, L), np.int32),
        own_BxL=np.zeros((R, L), np.float32),
    )
    for r, piece in enumerate(found):
        ids = piece.ids[:T]
        kept.tokens_BxT[r, : len(ids)], kept.mask_BxT[r, : len(ids)] = ids, 1
        at = rng.permutation(np.arange(piece.start - 1, len(ids)))[:L]
        kept.at_BxL[r, : len(at)], kept.weight_BxL[r, : len(at)] = at, 1
        follows = at + 1 < len(ids)
        kept.next_BxL[r, : len(at)] = np.where(follows, np.array([*ids, 0])[at + 1], 0)
        kept.own_BxL[r, : len(at)] = piece.own * follows
    return kept
