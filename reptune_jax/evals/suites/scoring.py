"""Questions to rows: log-probabilities of the choices, and what they are worth."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from reptune_jax.console import counted
from reptune_jax.evals.arms import Condition
from reptune_jax.evals.results import Row, sha
from reptune_jax.evals.suites import shared
from reptune_jax.evals.suites.readers import MC2, Question
from reptune_jax.evals.suites.shared import Scored
from reptune_jax.hub import text
from reptune_jax.hub import tokenizer as tokenizers

_BATCHES = 4  # between two steps of the progress bar


def rows(
    cond: Condition, labels: dict[str, Any], questions: Sequence[Question], batch: int
) -> list[Row]:
    """`acc`, `acc_norm` and `chance` of every question, under the condition.

    Plain text without a chat template; a persona is put in front of it as a paragraph.
    """
    encode = encoder(cond)

    def pairs_of(q: Question) -> list[Scored]:
        return [
            encode(*pair) for pair in zip(q.contexts, (f" {c}" for c in q.choices), strict=True)
        ]

    pairs = [pairs_of(question) for question in questions]
    logp = _scores(cond, list(dict.fromkeys(pair for of in pairs for pair in of)), batch)
    found = []
    for question, of in zip(questions, pairs, strict=True):
        logp_C = np.array([logp[pair] for pair in of])
        right, wrong = _sides(question, logp_C)
        about: dict[str, Any] = {
            "split": "suites",
            "item_id": question.id,
            "cluster": question.id,
            "template": question.test,
            "format": "choice",
            "logp_pos": right,
            "logp_neg": wrong,
            "prompt_sha": sha([token for pair in of for token in (*pair.ids, pair.start)]),
        }
        for metric, value in values(question, logp_C).items():
            found.append(Row(**labels, **about, metric=metric, value=value))
    return found


def values(question: Question, logp_C: np.ndarray) -> dict[str, float]:
    """What log-probabilities of the C choices are worth; NaN where one of them is missing.

    The right choice has to be likelier than every other: a tie is wrong, where the harness takes
    the first. Per character is without the space before the choice, as the harness counts.
    """
    chance = len(question.gold) / len(question.choices)
    if not np.isfinite(logp_C).all():
        return {"acc": np.nan, "acc_norm": np.nan, "chance": chance}
    if question.test == MC2:
        p_C = np.exp(logp_C - logp_C.max())  # as they are, long answers are 0/0
        share = float(p_C[sorted(question.gold)].sum() / p_C.sum())
        return {"acc": share, "chance": chance}
    found = {"chance": chance}
    lengths_C = np.array([max(1, len(choice)) for choice in question.choices])
    for metric, scores_C in (("acc", logp_C), ("acc_norm", logp_C / lengths_C)):
        right, wrong = _sides(question, scores_C)
        found[metric] = float(right > wrong)
    return found


def _sides(question: Question, scores_C: np.ndarray) -> tuple[float, float]:
    """The best right choice's score, and the best wrong one's."""
    right_C = np.isin(np.arange(len(scores_C)), sorted(question.gold))
    return float(scores_C[right_C].max()), float(scores_C[~right_C].max(initial=-np.inf))


def encoder(cond: Condition) -> Callable[[str, str], Scored]:
    """(context, text) to ids, tokenised together; beyond the model's context their end is kept."""
    model = cond.model
    text.need(model.tokenizer, model.name)
    end = next(iter(model.stop_ids), model.pad_id)
    persona = "" if cond.persona is None else f"{cond.persona.messages[0]['content']}\n\n"

    def encode(context: str, scored: str) -> Scored:
        ids, start = text.encode_pair(model.tokenizer, persona + context, scored, end)
        known = tokenizers.known_ids(model.tokenizer, ids, model.arch.V)
        over = max(0, len(known) - (model.context or len(known)))
        return Scored(tuple(known[over:]), start - over)

    return encode


def _scores(cond: Condition, pairs: list[Scored], batch: int) -> dict[Scored, float]:
    """log p of each."""
    single: dict[tuple[int, ...], list[Scored]] = {}  # of one token: letters share their context
    for pair in pairs:
        if len(pair.ids) == pair.start + 1:
            single.setdefault(pair.ids[:-1], []).append(pair)
    several = [pair for pair in pairs if len(pair.ids) > pair.start + 1]
    found: dict[Scored, float] = {}
    with counted(len(several) + len(single), cond.title, unit="text") as bar:
        for part in shared.scores(cond, several, batch):
            found |= {pair: score for pair, (score, _) in part.items()}
            bar.update(len(part))
        for context in _parts([*single], batch):
            of = [single[ids] for ids in context]
            most = max(map(len, of))
            last_IxC = np.array([np.resize([pair.ids[-1] for pair in one], most) for one in of])
            prompts = [list(ids) for ids in context]
            logp_IxC = cond.model.next_logp(prompts, last_IxC, cond.steer, batch, missing=True)
            for one, logp_C in zip(of, logp_IxC, strict=True):
                found |= {pair: float(score) for pair, score in zip(one, logp_C, strict=False)}
            bar.update(len(context))
    return found


def _parts(texts: list[tuple[int, ...]], batch: int) -> Iterator[list[tuple[int, ...]]]:
    """The texts by length, some batches at a time."""
    ordered, step = sorted(texts, key=len), _BATCHES * batch
    yield from (ordered[i : i + step] for i in range(0, len(ordered), step))
