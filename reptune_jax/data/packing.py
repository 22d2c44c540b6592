"""Several short texts in one row, so that a step computes about as many tokens as are real.

Nothing that is trained on changes: a token sees its own text only, from position 0 on, and takes
its labels, its cosine's weight and what the base model said of it along. A row holds texts of one
behavior, so what differs by row still does.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from reptune_jax.data.batches import Examples, Retention

_WEIGHTS = ("mask", "cosine", "weight", "own", "goes_on")  # fields that say how much counts


class Shape(NamedTuple):
    """What all packed rows of a run have room for."""

    rows: int
    tokens: int  # of a row
    labels: int  # of a row


def fit(lengths: Sequence[int], of: Sequence[int], room: int) -> list[list[int]]:
    """Which texts share a row of `room` tokens: the longest first, each in the first row it fits.

    Only texts of one `of` share a row.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (of, tokens left) of each row
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):  # stable: same on all hosts
        r = next((r for r, (k, n) in enumerate(free) if k == of[i] and n >= lengths[i]), len(rows))
        if r == len(rows):
            rows.append([])
            free.append((of[i], room))
        rows[r].append(i)
        free[r] = of[i], free[r][1] - lengths[i]
    return rows


def arrange(side: Examples | Retention, at: np.ndarray, room: int) -> list[list[int]]:
    """The texts `at` [B] of a side in rows, as `pack` takes them."""
    lengths = side.mask_BxT[at].sum(1).tolist()
    of = side.of_B[at].tolist() if isinstance(side, Examples) else [0] * len(lengths)
    return [[int(at[i]) for i in row] for row in fit(lengths, of, room)]


def labeled(side: Examples | Retention) -> np.ndarray:
    """[B, L]: whether a label has a weight; the others are padding."""
    if isinstance(side, Retention):
        return side.weight_BxL > 0
    return (side.weight_BxLxC > 0).any(-1)


def pack(side: Any, rows: Sequence[Sequence[int]], shape: Shape) -> Any:
    """The texts `rows` of a side, Examples or Retention, laid out in rows of one shape.

    The last part of a field's name says along which axis it is laid out. What is left of a row has
    no weight and otherwise the values of some real token: zeros have no cosine, and no gradient.
    """
    P, T, L = shape
    is_label = labeled(side)
    text, token = np.zeros((P, T), np.int32), np.zeros((2, P, T), np.int32)  # a text, where in it
    label, begin = np.zeros((2, P, L), np.int32), np.full((P, L), -1, np.int32)
    for p, row in enumerate(rows):
        t = l = 0
        for number, i in enumerate(row, 1):
            n, slots = int(side.mask_BxT[i].sum()), np.flatnonzero(is_label[i])
            tokens, labels = slice(t, t + n), slice(l, l + len(slots))
            text[p, tokens], begin[p, labels] = number, t
            token[:, p, tokens] = np.full(n, i), np.arange(n)
            label[:, p, labels] = np.full(len(slots), i), slots
            t, l = tokens.stop, labels.stop
    along = {"T": (*token, text > 0), "L": (*label, begin >= 0)}

    def laid_out(name: str, value: Any) -> Any:
        dims = name.rsplit("_", 1)[1].split("x")
        axis = next((i for i, dim in enumerate(dims) if dim in along), 0)
        if not axis:  # of whole texts, and alike in a row
            out = np.zeros((P, *value.shape[1:]), value.dtype)
            out[: len(rows)] = value[[row[0] for row in rows]]
            return out
        i_PxS, at_PxS, real_PxS = along[dims[axis]]
        found = np.moveaxis(value, axis, 1)[i_PxS, at_PxS]
        if name.split("_B")[0] in _WEIGHTS:
            found[~real_PxS] = 0
        return np.moveaxis(found, 1, axis)

    out = {
        field.name: laid_out(field.name, value)
        for field in dataclasses.fields(side)
        if (value := getattr(side, field.name)) is not None
    }
    out["at_BxL"] = out["at_BxL"] + np.maximum(begin, 0)
    return dataclasses.replace(side, **out, text_BxT=text)
