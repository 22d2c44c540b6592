"""Choices after their question: what they follow is read once for several of them."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from reptune_jax import mesh as meshes
from reptune_jax.evals.arms import Condition
from reptune_jax.model import score
from reptune_jax.model.padding import BUCKET, pad
from reptune_jax.model.prefix import Prefix

_BATCHES = 4  # of whole rows, between two steps of a progress bar
_BESIDE = (2, 4)  # choices of a question that a batch has beside each other; of more, some twice
_LEAST = 8  # shared tokens, from which sharing pays


class Scored(NamedTuple):
    """A text, and where what is scored of it begins."""

    ids: tuple[int, ...]
    start: int


Score = tuple[float, bool]  # log p, nats, NaN where it is not finite; whether greedy decoding


def scores(cond: Condition, pairs: Sequence[Scored], batch: int) -> Iterator[dict[Scored, Score]]:
    """What each is worth, some at a time; by length, so that a batch has little padding.

    Exact as in `model/prefix.py`; an intervention that has to see the whole row reads whole rows.
    """
    shares = getattr(cond.steer, "shares_prompt", True)
    alike: dict[tuple[int, ...], list[Scored]] = {}
    for pair in dict.fromkeys(pairs):
        alike.setdefault(pair.ids[: pair.start], []).append(pair)
    most, alone = max(_BESIDE), list[Scored]()
    groups: dict[int, list[list[Scored]]] = {beside: [] for beside in _BESIDE}
    for of in alike.values():
        for group in (of[i : i + most] for i in range(0, len(of), most)):
            if len(group) == 1 or not shares or _before(group[0]) < _LEAST:
                alone += group
            else:
                groups[min(n for n in _BESIDE if n >= len(group))].append(group)
    yield from _whole(cond, alone, batch)
    for beside, asked in groups.items():
        asked.sort(key=lambda g: (_before(g[0]), max(len(p.ids) - p.start for p in g)))
        size = max(1, min(batch // beside, len(asked)))
        for i in range(0, len(asked), size):
            yield _after_prefix(cond, asked[i : i + size], size, beside)


def _before(pair: Scored) -> int:
    """Tokens of the prefix: up to the one before the first scored one, which predicts it."""
    return pair.start - 1


def _whole(cond: Condition, pairs: list[Scored], batch: int) -> Iterator[dict[Scored, Score]]:
    """Rows that share nothing."""
    pairs, step = sorted(pairs, key=lambda pair: (len(pair.ids), pair.start)), _BATCHES * batch
    for part in (pairs[i : i + step] for i in range(0, len(pairs), step)):
        texts = [list(pair.ids) for pair in part], [pair.start for pair in part]
        yield dict(zip(part, cond.model.score_ids(*texts, cond.steer, batch, True), strict=True))


def _after_prefix(
    cond: Condition, groups: list[list[Scored]], size: int, beside: int
) -> dict[Scored, Score]:
    """A batch of `size` groups of texts that are the same up to what is scored.

    Of missing groups the first stands again, and of missing texts the group's first.
    """
    model = cond.model
    full = groups + groups[:1] * (size - len(groups))
    tokens, mask = pad([group[0].ids[: _before(group[0])] for group in full], model.pad_id, True)
    starts = np.array([group[0].start for group in full])
    steer = model.as_steer(cond.steer, tokens, mask, starts)
    prefix = Prefix(meshes.put_rows((tokens,), model.mesh)[0], steer, mask)
    rows = [(group + group[:1] * beside)[i] for group in full for i in range(beside)]
    tokens, mask = pad([row.ids[_before(row) :] for row in rows], model.pad_id, left=False)
    first_B = np.ones(len(rows), np.int32)
    logp_B, greedy_B = score.continuations(
        model.decoder,
        model.params,
        prefix,
        *meshes.put_rows((tokens, mask, first_B), model.mesh),
        model.as_steer(cond.steer, tokens, mask, first_B),
        L=-(-max(len(row.ids) - row.start for row in rows) // BUCKET) * BUCKET,
    )
    logp_B, greedy_B = meshes.fetch(logp_B), meshes.fetch(greedy_B)
    logp_B = np.where(np.isfinite(logp_B), logp_B, np.nan)
    return dict(zip(rows, zip(logp_B.tolist(), greedy_B.tolist(), strict=True), strict=True))
