"""`extract`: a vector from pairs of raw text, the library's one-call way in."""

from collections.abc import Sequence

from reptune_jax.data import positions
from reptune_jax.lm import Model
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
) -> SteeringVector:
    """A behavior vector from (positive, negative) pairs.

    A side is raw text (render chats with the tokenizer's template first), or (prompt, completion)
    where `position` is "response". Positions: last, before_answer, response, all, or a negative
    offset from the end of the prompt.

    Raises:
      ValueError: an unknown method, no pairs, or a position that is not in a text.
    """
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, expected one of {', '.join(METHODS)}.")
    if not pairs:
        raise ValueError("pairs: got none, expected at least one (positive, negative).")
    positives, negatives = (
        [_span(model, pair[side], position) for pair in pairs] for side in (0, 1)
    )
    return make_vector(model, positives, negatives, method, {"position": str(position)}, batch_size)


def _span(model: Model, side: Side, position: str | int) -> Span:
    prompt, completion = (side, "") if isinstance(side, str) else side
    prompt_ids, more_ids = (
        model.tokenizer.encode(text, add_special_tokens=False) for text in (prompt, completion)
    )
    ids = prompt_ids + more_ids
    return Span(ids, *positions.span(model.tokenizer, ids, len(prompt_ids), position))
