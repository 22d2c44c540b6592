"""Out to an ordinary Hugging Face folder and back; weights and configs that do not fit."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import traverse_util
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import reptune_jax as rt
from reptune_jax.hub import export
from reptune_jax.model import families
from reptune_jax.model.arch import Rope
from tests.support import tiny
from tests.support import torch_reference as ref

PROMPTS = ["Tell me.", "What do you think of the weather in the mountains?"]


def edit_config(folder, **changes):
    """None removes a key."""
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {k: v for k, v in config.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(kept))


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_out_and_in_again_is_the_same_to_the_byte(variant, tmp_path):
    maker, overrides = tiny.VARIANTS[variant]
    folder = maker(tmp_path / "in", **overrides)
    rt.save_hf(rt.load(str(folder)), tmp_path / "out")
    want = load_file(folder / "model.safetensors")
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].dtype == array.dtype and got[name].tobytes() == array.tobytes(), name
    configs = [json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "out")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("variant", ["llama_biases", "qwen2_tied"])
def test_transformers_loads_the_export_and_says_the_same(variant, tmp_path):
    maker, overrides = tiny.VARIANTS[variant]
    folder, out = maker(tmp_path / "in", bos=True, **overrides), tmp_path / "out"
    model = rt.load(str(folder))
    assert rt.save_hf(model, out, card="# Mine\n") == out
    assert (out / "README.md").read_text() == "# Mine\n"
    exported, info = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(out)
    inputs = ref.encode(tokenizer, PROMPTS, chat=True)
    again = ref.encode(AutoTokenizer.from_pretrained(folder), PROMPTS, chat=True)
    assert inputs["input_ids"].tolist() == again["input_ids"].tolist()
    with torch.no_grad():
        args = inputs["input_ids"], inputs["attention_mask"]
        want = ref.logits(ref.load(folder), *args)
        torch.testing.assert_close(ref.logits(exported.eval(), *args), want, atol=1e-4, rtol=1e-4)
    ours = np.asarray(model.forward(*(a.numpy().astype(np.int32) for a in args)).logits_BxTxV)
    real = args[1].bool()
    assert np.abs(ours - want.numpy())[real].max() < 1e-4 * want[real].abs().max()
    assert ref.greedy(exported, tokenizer, PROMPTS, 12) == model.generate(PROMPTS, 12)
    assert exported.generation_config.eos_token_id == tiny.END_ID


def test_bfloat16_goes_out_as_bfloat16(tmp_path):
    folder = tiny.make_llama(tmp_path / "in")
    edit_config(folder, torch_dtype="float32", dtype=None)  # the old name of the key
    rt.save_hf(rt.load(str(folder), dtype="bfloat16"), tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {p.dtype for p in exported.parameters()} == {torch.bfloat16}
    for name, tensor in ref.load(folder).state_dict().items():
        assert torch.equal(exported.state_dict()[name], tensor.bfloat16()), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16" and "dtype" not in config


# ---------------------------------------------------------------- all or nothing


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return rt.load(str(tiny.make_llama(tmp_path_factory.mktemp("llama"))))


def test_a_folder_with_something_in_it_is_refused(model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for target in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(ValueError, match="is a file or not empty, expected a new folder"):
            rt.save_hf(model, target)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    rt.save_hf(model, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").exists()


@pytest.mark.parametrize("step", ["side_files.write", "safetensors_io.save_tensors", "os.replace"])
def test_a_failure_midway_leaves_nothing_behind(step, model, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk gone")

    monkeypatch.setattr(f"{export.__name__}.{step}", fail)
    with pytest.raises(OSError, match="disk gone"):
        rt.save_hf(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_no_reader_would_take_is_not_written(model, tmp_path):
    """A bias baked in float16 that float16 does not hold."""
    path = ("blocks", "mlp", "down", "kernel")
    flat = traverse_util.flatten_dict(model.params)
    for dtype, value in (("float16", 1e5), ("bfloat16", np.nan), ("float32", np.inf)):
        params = {k: jnp.asarray(v, dtype) for k, v in flat.items()}
        params[path] = params[path].at[1, 2, 3].set(value)
        broken = dataclasses.replace(
            model, params=traverse_util.unflatten_dict(params), dtype=jnp.dtype(dtype)
        )
        with pytest.raises(ValueError, match=rf"layers.1.mlp.down_proj.* not finite in {dtype}"):
            rt.save_hf(broken, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- what does not fit


def test_weights_that_do_not_fit_are_all_named_in_one_error(tmp_path):
    folder = tiny.make_llama(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"], tensors["model.layers.2.mlp.up_proj.weight"]
    tensors["model.layers.9.mlp.up_proj.weight"] = np.zeros((96, 64), np.float32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)  # ignored
    wrong = "model.layers.1.self_attn.k_proj.weight"
    tensors[wrong] = tensors[wrong].T.copy()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError) as error:
        rt.load(str(folder))
    text = str(error.value)
    for line in (
        f"{folder}: 4 weights do not fit config.json (llama)",
        "missing model.norm.weight [64]",
        "missing model.layers.2.mlp.up_proj.weight [96, 64]",
        "unknown model.layers.9.mlp.up_proj.weight",
        f"{wrong}: got shape [64, 32], expected [32, 64]",
        "Check that config.json belongs to these weights.",
    ):
        assert line in text
    assert "inv_freq" not in text


def test_a_written_out_tied_head_is_accepted(tmp_path):
    folder = tiny.make_qwen2(tmp_path, tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "head" not in rt.load(str(folder)).params


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type: got 'mamba', expected one of gemma, .* llama"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            "rope_type: got 'yarn', expected default, linear or llama3",
        ),
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu', expected 'silu'"),
        ({"hidden_size": None}, "hidden_size: missing from the model's config"),
    ],
)
def test_configs_that_would_be_computed_wrongly_are_refused(changes, message, tmp_path):
    folder = tiny.make_llama(tmp_path)
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message) as error:
        rt.load(str(folder))
    assert str(folder) in str(error.value)


def test_the_old_form_of_rotary_settings_equals_the_new(tmp_path):
    new = families.read_rope
    assert new({"rope_theta": 5e5}) == Rope(5e5) == new({"rope_parameters": {"rope_theta": 5e5}})
    for given in (tiny.LINEAR_ROPE, tiny.LLAMA3_ROPE):
        scaling = {k: v for k, v in given.items() if k != "rope_theta"}
        old = {"rope_theta": given["rope_theta"], "rope_scaling": scaling}
        assert new(old) == new({"rope_parameters": given}) != Rope(given["rope_theta"])
    with pytest.raises(ValueError, match="factor: missing from the model's config"):
        new({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}})
    older = {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4.0}}
    assert new(older) == new({"rope_parameters": tiny.LINEAR_ROPE})
    folder = tiny.make_llama(tmp_path, rope_parameters=tiny.LINEAR_ROPE)
    want = rt.load(str(folder)).arch
    edit_config(folder, rope_parameters=None, **older)
    assert rt.load(str(folder)).arch == want
