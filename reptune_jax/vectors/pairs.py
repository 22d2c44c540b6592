"""`extract`: a vector from pairs of raw text, the library's one-call way in."""

from collections.abc import Callable, Sequence
from typing import Any

from reptune_jax.data import positions
from reptune_jax.hub.tokenizer import known_ids
from reptune_jax.lm import Model
from reptune_jax.model import inputs
from reptune_jax.vectors.capture import Span, make_vector
from reptune_jax.vectors.methods import METHODS
from reptune_jax.vectors.steering_vector import SteeringVector

Side = str | tuple[str, str]  # raw text, or (prompt, completion)


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
        [_span(model, pair[side], position) for pair in pairs] for side in (0, 1)
    )
    return make_vector(model, positives, negatives, method, meta, batch_size, nuisance_NxD)


def _is_pair(value: Any, good: Callable[[Any], bool]) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(map(good, value))


def _is_side(value: Any) -> bool:
    return isinstance(value, str) or _is_pair(value, lambda text: isinstance(text, str))


def _span(model: Model, side: Side, position: str | int) -> Span:
    prompt, completion = (side, "") if isinstance(side, str) else side
    more_ids = model.tokenizer.encode(completion, add_special_tokens=False)
    prompt_ids = model.encode_prompt(prompt, chat=False)
    ids = known_ids(model.tokenizer, prompt_ids + more_ids, model.arch.V)
    ids = inputs.token_rows([ids], model.arch.V, context=model.context)[0]
    answer = len(prompt_ids) if len(ids) > len(prompt_ids) else 0
    return Span(ids, *positions.span(model.tokenizer, ids, len(prompt_ids), position), answer)
