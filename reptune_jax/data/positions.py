"""Where in a text: the one place that turns a named position into tokens.

Positions are named by content and found per tokenizer, never a hand-counted offset.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedTokenizerBase

NAMED = ("last", "before_answer", "response", "all")
EXPECTED = "last, before_answer, response, all, or a negative offset from the end such as -2"
_CUE = "\nAnswer"  # a line that begins so asks for the answer


def span(
    tokenizer: "PreTrainedTokenizerBase",
    ids: Sequence[int],
    prompt_length: int,
    position: str | int,
) -> tuple[int, int]:
    """[start, stop) of a position in a text whose first `prompt_length` tokens are the prompt.

    last: its last token. before_answer: the newline before its answer cue. response: all that
    follows it. all: every token but the first, an attention sink: its residual is a hundred times
    as long as others, whatever it says. -k: its k-th token from the end.

    Raises:
      ValueError: the position is unknown, or is not in this text.
    """
    n = len(ids)
    if not 0 < prompt_length <= n:
        raise ValueError(
            f"prompt_length: got {prompt_length}, expected 1 to {n}, the tokens given."
        )
    if position == "all":
        if n == 1:
            raise _missing(tokenizer, ids, position, "nothing follows the first token")
        return 1, n
    if position == "response":
        if prompt_length == n:
            raise _missing(tokenizer, ids, position, "nothing follows the prompt")
        return prompt_length, n
    if position == "before_answer":
        at = _newline_before_cue(tokenizer, ids[:prompt_length])
        if at is None:
            why = f"no line starts with {_CUE.strip()!r}"
            raise _missing(tokenizer, ids[:prompt_length], position, why)
        return at, at + 1
    at = prompt_length + offset(position)
    if at < 0:
        raise _missing(tokenizer, ids, position, f"the prompt has {prompt_length} tokens")
    return at, at + 1


def offset(position: str | int) -> int:
    """The negative offset from the end of the prompt that `last` or a number means.

    Raises:
      ValueError: neither.
    """
    found = str(-1 if position == "last" else position)
    if not (found.startswith("-") and found[1:].isdigit() and int(found)):
        raise ValueError(f"position: got {position!r}, expected {EXPECTED}.")
    return int(found)


def _newline_before_cue(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> int | None:
    pieces = [str(tokenizer.decode([i], clean_up_tokenization_spaces=False)) for i in ids]
    newline, end = "".join(pieces).rfind(_CUE), 0
    for at, piece in enumerate(pieces):
        start, end = end, end + len(piece)
        if start <= newline < end:
            return at
    return None


def _missing(
    tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], position: str | int, why: str
) -> ValueError:
    return ValueError(
        f"position: {position!r} is not in the prompt ending {tokenizer.decode(ids)[-60:]!r}: "
        f"{why}. Change the prompt, or use {EXPECTED}."
    )
