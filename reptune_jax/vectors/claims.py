"""Vectors from verdicts on claims: an honest and a dishonest persona answer the same question.

The construction is the paper's (docs/method.md): a pair is persona + its own verdict. With the
default position the label is not yet visible, so the difference is the persona's effect there.
"""

from collections.abc import Sequence

from ml_collections import ConfigDict

from reptune_jax.data import positions
from reptune_jax.data.behavior import Behavior
from reptune_jax.data.contrast import honesty_pairs
from reptune_jax.lm import Model
from reptune_jax.vectors.capture import Span


def spans(settings: ConfigDict, model: Model, behavior: Behavior) -> tuple[list[Span], list[Span]]:
    """(positives, negatives) of `vector.pairs` claims of the train split.

    Raises:
      ValueError: the position is not in a prompt, or no pair passes `correct_only`.
    """
    claims = behavior.select("train", "claim")[: settings.pairs]
    pairs = honesty_pairs(claims, behavior.select(format="persona"), paired=settings.paired)
    positives = [_span(model, p[0], p[1], settings.position) for p in pairs]
    negatives = [_span(model, p[2], p[3], settings.position) for p in pairs]
    if not settings.correct_only:
        return positives, negatives
    fits = zip(_fits(model, pairs, 0), _fits(model, pairs, 2), strict=True)
    keep = [i for i, both in enumerate(fits) if all(both)]
    if not keep:
        raise ValueError(
            "vector.correct_only: no pair passed, expected at least one in which the honest "
            "persona answers rightly and the dishonest one wrongly. Set it to False, or use a "
            "larger model."
        )
    return [positives[i] for i in keep], [negatives[i] for i in keep]


def _span(model: Model, messages: list[dict[str, str]], answer: str, position: str | int) -> Span:
    prompt = model.encode_prompt(messages)
    ids = prompt + model.tokenizer.encode(answer, add_special_tokens=False)
    return Span(ids, *positions.span(model.tokenizer, ids, len(prompt), position))


def _fits(model: Model, pairs: Sequence[tuple], side: int) -> list[bool]:
    """Whether the model's next token under this side's persona is that side's verdict."""
    prompts = [model.encode_prompt(p[side]) for p in pairs]
    first = [model.tokenizer.encode(p[side + 1], add_special_tokens=False)[0] for p in pairs]
    new = model.generate_each(prompts, 1)
    return [ids[0] == token for ids, token in zip(new, first, strict=True)]
