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


class Texts:
    """Padded rows of at most T tokens, L random positions of each, the base's states there.

    With `layers` also the output of blocks [first, stop) there. The base reads a row when it is
    first asked for: a short run takes few of them, and to read all takes minutes.
    """

    def __init__(
        self,
        model: Model,
        found: Sequence[Piece],
        T: int,
        L: int,
        seed: int = 0,
        batch: int = 8,
        layers: tuple[int, int] | None = None,
    ):
        self.model, self.batch, self.layers = model, batch, layers
        self.rows = _positions(model, found, T, L, np.random.default_rng(seed))
        self.read_R = np.zeros(len(found), bool)

    def __len__(self) -> int:
        return len(self.read_R)

    def take(self, at: np.ndarray) -> Retention:
        """These rows."""
        new = np.unique(at[~self.read_R[at]])
        if len(new):
            inputs = self.rows.tokens_BxT, self.rows.mask_BxT, self.rows.at_BxL
            inputs = tuple(a[new] for a in inputs)
            for name, found in self.model.in_batches(self._states, inputs, self.batch).items():
                known = getattr(self.rows, name)
                if known is None:
                    known = np.zeros((len(self), *found.shape[1:]), found.dtype)
                    self.rows = dataclasses.replace(self.rows, **{name: known})
                known[new] = found
            self.read_R[new] = True
        return jax.tree.map(lambda a: a[at], self.rows)

    def _states(self, tokens_BxT: Any, mask_BxT: Any, at_BxL: Any) -> dict[str, jax.Array]:
        at_BxLxT = None if self.layers is None else jax.nn.one_hot(at_BxL, tokens_BxT.shape[1])
        inputs = self.model.decoder, self.model.params, tokens_BxT, mask_BxT
        got = read_at_once(*inputs, read_BxPxT=at_BxLxT)
        out = {"hidden_BxLxD": jnp.take_along_axis(got.hidden_BxTxD, at_BxL[..., None], axis=1)}
        if self.layers is not None:
            out["residual_BxMxLxD"] = jnp.swapaxes(got.mean_NxBxPxD[slice(*self.layers)], 0, 1)
        return out


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
