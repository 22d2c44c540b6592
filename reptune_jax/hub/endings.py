"""Where an answer ends: the tokens that stop one, and what was said up to there."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from reptune_jax.hub import template_bounds
from reptune_jax.hub.templates import chat_text

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedTokenizerBase

_SAID = "reptune"  # an answer that no template changes
# Turns' and texts' ends by name, as llama.cpp knows them where a file does not say which they are.
_ENDS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>",
    "_<EOT>", "< EOT >", "<|end_of_text|>", "<|return|>", "<|call|>",
)  # fmt: skip
_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type


def stop_ids(
    tokenizer: "PreTrainedTokenizerBase | None", declared: Iterable[Any], vocab_size: int
) -> tuple[int, ...]:
    """Every token that ends an answer: those declared, the tokenizer's, the template's own.

    `declared` holds ids, lists of ids and None, as generation_config.json and config.json have
    them. Files name one or the other: Llama 3's config the end of a text, its generation config the
    end of a turn as well; what ends a turn in the template ends it in any case.
    """
    found = [i for ids in declared for i in (ids if isinstance(ids, list) else [ids])]
    if tokenizer is not None:
        found += [tokenizer.eos_token_id, end_of_turn(tokenizer)]
    ids = (i for i in found if type(i) is int and 0 <= i < vocab_size)
    return tuple(dict.fromkeys(ids))


def end_of_turn(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The token that a chat template writes after an answer, if there is one."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _SAID}]
    try:
        text = chat_text(tokenizer, turns, add_generation_prompt=False)
    except template_bounds.Unbounded:
        raise
    except ValueError:  # a template for other kinds of chats
        return None
    after = text.rpartition(_SAID)[2].lstrip() if _SAID in text else ""
    added = {str(token): i for i, token in tokenizer.added_tokens_decoder.items()}
    first = [token for token in added if token and after.startswith(token)]
    return added[max(first, key=len)] if first else None


def gguf_ends(metadata: Mapping[str, Any]) -> list[int]:
    """The ends that a GGUF file names, and those that llama.cpp takes for such by their text."""
    keys = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    named = [metadata[key] for key in keys if key in metadata]
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    kinds = metadata.get("tokenizer.ggml.token_type", [_CONTROL] * len(tokens))
    control = (i for i, kind in enumerate(kinds) if kind in (_CONTROL, _USER_DEFINED))
    return named + [i for i in control if tokens[i] in _ENDS]


def said(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    """What new tokens add to the text before them, without special tokens; nothing is tidied up.

    Decoded behind other text: on their own, SentencePiece's decoders drop a leading space.
    """

    special = set(tokenizer.all_special_ids)  # transformers 5 leaves some of them in the text

    def text(ids: Sequence[int]) -> str:
        plain = [i for i in ids if i not in special]
        return str(
            tokenizer.decode(plain, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    before = tokenizer.encode("a", add_special_tokens=False)
    return text([*before, *ids]).removeprefix(text(before))
