"""Raw text to token ids, by one rule for reading vectors, scoring, generating and tuning:

before a text stands what its tokenizer puts there (a BOS), unless the text begins with it already;
behind it nothing, since a text that ends in EOS is over. A rendered chat is taken as it stands.
"""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from reptune_jax.console import say
from reptune_jax.hub import template_bounds
from reptune_jax.hub.templates import chat_text, check_text

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedTokenizerBase


def need(tokenizer: "PreTrainedTokenizerBase | None", model: str) -> None:
    """Raises ValueError where a model has no tokenizer."""
    if tokenizer is None:
        raise ValueError(
            f"{model}: has no tokenizer, expected one for text. Use `generate_ids` and "
            "`forward` with token ids, or add its files."
        )


def encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Ids of raw text."""
    check_text(text)
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    return [*_absent(tokenizer, text, ids), *ids]


def encode_pair(
    tokenizer: "PreTrainedTokenizerBase", context: str, continuation: str, end: int
) -> tuple[list[int], int]:
    """Joint ids and the index of the continuation's first token (by character offset).

    What has nothing before it starts from BOS, or else from `end`.

    Raises:
      ValueError: the continuation has no token of its own.
    """
    text = context + continuation
    check_text(text)
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    start = next((i for i, (_, stop) in enumerate(offsets) if stop > len(context)), None)
    if start is None:
        raise ValueError(
            f"continuation: got {continuation!r}, which has no token of its own, expected text "
            "to score. Drop it."
        )
    before = _absent(tokenizer, text, ids)
    if not before and start == 0:
        bos = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if ids[0] == bos and len(ids) > 1:
            return ids, 1
        before = [bos]
    return [*before, *ids], start + len(before)


def put_before(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """What the tokenizer puts before raw text."""
    bare = list(tokenizer.encode("a", add_special_tokens=False))
    whole = list(tokenizer.encode("a"))
    at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return whole[:at]


def warn_of_rendered(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> None:
    """Says so where texts that a template will render look like the rendered chats of it."""
    bos, opening = tokenizer.bos_token or "", _opening(tokenizer)
    marks = tuple(filter(None, (bos, opening.strip(), opening.removeprefix(bos).strip())))
    found = [text for text in texts if marks and text.lstrip().startswith(marks)]
    if found:
        say(
            f"prompts: {len(found)} of {len(texts)} look like rendered chats, e.g. "
            f"{found[0][:30]!r}, and are put into a user turn as they are. Pass chat=False for "
            "text that a template has rendered already."
        )


def _absent(tokenizer: "PreTrainedTokenizerBase", text: str, ids: Sequence[int]) -> list[int]:
    """What belongs before these ids of a text and is not there."""
    before = put_before(tokenizer)
    if not before or list(ids[: len(before)]) == before:
        return []
    # A template that writes no BOS means none, whatever the tokenizer does to other text.
    opening = _opening(tokenizer)
    if opening and ids and ids[0] in tokenizer.added_tokens_decoder and text.startswith(opening):
        return []
    return before


def _opening(tokenizer: "PreTrainedTokenizerBase") -> str:
    """What every chat begins with under the tokenizer's template; "" where that is nothing."""
    if not tokenizer.chat_template:
        return ""
    said = "a first turn"
    texts = []
    for roles in (["user"], ["system", "user"]):
        try:
            text = chat_text(tokenizer, [{"role": role, "content": said} for role in roles])
        except template_bounds.Unbounded:
            raise
        except ValueError:  # many take no system turn
            continue
        texts.append(text.partition(said)[0])
    alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False))
    return "".join(letters[0] for letters in alike)
