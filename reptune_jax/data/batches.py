"""Examples to batches. A batch is a function of (seed, step): nothing to save, nothing to skip."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import numpy as np

Array = Any  # numpy on the host, jax.Array within a step


class Example(NamedTuple):
    """One training text: what is predicted where, and where the cosine is taken."""

    ids: list[int]
    at: list[int]  # positions whose next token is a label
    targets: list[list[tuple[int, float]]]  # per label: candidate tokens with their shares
    cosine: tuple[int, int]  # [start, stop) tokens


@flax.struct.dataclass
class Rows:
    """Rows of behavior text."""

    tokens_BxT: Array
    mask_BxT: Array
    at_BxL: Array
    target_BxLxC: Array
    weight_BxLxC: Array
    cosine_BxT: Array
    of_B: Array  # which of the run's behaviors
    base_BxNxT: Array | None = None  # the base model's cosines, where a step refers to them
    below_BxTxD: Array | None = None  # what enters the lowest trained layer, where it is known
    below_cosine_BxMxT: Array | None = None  # and the cosines of the M layers below


@flax.struct.dataclass
class Keep:
    """Rows of unrelated text, with what the base model computes at L of their positions."""

    tokens_BxT: Array
    mask_BxT: Array
    at_BxL: Array
    weight_BxL: Array
    hidden_BxLxD: Array  # final hidden states
    next_BxL: Array  # the token that follows
    own_BxL: Array  # 1 where that is a token of the base's own answer
    residual_BxMxLxD: Array | None = None  # output of the M trained layers, where a loss needs it
    below_BxTxD: Array | None = None


@flax.struct.dataclass
class Batch:
    """What one step sees."""

    behavior: Rows
    keep: Keep | None


def stack_examples(
    examples: Sequence[Example], pad_id: int, T: int, of: Sequence[int] | None = None
) -> Rows:
    """All examples as padded arrays; a batch is a choice of rows. `of`: the behavior of each.

    Raises:
      ValueError: no examples.
    """
    if not examples:
        raise ValueError("examples: got none, expected at least one. Check the split and filters.")
    B, L = len(examples), max(len(e.at) for e in examples)
    C = max(len(t) for e in examples for t in e.targets)
    rows = Rows(
        tokens_BxT=np.full((B, T), pad_id, np.int32),
        mask_BxT=np.zeros((B, T), np.int32),
        at_BxL=np.zeros((B, L), np.int32),
        target_BxLxC=np.zeros((B, L, C), np.int32),
        weight_BxLxC=np.zeros((B, L, C), np.float32),
        cosine_BxT=np.zeros((B, T), np.float32),
        of_B=np.zeros(B, np.int32) if of is None else np.array(of, np.int32),
    )
    for b, e in enumerate(examples):
        rows.tokens_BxT[b, : len(e.ids)] = e.ids
        rows.mask_BxT[b, : len(e.ids)] = 1
        rows.at_BxL[b, : len(e.at)] = e.at
        rows.cosine_BxT[b, slice(*e.cosine)] = 1
        for i, candidates in enumerate(e.targets):
            for c, (token, share) in enumerate(candidates):
                rows.target_BxLxC[b, i, c], rows.weight_BxLxC[b, i, c] = token, share
    return rows


def choose_of_each(
    sizes: Sequence[int], batches: Sequence[int], seed: int, step: int
) -> np.ndarray:
    """Row numbers of a step where rows of several kinds lie one after another: some of each."""
    first = np.cumsum([0, *sizes])
    return np.concatenate(
        [
            at + choose_rows(n, batch, seed, step)
            for at, n, batch in zip(first, sizes, batches, strict=False)
        ]
    )


def choose_rows(total: int, batch: int, seed: int, step: int) -> np.ndarray:
    """Row numbers of a step: independent permutations, one an epoch, cut across their borders."""
    start = step * batch
    rows = [
        _permutation(total, seed, epoch)
        for epoch in range(start // total, (start + batch - 1) // total + 1)
    ]
    offset = start % total
    return np.concatenate(rows)[offset : offset + batch]


def _permutation(total: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(total)
