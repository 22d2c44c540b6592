"""Personas' own answers: the text that vectors are read from and models are tuned on."""

from collections.abc import Sequence

import numpy as np

from reptune_jax.data import positions
from reptune_jax.data.contrast import has_personas, persona_pairs
from reptune_jax.data.schema import Item
from reptune_jax.data.tuning import Answer
from reptune_jax.hub.endings import end_of_turn, said
from reptune_jax.hub.tokenizer import known_ids
from reptune_jax.lm import Model
from reptune_jax.model.intervene import Steerable
from reptune_jax.vectors.capture import Span

SIGNS = (1, -1)


def persona_prompts(
    model: Model, items: Sequence[Item], prompts: Sequence[Item]
) -> dict[int, list[list[int]]]:
    """sign -> ids of every prompt under a persona of that sign; matched pairs take turns.

    Without personas the prompts stand alone.
    """
    if not has_personas(items):
        plain = [model.encode_prompt(list(prompt.messages)) for prompt in prompts]
        return {1: plain, -1: plain}
    pairs = persona_pairs(items, prompts, model.tokenizer)
    return {
        1: [model.encode_prompt(positive) for positive, _, _ in pairs],
        -1: [model.encode_prompt(negative) for _, negative, _ in pairs],
    }


def write_answers(
    model: Model,
    items: Sequence[Item],
    prompts: Sequence[Item],
    sign: int,
    max_new: int,
    steer: Steerable | None = None,
    batch_size: int = 32,
    score: bool = True,
) -> list[Answer]:
    """Greedy answers of the persona of `sign`, optionally steered while they are written.

    Without personas they are the items' own, `pos` or `neg`, each ended as a chat's turns are.

    With `score`, each gets the unsteered model's own persona odds: how much likelier the answer is
    under its persona than under the opposite one. No outside judge sees it.
    """
    of_sign = persona_prompts(model, items, prompts)
    own, other = of_sign[sign], of_sign[-sign]
    asked = has_personas(items)
    if asked:
        new = model.generate_each(own, max_new, steer=steer, batch_size=batch_size)
    else:
        new = [_given(model, p.pos if sign > 0 else p.neg) for p in prompts]
    odds = np.full(len(new), np.nan)
    if score and asked:
        odds = _logp(model, own, new, batch_size) - _logp(model, other, new, batch_size)
    return [
        Answer(
            item=p.id,
            split=p.split,
            sign=sign,
            prompt=p.messages[-1]["content"],
            text=said(model.tokenizer, ids),
            ids=ids,
            odds=float(o) / max(len(ids), 1),
        )
        for p, ids, o in zip(prompts, new, odds, strict=True)
    ]


def answer_spans(
    model: Model,
    items: Sequence[Item],
    prompts: Sequence[Item],
    answers: Sequence[Answer],
    position: str,
) -> list[Span]:
    """Persona, prompt and answer as ids, with the tokens whose residuals are read."""
    spans = []
    of_sign = persona_prompts(model, items, prompts)
    for i, (item, answer) in enumerate(zip(prompts, answers, strict=True)):
        prompt = of_sign[answer.sign][i]
        ids = prompt + answer.ids
        where = positions.span(model.tokenizer, ids, len(prompt), position)
        spans.append(Span(ids, *where, len(prompt), item.cluster))
    return spans


def _given(model: Model, answer: str) -> list[int]:
    ids = model.tokenizer.encode(answer, add_special_tokens=False)
    end = end_of_turn(model.tokenizer)
    return known_ids(model.tokenizer, ids if end is None else [*ids, end], model.arch.V)


def _logp(
    model: Model, prompts: list[list[int]], new: list[list[int]], batch_size: int
) -> np.ndarray:
    ids = [p + n for p, n in zip(prompts, new, strict=True)]
    starts = [len(p) for p in prompts]
    return np.array([logp for logp, _ in model.score_ids(ids, starts, batch_size=batch_size)])
