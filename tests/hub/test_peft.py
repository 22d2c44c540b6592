"""Adapters out to Hugging Face's peft and in from it; foreign ones are refused by name."""

import json

import numpy as np
import pytest
from peft import PeftModel
from safetensors.numpy import load_file, save_file

import reptune_jax as rt
from reptune_jax import convert, lm, study
from reptune_jax.evals import arms
from reptune_jax.folder import RunName, Study
from reptune_jax.hub import peft
from tests.support import lora_case, tiny
from tests.support import torch_reference as ref
from tests.support.peft_case import (
    assert_same,
    change,
    ours,
    peft_adapter,
    torch_logits,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def model(folder):
    return lm.load(str(folder), "float32")


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(4, tiny.VOCAB, (2, 12))


@pytest.mark.parametrize("modules", [("attn/v", "attn/o"), lora_case.ALL])
def test_peft_loads_our_adapter_and_says_the_same(modules, model, folder, ids, tmp_path):
    run, _, _ = lora_case.make_run(tmp_path / "run", model, modules=modules)
    out = convert.run(str(run), str(tmp_path / "adapter"), format="adapter")
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8.0)
    assert config["layers_to_transform"] == [1, 2]
    assert str(folder) not in (out / "adapter_config.json").read_text()  # nor anybody's paths
    theirs = PeftModel.from_pretrained(ref.load(folder), out).eval()
    adapted = [name for name, _ in theirs.named_parameters() if "lora_A" in name]
    assert len(adapted) == 2 * (2 if len(modules) == 2 and modules[0] == "attn/v" else 7)
    tuned = arms.tuned(model, run).model
    assert_same(torch_logits(theirs, ids), ours(tuned, ids), ours(model, ids))
    again = rt.load_adapter(model, out)
    np.testing.assert_allclose(ours(again, ids), ours(tuned, ids), atol=1e-5)


def test_a_study_exports_a_lora_runs_adapter_once(model, ids, tmp_path):
    run, _, _ = lora_case.make_run(tmp_path / "dual+_s0", model)
    folder, name = Study(tmp_path), RunName("dual", 1, 0)
    study.export_adapter(folder, model, name)
    out = tmp_path / "export" / "dual+_s0_adapter"
    before = (out / "adapter_model.safetensors").stat().st_mtime_ns
    study.export_adapter(folder, model, name)
    assert (out / "adapter_model.safetensors").stat().st_mtime_ns == before
    got = ours(rt.load_adapter(model, out), ids)
    np.testing.assert_allclose(got, ours(arms.tuned(model, run).model, ids), atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear", "use_rslora": True},
        {
            "target_modules": ["o_proj", "down_proj"],
            "layers_to_transform": [0, 3],
            "rank_pattern": {"down_proj": 2},
            "alpha_pattern": {r"layers\.3\.self_attn\.o_proj": 11},
        },
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_we_load_pefts_adapter_and_say_the_same(settings, model, folder, ids, tmp_path):
    theirs = peft_adapter(folder, tmp_path / "adapter", **settings)
    before = np.asarray(model.params["blocks"]["attn"]["v"]["kernel"]).copy()
    got = rt.load_adapter(model, tmp_path / "adapter")
    assert_same(ours(got, ids), torch_logits(theirs, ids), ours(model, ids))
    assert (np.asarray(model.params["blocks"]["attn"]["v"]["kernel"]) == before).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "got use_dora True, expected False"),
        ({"bias": "all"}, "got bias 'all', expected 'none'"),
        ({"modules_to_save": ["lm_head"]}, r"got modules_to_save \['lm_head'\], expected None"),
        ({"peft_type": "IA3"}, "got peft_type 'IA3', expected 'LORA'"),
        ({"r": 8}, r"q_proj got lora_A \[4, 64\] and lora_B \[64, 4\], expected \[8, 64\]"),
    ],
)
def test_settings_that_are_not_computed_are_refused(changes, message, model, folder, tmp_path):
    peft_adapter(folder, tmp_path, target_modules=["q_proj"])
    change(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        rt.load_adapter(model, tmp_path)


def test_adapters_of_another_base_are_refused(model, folder, tmp_path):
    small = tiny.make_llama(tmp_path / "small", num_hidden_layers=2, hidden_size=32)
    other = lm.load(str(small), "float32")
    peft_adapter(folder, tmp_path / "wide", target_modules=["q_proj"], layers_to_transform=[1])
    with pytest.raises(ValueError, match=r"expected \[4, 32\] and .*it is for .*llama"):
        rt.load_adapter(other, tmp_path / "wide")
    peft_adapter(folder, tmp_path / "deep", target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"layers.2.self_attn.q_proj.*no LoRA weight of this base"):
        rt.load_adapter(other, tmp_path / "deep")
    run, _, _ = lora_case.make_run(tmp_path / "run", model)
    out = convert.run(str(run), str(tmp_path / "ours"), format="adapter")
    twin = lm.load(str(tiny.make_llama(tmp_path / "twin", seed=1)), "float32")
    with pytest.raises(ValueError, match=rf"made for llama\d* \({model.sha}\), got base"):
        rt.load_adapter(twin, out)


def test_folders_that_hold_no_adapter_are_refused(model, folder, tmp_path):
    with pytest.raises(ValueError, match=r"has no adapter_config.json, expected a PEFT adapter"):
        rt.load_adapter(model, folder)
    peft_adapter(folder, tmp_path, target_modules=["q_proj"])
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    lost = next(name for name in tensors if "lora_B" in name)
    save_file({k: v for k, v in tensors.items() if k != lost}, path)
    with pytest.raises(ValueError, match=r"q_proj lacks lora_B"):
        rt.load_adapter(model, tmp_path)
    embedding = {"base_model.model.model.embed_tokens.lora_embedding_A": np.zeros((4, 320), "f4")}
    save_file(tensors | embedding, path)
    with pytest.raises(ValueError, match=r"got base_model.*lora_embedding_A, which is no LoRA"):
        rt.load_adapter(model, tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"has no adapter_model.safetensors"):
        rt.load_adapter(model, tmp_path)


def test_projections_that_a_family_fuses_have_no_adapter_of_their_own(tmp_path):
    arch = rt.load(str(tiny.make_family(tmp_path / "base", "phi3"))).arch
    about = {"rank": 2, "alpha": 4.0, "targets": ["attn/o", "attn/v"], "layers": (0, 1)}
    with pytest.raises(ValueError, match=r"got attn/v, which phi3 fuses .*--format=hf"):
        peft.save_adapter(tmp_path / "out", arch, {}, about, ("base", "sha"), "")
    assert not (tmp_path / "out").exists()
