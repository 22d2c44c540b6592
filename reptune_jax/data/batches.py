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


@flax.struct.dataclass
class Keep:
    """Rows of unrelated text, with the base model's final hidden states at L of their positions."""

    tokens_BxT: Array
    mask_BxT: Array
    at_BxL: Array
    weight_BxL: Array
    hidden_BxLxD: Array


@flax.struct.dataclass
class Batch:
    """What one step sees."""

    behavior: Rows
    keep: Keep | None


def stack_examples(examples: Sequence[Example], pad_id: int, T: int) -> Rows:
    """All examples as padded arrays; a batch is a choice of rows.

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
