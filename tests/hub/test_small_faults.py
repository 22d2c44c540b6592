"""Whole models with a small fault: loaded where it does no harm, else refused in one line."""

import json
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import save_file
from transformers import AutoTokenizer

import reptune_jax as rt
from reptune_jax import convert
from tests.support import hub_models, tiny
from tests.support import torch_reference as ref
from tests.support.folders import edit_config, rewrite

IMAGE = "<image_soft_token>"


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return tiny.make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def folder(clean, tmp_path):
    return shutil.copytree(clean, tmp_path / "in")


def add_tokens(folder, *tokens, **special):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    for name, token in special.items():
        setattr(tokenizer, name, token)
    tokenizer.save_pretrained(folder)
    return tokenizer


# ---------------------------------------------------------------- ids beyond the embedding


def test_added_tokens_beyond_the_embedding_do_no_harm_until_they_are_met(folder, clean, capsys):
    """The form of every Gemma 3 text model: one id, the vocabulary's size, for images."""
    tokenizer = add_tokens(folder, IMAGE)
    assert tokenizer.convert_tokens_to_ids(IMAGE) == tiny.VOCAB
    model = rt.load(str(folder))
    said = capsys.readouterr().out
    assert f"{folder}: {IMAGE} (added, ids from 320) lie beyond the model's vocabulary of" in said
    prompts = ["Tell me.", "What do you think of the weather?"]
    hf = ref.load(folder)
    want = ref.greedy(hf, tokenizer, prompts, 8)
    assert model.generate(prompts, max_new_tokens=8) == want
    assert model.generate(prompts, max_new_tokens=8) == rt.load(str(clean)).generate(prompts, 8)
    assert model.generate([f"See {IMAGE}."])  # within a message it is text
    met = rf"got '{IMAGE}' \(id 320\), expected tokens of the model's vocabulary of 320"
    for call in (
        lambda: model.generate([f"See {IMAGE}."], chat=False),
        lambda: model.loglikelihood([("See", f" {IMAGE}.")]),
        lambda: rt.extract(model, [(f"I love {IMAGE}", "I hate it")]),
    ):
        with pytest.raises(ValueError, match=met):
            call()


def test_a_padding_token_beyond_the_embedding_is_not_padded_with(folder, clean):
    """As fine-tunes of Llama have it: [PAD] added, nothing resized."""
    add_tokens(folder, "[PAD]", pad_token="[PAD]")
    model = rt.load(str(folder))
    assert model.tokenizer.pad_token_id == tiny.VOCAB
    assert model.pad_id == tiny.END_ID
    prompts = ["Tell me.", "What do you think of the weather?"]
    assert model.generate(prompts, 8) == rt.load(str(clean)).generate(prompts, 8)


def test_ordinary_tokens_and_ends_beyond_the_embedding_are_refused(folder):
    add_tokens(folder, "<end>", eos_token="<end>")
    with pytest.raises(ValueError, match=r"got id 320 \('<end>'\), expected ids below the model's"):
        rt.load(str(folder))
    add_tokens(folder, eos_token=tiny.END)
    edit_config(folder, vocab_size=300)
    with pytest.raises(ValueError, match=r"got id 319 \(.*belongs to another model"):
        rt.load(str(folder))


def test_many_added_tokens_are_named_in_one_line(folder, tmp_path, capsys):
    add_tokens(folder, *(f"<extra_{i}>" for i in range(9)))
    rt.load(str(folder))
    line = ": <extra_0>, <extra_1>, <extra_2> and 6 more (added, ids from 320) lie beyond"
    assert capsys.readouterr().out.count(line) == 1
    out = convert.run(str(folder), str(tmp_path / "out"), "hf", verify=True)
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_a_gguf_file_without_its_base_is_said(tmp_path, capsys):
    extra = {"rope.freq_base": None}
    path = hub_models.write_gguf(tmp_path / "m.gguf", hub_models.make_model("llama"), extra=extra)
    assert rt.load(str(path)).arch.rope.theta == 10_000.0
    assert capsys.readouterr().out.count(f"{path}: llama.rope.freq_base: not in the file") == 1


# ---------------------------------------------------------------- names in a wrapper


def state(folder, wrap):
    """Names and weights of a wrapped model, as a plain save of its state dict writes them."""
    wrapped = wrap(ref.load(folder))
    return {k: v.detach().contiguous().numpy().copy() for k, v in wrapped.state_dict().items()}


def with_adapter(model):
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))


@pytest.mark.parametrize(
    ("wrap", "line"),
    [
        (torch.compile, r"39 of 39 tensors have '_orig_mod\.' in their names.*torch.compile's"),
        (torch.nn.DataParallel, r"39 of 39 tensors have 'module\.'.*model\.module.*out of the nam"),
        (with_adapter, r"47 of 47 tensors have 'base_model\.model\.'.*PEFT's. Merge the adapter f"),
        (
            lambda model: with_adapter(model).base_model.model,
            r"4 of 47 tensors have '\.base_layer'.*PEFT's. Merge the adapter first",
        ),
        (lambda model: torch.nn.ModuleDict({"policy": model}), r"39 of 39 tensors have 'policy\.'"),
        (
            lambda model: torch.nn.ModuleDict({"language_model": model}),
            r"have 'language_model\.'.*of a model that also reads images. Save its language model",
        ),
        (lambda model: torch.nn.DataParallel(model.model), r"38 of 38 tensors have 'module\.'"),
    ],
    ids=["compile", "parallel", "peft", "peft_inside", "unknown", "images", "parallel_bare"],
)
def test_a_wrappers_names_are_refused_in_one_line(wrap, line, folder, clean):
    save_file(state(clean, wrap), folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=line) as error:
        rt.load(str(folder))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_language_models_within_a_larger_one_are_named(folder):
    def nest(found):
        for name in list(found):
            if name.startswith("model."):
                found[name.replace("model.", "model.language_model.", 1)] = found.pop(name)

    rewrite(folder, nest)
    with pytest.raises(
        ValueError, match=r"38 of 39 tensors have 'language_model\.' in their names"
    ):
        rt.load(str(folder))


def test_a_base_models_names_without_their_prefix_are_read(tmp_path):
    """AutoModel's form of a tied model: no "model." and no head."""
    folder = tiny.make_llama(tmp_path / "in", tie_word_embeddings=True)
    hf = ref.load(folder)
    bare = {k: v.numpy().copy() for k, v in hf.model.state_dict().items()}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    ids = np.random.default_rng(0).integers(4, tiny.VOCAB, (2, 12))
    with torch.no_grad():
        want = hf(torch.tensor(ids)).logits.numpy()
    got = np.asarray(rt.load(str(folder)).forward(ids.astype(np.int32)).logits_BxTxV)
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
