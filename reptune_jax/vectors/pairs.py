"""`extract`: a vector from pairs of raw text, the library's one-call way in."""

import os
from collections.abc import Callable, Sequence
from typing import Any

from reptune_jax.data import foreign, positions
from reptune_jax.data.contrast import fold_system
from reptune_jax.data.foreign import Foreign
from reptune_jax.hub import templates
from reptune_jax.hub.tokenizer import known_ids
from reptune_jax.lm import Model
from reptune_jax.model import inputs
from reptune_jax.vectors.capture import Span, make_vector
from reptune_jax.vectors.methods import METHODS
from reptune_jax.vectors.steering_vector import SteeringVector

Side = str | tuple[str, str]  # raw text, or (prompt, completion)


def load_pairs(
    name: str | os.PathLike[str] | Foreign, model: Model | None = None
) -> list[tuple[Side, Side]]:
    """(positive, negative) pairs for `extract`, of a file or hub data set of another tool.

    `name` is a path, or `hub:` and an id; `?column=…` behind it names columns (`data.rows`). With a
    model, prompts are rendered by its chat template; without, a newline stands between prompt and
    answer. Texts that have no prompt stay as they are: true and false statements are paired in
    their order, as far as there are both. Of personas with questions a side is the prompt alone.

    Raises:
      FileNotFoundError, ValueError: no such data, or of no known format.
    """
    found = name if isinstance(name, Foreign) else foreign.read(name)

    def prompt(turns: Sequence[dict[str, str]]) -> str:
        if model is None:
            return "\n\n".join(turn["content"] for turn in turns) + "\n"
        return templates.chat_text(model.tokenizer, fold_system(model.tokenizer, list(turns)))

    pairs: list[tuple[Side, Side]] = []
    for turns, *answers in found.given:
        if turns:
            positive, negative = ((prompt(turns), answer.strip()) for answer in answers)
            pairs.append((positive, negative))
        else:
            pairs.append((answers[0], answers[1]))
    true, false = ([text for text, of in found.claims if of == label] for label in (1, 0))
    pairs += zip(true, false, strict=False)
    for i, question in enumerate(found.questions):
        asked = {"role": "user", "content": question}
        sides = found.personas[i % len(found.personas)]
        more, less = (prompt([{"role": "system", "content": side}, asked]) for side in sides)
        pairs.append((more, less))
    return pairs


def extract(
    model: Model,
    pairs: Sequence[tuple[Side, Side]],
    method: str = "mean_diff",
    position: str | int = "last",
    batch_size: int = 16,
    project_out: SteeringVector | None = None,
) -> SteeringVector:
    """A behavior vector from (positive, negative) pairs.

    The method is one of mean_diff, pca (or pca_center, which is the same component), logistic, lda
    and whitened; each layer's direction gets the length of the mean difference. What lies along
    `project_out`, a vector of this model, is removed before anything else.

    A side is raw text (render chats with the tokenizer's template first), or (prompt, completion)
    where `position` is "response". Positions: last, before_answer, response, all (but the first
    token), or a negative offset from the end of the prompt. Before raw text stands what the
    tokenizer puts there, unless it begins with it.

    Raises:
      ValueError: an unknown method, no pairs, sides that are the same, a position that is not in a
        text, residuals that are not finite, or a vector of another model.
    """
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, expected one of {', '.join(METHODS)}.")
    if isinstance(pairs, str) or not all(_is_pair(pair, _is_side) for pair in pairs):
        raise ValueError(
            f"pairs: got {str(pairs)[:60]!r}, expected a list of (positive, negative), each a text "
            "or a (prompt, completion). A single pair is [(positive, negative)]."
        )
    if not pairs:
        raise ValueError("pairs: got none, expected at least one (positive, negative).")
    inputs.counts(batch_size=batch_size)
    meta, nuisance_NxD = {"position": str(position)}, None
    if project_out is not None:
        project_out.check_model(model.sha, model.name)
        project_out.check_shape(model.arch.N, model.arch.D)
        meta["project_out"], nuisance_NxD = project_out.digest, project_out.directions_NxD
    positives, negatives = (
        [span(model, pair[side], position) for pair in pairs] for side in (0, 1)
    )
    return make_vector(model, positives, negatives, method, meta, batch_size, nuisance_NxD)


def _is_pair(value: Any, good: Callable[[Any], bool]) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(map(good, value))


def _is_side(value: Any) -> bool:
    return isinstance(value, str) or _is_pair(value, lambda text: isinstance(text, str))


def span(model: Model, side: Side, position: str | int) -> Span:
    """One side as ids, with the tokens that are read."""
    prompt, completion = (side, "") if isinstance(side, str) else side
    templates.check_text(completion)
    more_ids = model.tokenizer.encode(completion, add_special_tokens=False)
    prompt_ids = model.encode_prompt(prompt, chat=False)
    ids = known_ids(model.tokenizer, prompt_ids + more_ids, model.arch.V)
    ids = inputs.token_rows([ids], model.arch.V, context=model.context)[0]
    answer = len(prompt_ids) if len(ids) > len(prompt_ids) else 0
    return Span(ids, *positions.span(model.tokenizer, ids, len(prompt_ids), position), answer)
