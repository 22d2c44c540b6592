"""Tokenizers from GGUF metadata, chat texts, and positions found by content."""

import itertools
import re

import numpy as np
import pytest

from reptune_jax.data import positions
from reptune_jax.hub import templates
from reptune_jax.hub import tokenizer as tk
from reptune_jax.hub.gguf_header import read_header
from tests.support import tiny
from tests.support.hub_models import tokenizer_metadata
from tests.support.tiny import smollm2_path

TEXTS = [
    "Hello 12345 world 3.14, 1st 2024-01-02",
    "été naïve 中文 🙂 עברית",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "a\n\n\nb\t\tc   d   ",
    "don't WE'LL they've",
    "",
]
CHAT = [
    {"role": "user", "content": "Is 12 even?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "And 13?\nAnswer:"},
]


@pytest.fixture(scope="module")
def tok():
    return tk.gguf_tokenizer(tokenizer_metadata())


def pieces(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_text_survives_a_round_trip(tok):
    for text in TEXTS:
        assert tok.decode(tok(text)["input_ids"]) == text


def test_control_tokens_are_whole_and_special(tok):
    assert tok("<|im_end|>")["input_ids"] == [2]
    assert tok.decode([1, 2], skip_special_tokens=True) == ""
    assert (tok.bos_token_id, tok.eos_token_id, tok.pad_token_id, tok.unk_token_id) == (1, 2, 2, 0)


def test_user_defined_tokens_are_whole_but_kept_in_text():
    metadata = tokenizer_metadata()
    metadata["tokenizer.ggml.token_type"][0] = 4
    tokenizer = tk.gguf_tokenizer(metadata)
    assert tokenizer("<|endoftext|>")["input_ids"] == [0]
    assert tokenizer.decode([0, 2], skip_special_tokens=True) == "<|endoftext|>"


def test_each_pre_tokenizer_splits_in_its_own_way():
    made = {p: tk.gguf_tokenizer(tokenizer_metadata(p)) for p in ("smollm", "qwen2", "llama-bpe")}
    assert {p: pieces(t, "1234") for p, t in made.items()} == {
        "smollm": ["1", "2", "3", "4"],  # digits are split before merging
        "qwen2": ["1", "2", "3", "4"],
        "llama-bpe": ["123", "4"],  # groups of three
    }
    # Qwen normalizes to composed characters, the others leave bytes alone
    assert made["qwen2"]("e\u0301")["input_ids"] == made["qwen2"]("é")["input_ids"]
    assert made["smollm"]("e\u0301")["input_ids"] != made["smollm"]("é")["input_ids"]


def test_smollm_splits_every_kind_of_number():
    metadata = tokenizer_metadata()
    metadata["tokenizer.ggml.merges"] += ["Ġ Â"]
    metadata["tokenizer.ggml.tokens"] += ["ĠÂ"]
    metadata["tokenizer.ggml.token_type"] += [1]
    # transformers' GGUF reader does not know this pre-tokenizer and merges the space here
    assert pieces(tk.gguf_tokenizer(metadata), "a ½") == ["a", "Ġ", "Â", "½"]


def test_llama3_takes_whole_words_before_merging():
    for pre, expected in [("llama-bpe", ["xyz"]), ("qwen2", ["x", "y", "z"])]:
        metadata = tokenizer_metadata(pre)
        metadata["tokenizer.ggml.tokens"] += ["xyz"]  # no merge leads there
        metadata["tokenizer.ggml.token_type"] += [1]
        assert pieces(tk.gguf_tokenizer(metadata), "xyz") == expected


def test_bos_is_added_only_where_the_file_says_so(tok):
    with_bos = tk.gguf_tokenizer(tokenizer_metadata("llama-bpe", add_bos_token=True))
    assert with_bos("a")["input_ids"][0] == 1
    assert with_bos("a", add_special_tokens=False)["input_ids"] == tok("a")["input_ids"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "tekken"}, "got 'tekken', expected one of smollm, qwen2, llama-bpe"),
        ({"pre": None}, "tokenizer.ggml.pre: got None"),
        ({"model": "llama"}, "tokenizer.ggml.model: got 'llama', expected 'gpt2'"),
        ({"merges": None}, "tokenizer.ggml.merges: missing"),
        ({"tokens": None}, "tokenizer.ggml.tokens: missing"),
    ],
)
def test_other_vocabularies_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tk.gguf_tokenizer(tokenizer_metadata(**changes))


def sentencepiece(text, tokens, scores, kinds):
    """SentencePiece's BPE, spelled out: defined pieces first, then always the best pair."""
    defined = sorted((t for t, k in zip(tokens, kinds, strict=True) if k == 4), key=len)[::-1]
    pattern = "|".join(map(re.escape, defined))
    best = {t: s for t, s, k in zip(tokens, scores, kinds, strict=True) if k == 1}
    out = []
    for part in re.split(f"({pattern})", text) if pattern else [text]:
        symbols = [part] if part in defined else list(part.replace(" ", "▁"))
        while part not in defined:
            pairs = [
                (best[a + b], -i)
                for i, (a, b) in enumerate(itertools.pairwise(symbols))
                if a + b in best
            ]
            if not pairs:
                break
            i = -max(pairs)[1]
            symbols[i : i + 2] = ["".join(symbols[i : i + 2])]
        for s in symbols:
            known = s in best or s in defined
            out += [s] if known else [f"<0x{b:02X}>" for b in s.encode()]
    return [tokens.index(s) for s in out if s]


