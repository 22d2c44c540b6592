"""Retention text: neutral prose and unrelated chats, with the base model's hidden states.

The set is small and fixed, so the base model reads it once; a step then needs one forward less.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from reptune_jax import mesh as meshes
from reptune_jax.data.batches import Keep
from reptune_jax.data.schema import load_neutral
from reptune_jax.lm import Model
from reptune_jax.model.transformer import Decoder


def chat_rows(model: Model, split: str, max_new: int) -> list[tuple[list[int], int]]:
    """(ids, where the answer starts): unrelated prompts with the base's own greedy answers."""
    prompts = [model.encode_prompt(c["messages"]) for c in load_neutral("chats", split)]
    answers = model.generate_each(prompts, max_new)
    return [(p + a, len(p)) for p, a in zip(prompts, answers, strict=True)]


def prose_rows(model: Model, split: str, T: int) -> list[tuple[list[int], int]]:
    """(ids, 1): neutral documents cut into pieces of at most T tokens."""
    documents = [model.tokenizer.encode(d["text"]) for d in load_neutral("prose", split)]
    pieces = [d[i : i + T] for d in documents for i in range(0, len(d), T)]
    return [(piece, 1) for piece in pieces if len(piece) >= T // 2]


def make_keep(
    model: Model,
    rows: Sequence[tuple[list[int], int]],
    T: int,
    L: int,
    seed: int = 0,
    batch: int = 8,
) -> Keep:
    """Padded rows of at most T tokens, L random positions of each, the base's states there."""
    rng, R = np.random.default_rng(seed), len(rows)
    keep = Keep(
        tokens_BxT=np.full((R, T), model.pad_id, np.int32),
        mask_BxT=np.zeros((R, T), np.int32),
        at_BxL=np.zeros((R, L), np.int32),
        weight_BxL=np.zeros((R, L), np.float32),
        hidden_BxLxD=np.zeros((R, L, model.arch.D), model.dtype),
    )
    for r, (ids, start) in enumerate(rows):
        ids = ids[:T]
        keep.tokens_BxT[r, : len(ids)], keep.mask_BxT[r, : len(ids)] = ids, 1
        at = rng.permutation(np.arange(start - 1, len(ids)))[:L]
        keep.at_BxL[r, : len(at)], keep.weight_BxL[r, : len(at)] = at, 1
    for start in range(0, R, batch):
        rows_B = np.resize(np.arange(start, min(start + batch, R)), batch)
        inputs = tuple(a[rows_B] for a in (keep.tokens_BxT, keep.mask_BxT, keep.at_BxL))
        inputs = meshes.put_rows(inputs, model.mesh)
        keep.hidden_BxLxD[rows_B] = meshes.fetch(_states(model.decoder, model.params, *inputs))
    return keep


@partial(jax.jit, static_argnames=("decoder",))
def _states(decoder: Decoder, params, tokens_BxT, mask_BxT, at_BxL):
    hidden, _ = decoder.apply({"params": params}, tokens_BxT, mask_BxT)
    return jnp.take_along_axis(hidden, at_BxL[..., None], axis=1)
