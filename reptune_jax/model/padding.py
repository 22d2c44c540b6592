"""Rows of unequal length as arrays: padded on one side, batched with others of their length."""

from collections.abc import Sequence

import numpy as np

BUCKET = 16  # token lengths are rounded up to this, so that few shapes are compiled


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Row numbers in batches of similar length."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def pad(
    ids: Sequence[Sequence[int]],
    pad_id: int,
    left: bool,
    rows: int | None = None,
    bucket: int = BUCKET,
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, mask), int32 [rows, T]; T is rounded up and missing rows repeat the first one."""
    rows = max(rows or len(ids), len(ids))
    T = -(-max(map(len, ids)) // bucket) * bucket
    tokens = np.full((rows, T), pad_id, np.int32)
    mask = np.zeros((rows, T), np.int32)
    for r in range(rows):
        row = ids[r] if r < len(ids) else ids[0]
        where = slice(T - len(row), T) if left else slice(0, len(row))
        tokens[r, where], mask[r, where] = row, 1
    return tokens, mask
