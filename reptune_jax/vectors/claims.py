"""Vectors from verdicts on claims: an honest and a dishonest persona answer the same question.

The construction is the paper's (docs/method.md): a pair is persona + its own verdict. With the
default position the label is not yet visible, so the difference is the persona's effect there.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from reptune_jax import mesh as meshes
from reptune_jax.data import positions
from reptune_jax.data.behavior import Behavior
from reptune_jax.data.contrast import Pair, honesty_pairs
from reptune_jax.data.schema import Item
from reptune_jax.lm import Model
from reptune_jax.model.padding import batches_by_length
from reptune_jax.vectors.capture import Span, read_batch


def read_pairs(settings: ConfigDict, model: Model, behavior: Behavior) -> list[Pair]:
    """Those of `vector.pairs` claims of the train split that pass `vector.correct_only`.

    Raises:
      ValueError: none passes.
    """
    claims = behavior.select("train", "claim")[: settings.pairs]
    pairs = honesty_pairs(claims, behavior.select(format="persona"), paired=settings.paired)
    if not settings.correct_only:
        return pairs
    fits = zip(_fits(model, pairs, 0), _fits(model, pairs, 2), strict=True)
    keep = [pair for pair, both in zip(pairs, fits, strict=True) if all(both)]
    if not keep:
        raise ValueError(
            "vector.correct_only: no pair passed, expected at least one in which the honest "
            "persona answers rightly and the dishonest one wrongly. Set it to False, or use a "
            "larger model."
        )
    return keep


def spans(model: Model, pairs: Sequence[Pair], position: str) -> tuple[list[Span], list[Span]]:
    """(positives, negatives).

    Raises:
      ValueError: the position is not in a prompt.
    """
    positives = [_span(model, p.positive, p.positive_answer, p.item, position) for p in pairs]
    negatives = [_span(model, p.negative, p.negative_answer, p.item, position) for p in pairs]
    return positives, negatives


def letter(model: Model, pairs: Sequence[Pair], batch_size: int) -> np.ndarray:
    """The direction of the answer's letter, [N, D]: A less B, read at the letter of each prompt.

    Within each persona's side the means over its As and its Bs are subtracted, and the two sides'
    differences averaged: neither a persona nor, since the sides pair letters and truth the other
    way round, the truth of a claim is in it, however many claims are true.

    Raises:
      ValueError: a side has one letter only.
    """
    read = [span for side in spans(model, pairs, "response") for span in side]
    shown = [(0, p.positive_answer) for p in pairs] + [(1, p.negative_answer) for p in pairs]
    cells: dict[tuple[int, str], list[np.ndarray]] = {
        cell: [] for cell in itertools.product((0, 1), "AB")
    }
    if missing := sorted(cells.keys() - set(shown)):
        raise ValueError(
            f"vector.project_out: got no {' and no '.join(letter for _, letter in missing)} as an "
            "answer of a side, expected both letters on both. Raise vector.pairs, so that there "
            "are true and false claims, or set it to ''."
        )
    for rows in batches_by_length([len(span.ids) for span in read], batch_size):
        found_NxBxD = meshes.fetch(read_batch(model, [read[r] for r in rows], batch_size))
        for r, row_NxD in zip(rows, found_NxBxD.swapaxes(0, 1), strict=True):
            cells[shown[r]].append(row_NxD)
    mean = {cell: np.mean(rows, 0) for cell, rows in cells.items()}
    return (mean[0, "A"] - mean[0, "B"] + mean[1, "A"] - mean[1, "B"]) / 2


def _span(
    model: Model, messages: list[dict[str, str]], answer: str, claim: Item, position: str
) -> Span:
    prompt = model.encode_prompt(messages)
    ids = prompt + model.tokenizer.encode(answer, add_special_tokens=False)
    where = positions.span(model.tokenizer, ids, len(prompt), position)
    return Span(ids, *where, len(prompt), claim.cluster)


def _fits(model: Model, pairs: Sequence[tuple], side: int) -> list[bool]:
    """Whether the model's next token under this side's persona is that side's verdict."""
    prompts = [model.encode_prompt(p[side]) for p in pairs]
    first = [model.tokenizer.encode(p[side + 1], add_special_tokens=False)[0] for p in pairs]
    new = model.generate_each(prompts, 1)
    return [ids[0] == token for ids, token in zip(new, first, strict=True)]
