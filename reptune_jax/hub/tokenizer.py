"""Tokenizers: built from GGUF metadata, first tokens of verdicts."""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import BPE

from reptune_jax.console import note
from reptune_jax.hub.templates import encode
from reptune_jax.reading import short

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPLIT = _QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type


def _smollm() -> Any:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def _split_by(pattern: str) -> Any:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, byte_level])


_PRE = {
    "smollm": _smollm,
    "qwen2": lambda: _split_by(_QWEN2_SPLIT),
    "llama-bpe": lambda: _split_by(_LLAMA3_SPLIT),
}


def gguf_tokenizer(metadata: Mapping[str, Any]) -> "PreTrainedTokenizerFast":
    """Builds the tokenizer that a GGUF file describes, from its metadata alone.

    Raises:
      ValueError: a kind of vocabulary or a pre-tokenizer that would give other token ids.
    """
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = _listed(metadata, "tokens", str, 0)
    kinds: list[int] = [_NORMAL] * len(tokens)
    if "tokenizer.ggml.token_type" in metadata:
        kinds = _listed(metadata, "token_type", int, len(tokens))
    if _is_gemma(metadata):
        core = _sentencepiece_bpe(metadata, tokens, kinds)
    else:
        core = _byte_level_bpe(metadata, tokens)
    core.add_tokens(_added(tokens, kinds, _USER_DEFINED))
    core.add_special_tokens(_added(tokens, kinds, _CONTROL))
    special = {
        f"{name}_token": tokens[_id(metadata, key, len(tokens))]
        for name in ("bos", "eos", "pad", "unk")
        if (key := _special_key(name)) in metadata
    }
    # Left out, it is what llama.cpp takes for that kind of vocabulary.
    usual = _is_gemma(metadata) or metadata.get("tokenizer.ggml.pre") == "llama-bpe"
    if metadata.get("tokenizer.ggml.add_bos_token", usual) and "bos_token" in special:
        bos = special["bos_token"]
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, core.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, clean_up_tokenization_spaces=False, **special
    )
    tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    if not isinstance(tokenizer.chat_template, str | None):
        raise ValueError("tokenizer.chat_template: got no text, expected one. Convert it again.")
    arch = metadata.get("general.architecture")
    if length := metadata.get(f"{arch}.context_length"):
        tokenizer.model_max_length = length
    return tokenizer


def _special_key(name: str) -> str:
    return f"tokenizer.ggml.{ {'pad': 'padding', 'unk': 'unknown'}.get(name, name) }_token_id"


def _field(metadata: Mapping[str, Any], key: str) -> Any:
    if f"tokenizer.ggml.{key}" not in metadata:
        raise ValueError(
            f"tokenizer.ggml.{key}: missing from the GGUF file. Convert the file again."
        )
    return metadata[f"tokenizer.ggml.{key}"]


def _listed(metadata: Mapping[str, Any], key: str, kind: type, count: int) -> list[Any]:
    """A list of `kind`, of `count` items; of any number, but not none, where that is 0."""
    value = _field(metadata, key)
    fits = isinstance(value, list) and all(type(item) is kind for item in value)
    if not fits or len(value) != (count or len(value)) or not value:
        many = f" {count}" if count else ""
        got = f"{len(value)} items" if isinstance(value, list) else short(value)
        raise ValueError(
            f"tokenizer.ggml.{key}: got {got}, expected a list of{many} "
            f"{'texts' if kind is str else 'numbers'}. Convert the file again."
        )
    return value


def _id(metadata: Mapping[str, Any], key: str, V: int) -> int:
    if type(token := metadata[key]) is not int or not 0 <= token < V:
        raise ValueError(
            f"{key}: got {short(token)}, expected an id below {V}, the number of tokens. "
            "Convert the file again."
        )
    return token


