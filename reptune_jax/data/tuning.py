"""Tuning examples: what the token loss predicts and where the cosine is taken."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from reptune_jax.data.batches import Example

_NEUTRAL_SHARE = 0.5  # label-neutral targets: both candidates at one half


class Answer(NamedTuple):
    """A persona's own answer to a prompt, as token ids (never re-tokenised)."""

    item: str  # id of the prompt's row
    split: str
    sign: int  # +1: the persona that exhibits the behavior
    prompt: str
    text: str
    ids: list[int]
    odds: float  # log p(ids | own persona) - log p(ids | opposite persona), per token


def response_example(
    prompt: list[int], answer: list[int], cosine: tuple[int, int], under: Sequence[int] = ()
) -> Example:
    """A prompt without persona, continued by a persona's answer; `under`: the persona's prompt."""
    at = list(range(len(prompt) - 1, len(prompt) + len(answer) - 1))
    whole = [*under, *answer] if under else ()
    return Example(prompt + answer, at, [[(token, 1.0)] for token in answer], cosine, whole)


def verdict_example(
    prompt: list[int],
    right: int,
    wrong: int,
    cosine: tuple[int, int],
    neutral: bool,
    under: Sequence[int] = (),
) -> Example:
    """A question whose label is one token; `neutral` shares it between both candidates."""
    shares = _NEUTRAL_SHARE if neutral else 1.0
    targets = [(right, shares)] + ([(wrong, shares)] if neutral else [])
    return Example(prompt, [len(prompt) - 1], [targets], cosine, under)


def unlabeled(example: Example) -> Example:
    """The same row, without weight in the token loss."""
    return example._replace(targets=[[(token, 0.0) for token, _ in t] for t in example.targets])


def best_share(answers: Sequence[Answer], keep: float) -> list[Answer]:
    """The answers of each sign that fit their persona best, by the model's odds; order is kept."""
    chosen: set[tuple[str, int]] = set()
    for sign in {a.sign for a in answers}:
        ranked = sorted((a for a in answers if a.sign == sign), key=lambda a: -a.odds)
        best = ranked[: max(round(keep * len(ranked)), 1)]
        chosen |= {(a.item, a.sign) for a in best}
    return [a for a in answers if (a.item, a.sign) in chosen]


def balanced(answers: Sequence[Answer]) -> list[Answer]:
    """As many of either sign: a filter may have left more of one, and the labels would lean."""
    each = {sign: [a for a in answers if a.sign == sign] for sign in (1, -1)}
    n = min(map(len, each.values()))
    chosen = {(a.item, a.sign) for side in each.values() for a in side[:n]}
    return [a for a in answers if (a.item, a.sign) in chosen]


def fluent(answers: Sequence[Answer], limit: float) -> list[Answer]:
    """The answers of whose 4-token runs at most `limit` repeat an earlier one.

    Small models loop under strong steering, and a loop is learned as readily as a behavior.
    """
    return [a for a in answers if repeated_share(a.ids) <= limit]


def repeated_share(ids: Sequence[int], n: int = 4) -> float:
    """Share of the n-token runs that stand earlier in the same answer."""
    runs = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def answer_row(answer: Answer) -> dict[str, Any]:
    """For targets.jsonl; JSON has no NaN, so odds that were not computed become null."""
    row = answer._asdict()
    return row if math.isfinite(answer.odds) else row | {"odds": None}
