"""Retention text: neutral prose and unrelated chats, with the base model's hidden states.

The set is small and fixed, so the base model reads it once; a step then needs one forward less.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from reptune_jax.data.batches import Keep
from reptune_jax.data.schema import load_neutral
from reptune_jax.lm import Model
from reptune_jax.model.transformer import Decoder, collect
from reptune_jax.tuning import untuned


class Text(NamedTuple):
    """A row of retention text."""

    ids: list[int]
    start: int  # first token that is predicted
    own: bool = False  # whether the base model wrote it


def chat_texts(model: Model, split: str, max_new: int) -> list[Text]:
    """Unrelated prompts with the base's own greedy answers."""
    prompts = [model.encode_prompt(c["messages"]) for c in load_neutral("chats", split)]
    answers = model.generate_each(prompts, max_new)
    return [Text(p + a, len(p), own=True) for p, a in zip(prompts, answers, strict=True)]


def prose_texts(model: Model, split: str, T: int) -> list[Text]:
    """Neutral documents cut into pieces of at most T tokens."""
    documents = [model.tokenizer.encode(d["text"]) for d in load_neutral("prose", split)]
    pieces = [d[i : i + T] for d in documents for i in range(0, len(d), T)]
    return [Text(piece, 1) for piece in pieces if len(piece) >= T // 2]


def make_keep(
    model: Model,
    texts: Sequence[Text],
    T: int,
    L: int,
    seed: int = 0,
    batch: int = 8,
    layers: tuple[int, int] | None = None,
) -> Keep:
    """Padded rows of at most T tokens, L random positions of each, the base's states there.

    With `layers` also the output of blocks [first, stop) there.
    """
    keep = _positions(model, texts, T, L, np.random.default_rng(seed))
    of_rows = partial(_states, model.decoder, model.params, layers=layers)
    inputs = keep.tokens_BxT, keep.mask_BxT, keep.at_BxL
    states = untuned.in_batches(of_rows, inputs, model, batch)
    return dataclasses.replace(keep, **states)


def _positions(model: Model, texts: Sequence[Text], T: int, L: int, rng: Any) -> Keep:
    """All but what the base computes."""
    R = len(texts)
    keep = Keep(
        tokens_BxT=np.full((R, T), model.pad_id, np.int32),
        mask_BxT=np.zeros((R, T), np.int32),
        at_BxL=np.zeros((R, L), np.int32),
        weight_BxL=np.zeros((R, L), np.float32),
        hidden_BxLxD=None,
        next_BxL=np.zeros((R, L), np.int32),
        own_BxL=np.zeros((R, L), np.float32),
    )
    for r, text in enumerate(texts):
        ids = text.ids[:T]
        keep.tokens_BxT[r, : len(ids)], keep.mask_BxT[r, : len(ids)] = ids, 1
        at = rng.permutation(np.arange(text.start - 1, len(ids)))[:L]
        keep.at_BxL[r, : len(at)], keep.weight_BxL[r, : len(at)] = at, 1
        follows = at + 1 < len(ids)
        keep.next_BxL[r, : len(at)] = np.where(follows, np.array([*ids, 0])[at + 1], 0)
        keep.own_BxL[r, : len(at)] = text.own * follows
    return keep


@partial(jax.jit, static_argnames=("decoder", "layers"))
def _states(decoder: Decoder, params, tokens_BxT, mask_BxT, at_BxL, layers):
    read = None if layers is None else jax.nn.one_hot(at_BxL, tokens_BxT.shape[1])
    (hidden, _), sown = decoder.apply(
        {"params": params}, tokens_BxT, mask_BxT, read_BxPxT=read, mutable=["intermediates"]
    )
    states = {"hidden_BxLxD": jnp.take_along_axis(hidden, at_BxL[..., None], axis=1)}
    if layers is not None:
        read_NxBxLxD = collect(sown["intermediates"], decoder.segments, "read")
        states["residual_BxMxLxD"] = jnp.swapaxes(read_NxBxLxD[slice(*layers)], 0, 1)
    return states
