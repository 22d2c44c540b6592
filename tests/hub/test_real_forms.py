"""The files of models that people bring, in small: in, prompt, end of turn, out, and in again.

Config keys, tokenizer classes, special tokens and chat templates are spelled as the real models'
files spell them; weights are random. The `tokenizers` library and a template rendered by hand say
which ids are right, transformers 5 and (where REPTUNE_OLD_PYTHON names one) 4.57 which logits.
"""

import json
from typing import Any, NamedTuple

import jinja2
import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer

import reptune_jax as rt
from tests.support import old_reader, tiny
from tests.support import torch_reference as ref
from tests.support.folders import edit_config, spaced_tokenizer

_INST = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} \
[/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
_CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_QWEN3 = (
    _CHATML.removesuffix("{% endif %}")
    + "{% if enable_thinking is defined and \
enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
_SMOLLM3 = "{% set today = strftime_now('%d %B %Y') %}" + _CHATML
_LLAMA3 = "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\
\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>\
assistant<|end_header_id|>\n\n{% endif %}"
_GEMMA = "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' \
else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}\
<start_of_turn>model\n{% endif %}"
_PHI3 = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}\
{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
_GRANITE = "{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}\
<|end_of_text|>\n{% endfor %}{% if add_generation_prompt %}<|start_of_role|>assistant\
<|end_of_role|>{% endif %}"
_OLMO2 = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|user|>\n{{ m.content }}\
\n{% else %}<|assistant|>\n{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}<|assistant|>\n{% endif %}"

_LINEAR = {"rope_type": "linear", "factor": 4.0}
_GEMMA3 = {"rope_theta": 50_000.0, "rope_scaling": _LINEAR, "rope_local_base_freq": 100.0}
_SPACED = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2 of `spaced_tokenizer`


class Form(NamedTuple):
    """How a model's files are spelled."""

    family: str  # of `tiny.FAMILIES`
    config: dict[str, Any]  # None: the real file lacks the key
    tokens: tuple[str, ...]  # the special tokens with ids 0, 1, 2, 3
    template: str
    cls: str  # tokenizer_class
    ends: tuple[int, ...]  # that must end an answer
    eos: Any = 2  # of config.json
    generation: dict[str, Any] | None = None
    bos: int | None = None
    vocab: int = tiny.VOCAB


FORMS = {
    "Llama-2-7b-chat": Form(
        "llama", {"rope_theta": None}, _SPACED, _INST, "LlamaTokenizer", (2,),
        generation={"eos_token_id": 2, "temperature": 0.6, "top_p": 0.9, "do_sample": True}, bos=1,
    ),
    "Llama-3.1-8B-Instruct": Form(
        "llama", {"rope_theta": 10_000.0, "rope_scaling": tiny.LLAMA3_ROPE},
        ("<|end_of_text|>", "<|start_header_id|>", "<|eot_id|>", "<|begin_of_text|>"),
        _LLAMA3, "PreTrainedTokenizerFast", (0, 2), eos=[0], bos=3,
    ),
    "Mistral-7B-Instruct": Form(
        "mistral", {"rope_theta": 10_000.0}, _SPACED, _INST, "LlamaTokenizer", (2,), bos=1,
    ),
    "Qwen2.5-7B-Instruct": Form(
        "qwen2", {"rope_theta": 10_000.0, "use_sliding_window": False, "layer_types": None},
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim|>"), _CHATML, "Qwen2Tokenizer",
        (2, 0), generation={"eos_token_id": [2, 0], "pad_token_id": 0, "repetition_penalty": 1.05},
    ),
    "Qwen3-8B": Form(
        "qwen3", {"rope_theta": 10_000.0},
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim|>"), _QWEN3, "Qwen2Tokenizer", (2,),
    ),
    "gemma-2-2b-it": Form(
        "gemma2", {"rope_theta": 10_000.0}, ("<pad>", "<start_of_turn>", "<eos>", "<bos>",
        ), _GEMMA, "GemmaTokenizer", (2,), bos=3,
    ),
    "gemma-3-1b-it": Form(
        "gemma3_text", _GEMMA3, ("<eos>", "<start_of_turn>", "<end_of_turn>", "<bos>"), _GEMMA,
        "GemmaTokenizer", (0, 2), eos=0, bos=3, vocab=tiny.VOCAB + 1,
    ),
    "Phi-3-mini-4k-instruct": Form(
        "phi3", {"rope_theta": 10_000.0, "partial_rotary_factor": 0.5}, ("<|endoftext|>",
        "<|user|>", "<|end|>", "<|assistant|>"), _PHI3, "LlamaTokenizer", (0, 2), eos=0,
    ),
    "SmolLM2-135M-Instruct": Form(
        "llama", {"rope_theta": 10_000.0},
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"), _CHATML, "GPT2Tokenizer",
        (2,), generation={"eos_token_id": 2, "pad_token_id": 2},
    ),
    "SmolLM3-3B": Form(
        "smollm3", {"rope_theta": 10_000.0},
        ("<|end_of_text|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>"), _SMOLLM3,
        "PreTrainedTokenizerFast", (2,), eos=2,
    ),
    "granite-3.1-2b-instruct": Form(
        "granite", {"rope_theta": 10_000.0},
        ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<fim_pad>"), _GRANITE,
        "GPT2Tokenizer", (2,), eos=2,
    ),
    "OLMo-2-7B-Instruct": Form(
        "olmo2", {"rope_theta": 10_000.0},
        ("<|pad|>", "<|user|>", "<|endoftext|>", "<|assistant|>"), _OLMO2, "GPT2Tokenizer", (2,),
        bos=2,
    ),
}  # fmt: skip
CHAT = [{"role": "user", "content": "Is 12 even?"}]


def write(form: Form, folder):
    """The model's folder, and its tokenizer as the `tokenizers` library reads it."""
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}
    quirks = plain if form.family == "llama" and not form.config.get("rope_scaling") else {}
    tiny.make_family(folder, form.family, **quirks)
    old = {"torch_dtype": "float32", "dtype": None, "eos_token_id": form.eos}
    # Of version 4: the base beside its scaling.
    scaling = {
        k: v for k, v in (form.config.get("rope_scaling") or {}).items() if k != "rope_theta"
    }
    old |= {"rope_parameters": None, "bos_token_id": form.bos}
    edit_config(folder, **old | form.config | {"rope_scaling": scaling or None})
    (folder / "generation_config.json").unlink(missing_ok=True)
    if form.generation:
        (folder / "generation_config.json").write_text(json.dumps(form.generation))
    for name in ("special_tokens_map.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    if form.tokens == _SPACED:
        core = spaced_tokenizer(folder, form.cls, chat_template=form.template)
        return folder, core
    text = (folder / "tokenizer.json").read_text()
    for ours, theirs in zip((tiny.PAD, tiny.START, tiny.END, tiny.BOS), form.tokens, strict=True):
        text = text.replace(json.dumps(ours), json.dumps(theirs))
    core = Tokenizer.from_str(text)
    if form.vocab > tiny.VOCAB:  # Gemma 3's text models have one for images
        core.add_special_tokens([AddedToken("<image_soft_token>", normalized=False)])
    core.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": form.cls, "chat_template": form.template}
    about |= {"clean_up_tokenization_spaces": True}
    about |= {"bos_token": form.tokens[form.bos]} if form.bos is not None else {}
    eos = form.eos[0] if isinstance(form.eos, list) else form.eos
    about["eos_token"] = form.tokens[eos]
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder, core


@pytest.fixture(params=FORMS)
def brought(request, tmp_path):
    """(form, its folder, the `tokenizers` object, the model as we load it)"""
    form = FORMS[request.param]
    folder, core = write(form, tmp_path / request.param)
    return form, folder, core, rt.load(str(folder))


def right_ids(form: Form, core) -> list[int]:
    """Of CHAT: the template rendered by hand, and the `tokenizers` library."""
    eos = form.eos[0] if isinstance(form.eos, list) else form.eos
    text = jinja2.Environment().from_string(form.template).render(
        messages=CHAT, add_generation_prompt=True, bos_token=form.tokens[form.bos or 0],
        eos_token=form.tokens[eos], strftime_now=lambda _: "today",
    )  # fmt: skip
    return core.encode(text, add_special_tokens=False).ids


def test_what_comes_in_goes_out_and_is_the_same(brought, tmp_path):
    form, folder, core, model = brought
    ids = model.encode_prompt(CHAT)
    assert ids == right_ids(form, core)
    assert set(form.ends) <= set(model.stop_ids)
    tokens_BxT = np.array([ids])
    logits_V = np.asarray(model.forward(tokens_BxT).logits_BxTxV)[0, -1]
    new = model.generate_each([ids], 8)
    out = rt.save_hf(model, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    again = rt.load(str(out))
    assert again.encode_prompt(CHAT) == ids and again.stop_ids == model.stop_ids
    assert again.generate_each([ids], 8) == new
    theirs = ref.load(out)
    with torch.no_grad():
        want_V = theirs(torch.tensor(tokens_BxT)).logits[0, -1].numpy()
    np.testing.assert_allclose(logits_V, want_V, atol=1e-4 * np.abs(want_V).max())


@pytest.mark.slow
@pytest.mark.skipif(old_reader.PYTHON is None, reason="no REPTUNE_OLD_PYTHON")
def test_transformers_4_says_the_same_of_what_goes_out(brought, tmp_path):
    form, _, core, model = brought
    old, ids = old_reader.read(rt.save_hf(model, tmp_path / "out")), model.encode_prompt(CHAT)
    assert old["version"].startswith("4.")
    assert old["chat"] == ids == right_ids(form, core)
    logits_V = np.asarray(model.forward(np.array([ids])).logits_BxTxV)[0, -1]
    np.testing.assert_allclose(old["logits"], logits_V, atol=1e-4 * np.abs(logits_V).max())
    said = model.generate_each([ids], 8)[0]
    assert old["new"][: len(said)] == said
