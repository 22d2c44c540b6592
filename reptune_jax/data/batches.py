"""Examples to batches. A batch is a function of (seed, step): nothing to save, nothing to skip."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import numpy as np

from reptune_jax.model import padding

Array = Any  # numpy on the host, jax.Array within a step


class Example(NamedTuple):
    """One training text: what is predicted where, and where the cosine is taken."""

    ids: list[int]
    at: list[int]  # positions whose next token is a label
    targets: list[list[tuple[int, float]]]  # per label: candidate tokens with their shares
    cosine: tuple[int, int]  # [start, stop) tokens
    under: Sequence[int] = ()  # the text with a persona's prompt instead: it ends as `ids` do


@flax.struct.dataclass
class Examples:
    """Texts that are trained on, one a row; or several, where `text_BxT` says which is where."""

    tokens_BxT: Array
    mask_BxT: Array
    at_BxL: Array
    target_BxLxC: Array
    weight_BxLxC: Array
    cosine_BxT: Array
    of_B: Array  # which of the run's behaviors
    base_BxNxT: Array | None = None  # the base model's cosines, where a step refers to them
    ending_BxL: Array | None = None  # log p(the answer ends here) of the base model
    goes_on_BxL: Array | None = None  # weight of the labels that are no ending
    under_BxT: Array | None = None  # the texts under their personas, of another T …
    under_mask_BxT: Array | None = None  # … until `goal` is read from them
    goal_BxMxLxD: Array | None = None  # output of M layers at labels that a loss pulls to
    below_BxTxD: Array | None = None  # what enters the lowest trained layer, where it is known
    below_cosine_BxMxT: Array | None = None  # and the cosines of the M layers below
    text_BxT: Array | None = None  # which text of its row a token is of, from 1; 0: padding


@flax.struct.dataclass
class Retention:
    """Unrelated text, in rows as `Examples`, with what the base computes at L of its positions."""

    tokens_BxT: Array
    mask_BxT: Array
    at_BxL: Array
    weight_BxL: Array
    hidden_BxLxD: Array  # final hidden states
    next_BxL: Array  # the token that follows
    own_BxL: Array  # 1 where that is a token of the base's own answer
    residual_BxMxLxD: Array | None = None  # output of the M trained layers, where a loss needs it
    below_BxTxD: Array | None = None
    text_BxT: Array | None = None


@flax.struct.dataclass
class Batch:
    """What one step sees."""

    examples: Examples
    retention: Retention | None


def stack_examples(
    examples: Sequence[Example], pad_id: int, T: int, of: Sequence[int] | None = None
) -> Examples:
    """All examples as padded arrays; a batch is a choice of them. `of`: the behavior of each.

    Raises:
      ValueError: no examples.
    """
    if not examples:
        raise ValueError("examples: got none, expected at least one. Check the split and filters.")
    B, L = len(examples), max(len(e.at) for e in examples)
    C = max(len(t) for e in examples for t in e.targets)
    out = Examples(
        tokens_BxT=np.full((B, T), pad_id, np.int32),
        mask_BxT=np.zeros((B, T), np.int32),
        at_BxL=np.zeros((B, L), np.int32),
        target_BxLxC=np.zeros((B, L, C), np.int32),
        weight_BxLxC=np.zeros((B, L, C), np.float32),
        cosine_BxT=np.zeros((B, T), np.float32),
        of_B=np.zeros(B, np.int32) if of is None else np.array(of, np.int32),
    )
    for b, e in enumerate(examples):
        out.tokens_BxT[b, : len(e.ids)] = e.ids
        out.mask_BxT[b, : len(e.ids)] = 1
        out.at_BxL[b, : len(e.at)] = e.at
        out.cosine_BxT[b, slice(*e.cosine)] = 1
        for i, candidates in enumerate(e.targets):
            for c, (token, share) in enumerate(candidates):
                out.target_BxLxC[b, i, c], out.weight_BxLxC[b, i, c] = token, share
    if any(e.under for e in examples):
        tokens, mask = padding.pad([e.under or e.ids for e in examples], pad_id, left=False)
        out = dataclasses.replace(out, under_BxT=tokens, under_mask_BxT=mask)
    return out


def choose_of_each(
    sizes: Sequence[int], batches: Sequence[int], seed: int, step: int
) -> np.ndarray:
    """Which examples a step takes: some of each kind, which lie one after another."""
    first = np.cumsum([0, *sizes])
    return np.concatenate(
        [
            at + choose(n, batch, seed, step)
            for at, n, batch in zip(first, sizes, batches, strict=False)
        ]
    )


def choose(total: int, batch: int, seed: int, step: int) -> np.ndarray:
    """Which of `total`: independent permutations, one an epoch, cut across their borders."""
    start = step * batch
    rows = [
        np.random.default_rng([seed, epoch]).permutation(total)
        for epoch in range(start // total, (start + batch - 1) // total + 1)
    ]
    offset = start % total
    return np.concatenate(rows)[offset : offset + batch]