SPACED = [
    "the cat  sat on the mat\n\nand then\nsaid: héllo 🙂",
    "  <table>the</table> them other  there",
    "ththth aatt",
]


def test_gemmas_vocabulary_gives_sentencepieces_ids():
    words = ["th", "at", "▁t", "the", "▁th", "▁the", "er", "▁a", "▁s", "an", "and", "ther", "▁▁"]
    letters = sorted(set("".join(SPACED).replace(" ", "▁")) - set("🙂\né"))
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "\n\n", "\n", "  ", "<table>", "</table>"]
    kinds = [3] * 4 + [4] * 5 + [6] * 256 + [1] * (len(words) + len(letters))
    tokens += [f"<0x{b:02X}>" for b in range(256)] + words + letters
    scores = [-1000.0] * 9 + [0.0] * 256 + [-float(i) for i in range(len(words) + len(letters))]
    fields = {"model": "llama", "pre": "default", "add_space_prefix": False, "merges": None}
    fields |= {"tokens": tokens, "scores": scores, "token_type": kinds, "add_bos_token": True}
    fields |= {"bos_token_id": 2, "eos_token_id": 1, "padding_token_id": 0, "unknown_token_id": 3}
    tokenizer = tk.gguf_tokenizer(tokenizer_metadata(**fields))
    for text in SPACED:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == sentencepiece(text, tokens, scores, kinds)
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("the")[0] == 2
    with pytest.raises(ValueError, match="scores: got scores that rise"):
        tk.gguf_tokenizer(tokenizer_metadata(**{**fields, "scores": [-s for s in scores]}))


@pytest.mark.slow
def test_the_real_gemma_vocabulary_gives_sentencepieces_ids():
    path = tiny.real_gguf("gemma-3-270m-*.gguf")
    if path is None:
        pytest.skip("no gemma-3-270m GGUF here")
    metadata = read_header(path).metadata
    tokenizer = tk.gguf_tokenizer(metadata)
    fields = [metadata[f"tokenizer.ggml.{k}"] for k in ("tokens", "scores", "token_type")]
    for text in [
        *SPACED,
        "Internationalization, 12345 tests;\tdef f(x):\n    return x**2  # 你好世界",
    ]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == sentencepiece(text, *fields)
        assert tokenizer.decode(ids) == text


def test_vocabulary_larger_than_the_embedding_is_refused(tok):
    tk.check_vocabulary(tok, len(tok))
    with pytest.raises(ValueError, match=rf"got id {len(tok) - 1} .*vocabulary of {len(tok) - 1}"):
        tk.check_vocabulary(tok, len(tok) - 1)


def test_chat_text_ends_with_the_assistant_turn(tok):
    text = templates.chat_text(tok, CHAT)
    assert text.endswith("And 13?\nAnswer:<|im_end|>\n<|im_start|>assistant\n")
    assert templates.chat_text(tok, CHAT, add_generation_prompt=False).endswith(
        "Answer:<|im_end|>\n"
    )


def test_chat_text_needs_a_template_that_takes_the_roles():
    tokenizer = tk.gguf_tokenizer(tokenizer_metadata())
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ValueError, match=r"roles \['system'\]: no system role"):
        templates.chat_text(tokenizer, [{"role": "system", "content": "x"}])
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chat_template: the tokenizer has none"):
        templates.chat_text(tokenizer, CHAT)


def test_verdicts_are_tokenized_where_they_stand(tok):
    pos, neg = tk.free_label_tokens(tok, "Answer:", " True", " False")
    assert tok.convert_ids_to_tokens([pos, neg]) == ["ĠTrue", "ĠF"]


@pytest.mark.parametrize(
    ("prompt", "pos", "neg", "message"),
    [
        ("Answer:", " False", " Fine", "both start with the token ' F'"),
        ("Answer: ", "Fine", "Foo", "Move a trailing space"),
        ("Answer:", "", " False", "not tokenized apart"),
    ],
)
def test_verdicts_that_cannot_be_told_apart(tok, prompt, pos, neg, message):
    with pytest.raises(ValueError, match=message):
        tk.free_label_tokens(tok, prompt, pos, neg)


@pytest.mark.slow
@pytest.mark.skipif(smollm2_path() is None, reason="needs the SmolLM2 GGUF")
def test_smollm2_tokenizer_equals_transformers():
    from transformers import AutoTokenizer

    path = smollm2_path()
    ours = tk.gguf_tokenizer(read_header(path).metadata)
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    rng = np.random.default_rng(0)
    noise = [
        "".join(chr(c) for c in rng.choice([*range(32, 127), 10, 233, 8364], 40)) for _ in range(50)
    ]
    for text in [*TEXTS, *noise]:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
        assert ours.decode(ours(text)["input_ids"]) == text
    for generate in (False, True):
        rendered = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=generate)
        assert templates.chat_text(ours, CHAT, generate) == rendered
    assert ours.get_vocab() == theirs.get_vocab()
    ids = ours(rendered)["input_ids"]
    start, _ = positions.span(ours, ids, len(ids), "before_answer")
    assert ours.decode(ids[start:]).startswith("\nAnswer:<|im_end|>")
