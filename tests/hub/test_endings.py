"""Which tokens end an answer, whatever file says so, and what was said before them."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from reptune_jax.hub import endings
from reptune_jax.hub.source import open_source
from reptune_jax.hub.tokenizer import gguf_tokenizer
from tests.support import tiny
from tests.support.hub_models import tokenizer_metadata

_TURNS = "{%% for m in messages %%}%s{%% endfor %%}"
_USER = "{% if m.role == 'user' %}"
_THINK = "{% if m.role != 'user' %}<think>\n\n</think>\n\n{% endif %}"
# The turns of these models' own templates, with what ends an answer in them.
TEMPLATES = {
    "chatml": ("<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n", "<|im_end|>"),
    "llama3": ("<|start|>{{ m.role }}<|h|>\n\n{{ m.content | trim }}<|eot_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n", "<end_of_turn>"),
    "phi3": ("<|{{ m.role }}|>\n{{ m.content }}<|end|>\n<|endoftext|>", "<|end|>"),
    "llama2": (_USER + "[INST] {{ m.content }}{% else %} {{ m.content }} </s>{% endif %}", "</s>"),
    "mistral": (_USER + "[INST]{{ m.content }}{% else %}{{ m.content }}</s>{% endif %}", "</s>"),
    "thinking": ("<|im_start|>{{ m.role }}\n" + _THINK + "{{ m.content }}<|end|>\n", "<|end|>"),
    "none": ("{{ m.role }}: {{ m.content }}\n", None),
}  # fmt: skip
_ADDED = ("<|im_start|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>")
_ADDED += ("</s>", "<think>", "</think>")


def tokenizer_of(template=None, **special):
    """Characters as tokens, and the added tokens of several families."""
    vocab = {chr(c): c - 32 for c in range(32, 127)} | {"\n": 95, "[UNK]": 96}
    core = Tokenizer(models.WordLevel(vocab, "[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(t, normalized=False) for t in _ADDED])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", **special)
    tokenizer.chat_template = template and _TURNS % template
    return tokenizer


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_template_writes_after_an_answer_ends_it(name):
    template, end = TEMPLATES[name]
    tokenizer = tokenizer_of(template)
    expected = None if end is None else tokenizer.convert_tokens_to_ids(end)
    assert endings.end_of_turn(tokenizer) == expected


def test_without_a_template_or_with_one_for_other_chats_no_turn_ends():
    assert endings.end_of_turn(tokenizer_of()) is None
    assert endings.end_of_turn(tokenizer_of("{{ raise_exception('tools only') }}")) is None
    assert endings.end_of_turn(tokenizer_of("{{ m.role + m.parts }}")) is None


def test_the_ends_are_those_of_all_files_together():
    tokenizer = tokenizer_of(TEMPLATES["llama3"][0], eos_token="<|endoftext|>")
    ids = tokenizer.convert_tokens_to_ids
    found = endings.stop_ids(tokenizer, [[7, 2, 7], 3, None], 200)
    assert found == (7, 2, 3, ids("<|endoftext|>"), ids("<|eot_id|>"))
    assert endings.stop_ids(None, [[5, 400, -1, True, "6"], None], 200) == (5,)


def test_a_folder_whose_config_names_only_the_end_of_text_ends_turns_too(tmp_path):
    # Llama 3's files without generation_config.json: answers ran on into a next turn.
    folder = tiny.make_llama(tmp_path)
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": tiny.PAD_ID}))
    assert open_source(folder).eos_ids == (tiny.PAD_ID, tiny.END_ID)


@pytest.mark.parametrize("end", ["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>"])
@pytest.mark.parametrize("kind", [3, 4])  # control, user-defined
def test_a_gguf_file_without_the_optional_key_ends_turns_by_their_text(end, kind):
    metadata = tokenizer_metadata()
    metadata["tokenizer.ggml.tokens"][2], metadata["tokenizer.ggml.eos_token_id"] = end, 0
    metadata["tokenizer.ggml.token_type"][2] = kind
    assert 2 in endings.gguf_ends(metadata)
    metadata["tokenizer.ggml.token_type"][2] = 1  # ordinary text that looks like it
    assert 2 not in endings.gguf_ends(metadata)


def test_llama3_files_begin_texts_with_bos_without_saying_so():
    for pre, begins in (("llama-bpe", True), ("qwen2", False)):
        tokenizer = gguf_tokenizer(tokenizer_metadata(pre, add_bos_token=None))
        assert (tokenizer("a")["input_ids"][0] == 1) == begins


def sentencepiece():
    """Llama 2's form: a space before words, whose decoder drops the first."""
    pieces = ["<unk>", "<s>", "</s>", "▁", "▁Paris", "a", "▁a", ".", "<0xC3>", "<0xA9>"]
    core = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True))
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", clean_up_tokenization_spaces=True
    )


def test_what_was_said_continues_the_text_before_it():
    tokenizer = sentencepiece()
    assert tokenizer.decode([4]) == "Paris"  # the space is gone
    assert endings.said(tokenizer, [4, 7, 2]) == " Paris."
    assert endings.said(tokenizer, [4, 3, 7]) == " Paris ."  # not tidied up to "Paris."
    assert endings.said(tokenizer, [8, 9]) == "é"
    assert endings.said(tokenizer, [2]) == ""


@pytest.mark.parametrize(
    "spelling",
    [
        {"additional_special_tokens": ["<|call|>"]},  # transformers 4
        {"extra_special_tokens": ["<|call|>"]},  # 5
        {"extra_special_tokens": {"call": "<|call|>"}},  # late 4.x
    ],
)
def test_special_tokens_of_every_spelling_are_not_said(tmp_path, spelling):
    core = tokenizer_of().backend_tokenizer
    core.add_tokens([AddedToken("<|call|>", special=False, normalized=False)])
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    plain = json.loads(path.read_text())
    for spelled, said in (({}, "Hi<|call|>"), (spelling, "Hi")):
        path.write_text(json.dumps(plain | spelled))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
        ids = tokenizer.encode("Hi<|call|>", add_special_tokens=False)
        assert endings.said(tokenizer, ids) == said
