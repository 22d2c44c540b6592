"""`extract`: a vector from pairs of raw text, the library's one-call way in."""

from collections.abc import Sequence

from reptune_jax.hub import tokenizer as tokenizers
from reptune_jax.lm import Model
from reptune_jax.vectors.capture import Span, sum_pairs
from reptune_jax.vectors.methods import METHODS
from reptune_jax.vectors.steering_vector import SteeringVector

Text = str | tuple[str, str]  # raw text, or (prompt, completion)


def extract(
    model: Model,
    pairs: Sequence[tuple[Text, Text]],
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
    sides = [[_span(model, pair[side], position) for pair in pairs] for side in (0, 1)]
    sums = sum_pairs(model, sides[0], sides[1], batch_size)
    return METHODS[method](
        sums, {"model": model.name, "model_sha": model.sha, "position": str(position)}
    )


def _span(model: Model, text: Text, position: str | int) -> Span:
    prompt, completion = (text, "") if isinstance(text, str) else text
    prompt_ids = model.tokenizer.encode(prompt, add_special_tokens=False)
    ids = prompt_ids + model.tokenizer.encode(completion, add_special_tokens=False)
    length = len(prompt_ids) if completion else None
    at = tokenizers.find_position(model.tokenizer, ids, position, prompt_length=length)
    return Span(ids, at.start, at.stop) if isinstance(at, slice) else Span(ids, at, at + 1)