def _byte_level_bpe(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Tokenizer:
    advice = "Load this model from its Hugging Face folder instead."
    if (model := _field(metadata, "model")) != "gpt2":
        raise ValueError(
            f"tokenizer.ggml.model: got {model!r}, expected 'gpt2' (byte-level BPE). {advice}"
        )
    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in _PRE:
        raise ValueError(
            f"tokenizer.ggml.pre: got {pre!r}, expected one of {', '.join(_PRE)}. {advice}"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in _listed(metadata, "merges", str, 0)]
    vocab = {token: i for i, token in enumerate(tokens)}
    for merge in merges:
        if len(merge) != 2 or any(piece not in vocab for piece in (*merge, "".join(merge))):
            raise ValueError(
                f"tokenizer.ggml.merges: got {short(' '.join(merge))}, expected two tokens that "
                "make a third. Convert the file again."
            )
    core = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        core.normalizer = normalizers.NFC()
    core.pre_tokenizer = _PRE[pre]()
    core.decoder = decoders.ByteLevel()
    return core


def _is_gemma(metadata: Mapping[str, Any]) -> bool:
    """SentencePiece without a space put before the text."""
    spaced = metadata.get("tokenizer.ggml.add_space_prefix", True)
    return metadata.get("tokenizer.ggml.model") == "llama" and not spaced


def _sentencepiece_bpe(
    metadata: Mapping[str, Any], tokens: Sequence[str], kinds: Sequence[int]
) -> Tokenizer:
    """A gemma vocabulary as a BPE of the `tokenizers` library.

    There are no merges in the file: a piece may be made of any two others, and earlier pieces come
    first, as their scores say. Pieces that users defined (tags, runs of spaces) are cut out before.
    """
    every = _listed(metadata, "scores", float, len(tokens))
    scores = [s for s, k in zip(every, kinds, strict=True) if k == _NORMAL]
    if any(later > earlier for earlier, later in itertools.pairwise(scores)):
        raise ValueError(
            "tokenizer.ggml.scores: got scores that rise, expected pieces from the best to the "
            "worst. Load this model from its Hugging Face folder instead."
        )
    pieces = {token for token, kind in zip(tokens, kinds, strict=True) if kind == _NORMAL}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in tokens
        if piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    vocab = {token: i for i, token in enumerate(tokens)}
    _field(metadata, "unknown_token_id")
    unknown = tokens[_id(metadata, _special_key("unk"), len(tokens))]
    bpe = BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    core = Tokenizer(bpe)
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return core


def _added(tokens: Sequence[str], kinds: Sequence[int], kind: int) -> list[AddedToken]:
    return [
        AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, found in zip(tokens, kinds, strict=True)
        if found == kind
    ]


def follow_file(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Gives a loaded tokenizer all that the folder's tokenizer.json says, and no more.

    transformers 5 makes normalizer, pre-tokenizer and further tokens anew from the class that
    tokenizer_config.json names, and then encodes otherwise than the model was trained to read.
    Tokens that the other files name (a padding token) are added under the next ids.
    """
    core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    core.no_padding()
    core.no_truncation()
    files = (folder / f"{name}.json" for name in ("tokenizer_config", "special_tokens_map"))
    named = "".join(path.read_text(encoding="utf-8") for path in files if path.exists())
    there = {token.content for token in core.get_added_tokens_decoder().values()}
    for _, token in sorted(tokenizer.added_tokens_decoder.items()):
        text = token.content
        quoted = (json.dumps(text), json.dumps(text, ensure_ascii=False))
        known = core.token_to_id(text) is not None or any(q in named for q in quoted)
        if text not in there and known:
            (core.add_special_tokens if token.special else core.add_tokens)([token])
    tokenizer._tokenizer = core
    for name, text in tokenizer.special_tokens_map.items():
        if isinstance(text, str) and core.token_to_id(text) is None:
            setattr(tokenizer, name, None)  # the class's own, such as <mask>


def check_vocabulary(tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> None:
    """Refuses a tokenizer whose ids the embedding does not have (a lookup would clamp silently).

    Added tokens beyond it are allowed, as no text makes them but their own name: Gemma 3's text
    models have one for images, many fine-tunes one for padding. `known_ids` refuses them when met.
    """
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= vocab_size}
    if not beyond:
        return
    begin, end = tokenizer.bos_token, tokenizer.eos_token
    ordinary = {t: i for t, i in beyond.items() if t not in tokenizer.get_added_vocab()}
    if wrong := ordinary or {t: i for t, i in beyond.items() if t in (begin, end)}:
        token, highest = max(wrong.items(), key=lambda item: item[1])
        raise ValueError(
            f"tokenizer: got id {highest} ({token!r}), expected ids below the model's vocabulary "
            f"of {vocab_size}. The tokenizer belongs to another model, or tokens were added "
            "without resizing the embedding."
        )
    names = sorted(beyond, key=beyond.__getitem__)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    note(
        f"{tokenizer.name_or_path or 'tokenizer'}: {', '.join(names[:3])}{more} (added, ids from "
        f"{beyond[names[0]]}) lie beyond the model's vocabulary of {vocab_size}; text that holds "
        "one is refused."
    )


def known_ids(tokenizer: "PreTrainedTokenizerBase", ids: list[int], vocab_size: int) -> list[int]:
    """The ids of a text.

    Raises:
      ValueError: one that the embedding does not have; names its token.
    """
    if beyond := [i for i in ids if i >= vocab_size]:
        raise ValueError(
            f"text: got {tokenizer.convert_ids_to_tokens(beyond[0])!r} (id {beyond[0]}), expected "
            f"tokens of the model's vocabulary of {vocab_size}: this one was added to the "
            "tokenizer alone. Leave it out of the text, or use a model that has it."
        )
    return ids


def free_label_tokens(
    tokenizer: "PreTrainedTokenizerBase", prompt: str, pos: str, neg: str
) -> tuple[int, int]:
    """First token ids of two verdicts where they continue `prompt`.

    Raises:
      ValueError: both start with the same token, or a verdict changes the prompt's own tokens.
    """
    first_pos = _first_token(tokenizer, prompt, pos)
    first_neg = _first_token(tokenizer, prompt, neg)
    if first_pos == first_neg:
        shared = tokenizer.decode([first_pos])
        raise ValueError(
            f"verdicts: {pos!r} and {neg!r} both start with the token {shared!r}, expected "
            "different first tokens. Choose other words."
        )
    return first_pos, first_neg


def _first_token(tokenizer: "PreTrainedTokenizerBase", prompt: str, answer: str) -> int:
    before, joint = encode(tokenizer, prompt), encode(tokenizer, prompt + answer)
    if joint[: len(before)] != before or len(joint) == len(before):
        raise ValueError(
            f"verdict: {answer!r} is not tokenized apart from the prompt ending {prompt[-30:]!r}. "
            "Move a trailing space of the prompt to the front of the verdict."
        )
    return int(joint[len(before)])
