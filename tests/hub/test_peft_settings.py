"""Settings of peft's adapters: read, of no matter, or refused by name; fused modules; rounding."""

import json
import time

import jax.numpy as jnp
import numpy as np
import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file

import reptune_jax as rt
from reptune_jax import convert, lm
from reptune_jax.hub import peft_config
from tests.support import lora_case, tiny
from tests.support import torch_reference as ref
from tests.support.peft_case import (
    assert_same,
    change,
    ours,
    peft_adapter,
    randomize,
    torch_logits,
)

IDS = np.random.default_rng(0).integers(4, tiny.VOCAB, (2, 12))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def model(folder):
    return lm.load(str(folder), "float32")


def from_peft(folder, adapter):
    return torch_logits(PeftModel.from_pretrained(ref.load(folder), adapter).eval(), IDS)


# ---------------------------------------------------------------- how an adapter began


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "mica", "eva"])
def test_beginnings_that_leave_the_base_alone_are_merged_as_peft_does(
    init, model, folder, tmp_path
):
    made = True if init == "eva" else init  # which needs data to begin with
    peft_adapter(folder, tmp_path, target_modules=["q_proj", "o_proj"], init_lora_weights=made)
    change(tmp_path, init_lora_weights=init)
    got = ours(rt.load_adapter(model, tmp_path), IDS)
    assert_same(got, from_peft(folder, tmp_path), ours(model, IDS))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_adapters_that_hold_a_part_of_their_base_are_refused(init, model, folder, tmp_path):
    peft_adapter(folder, tmp_path, target_modules=["q_proj"], init_lora_weights=init)
    with pytest.raises(ValueError, match=f"got init_lora_weights '{init}'.*merge_and_unload"):
        rt.load_adapter(model, tmp_path)


def test_a_pissa_adapter_that_peft_converted_is_an_ordinary_one(model, folder, tmp_path):
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa", r=4)
    theirs = get_peft_model(ref.load(folder), config)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "init")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    randomize(theirs)
    theirs.save_pretrained(
        tmp_path / "out", path_initial_model_for_weight_conversion=tmp_path / "init"
    )
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 8
    got = ours(rt.load_adapter(model, tmp_path / "out"), IDS)
    assert_same(got, torch_logits(theirs.eval(), IDS), ours(model, IDS))


# ---------------------------------------------------------------- keys


FIELDS = LoraConfig().to_dict()
OPEN = peft_config._READ | peft_config._NO_MATTER


def test_every_key_of_peft_at_its_default_is_taken(model, folder, tmp_path):
    peft_adapter(folder, tmp_path, target_modules=["q_proj"])
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert len(stored.keys() - OPEN) > 10  # what peft writes, all of it off
    rt.load_adapter(model, tmp_path)
    assert FIELDS.keys() | {"runtime_config"} >= OPEN  # no key that peft does not have


@pytest.mark.parametrize("key", sorted(FIELDS.keys() - OPEN) + ["use_what_comes_next"])
def test_any_other_key_is_refused_by_name(key, model, folder, tmp_path):
    peft_adapter(folder, tmp_path, target_modules=["q_proj"])
    value = True if isinstance(FIELDS.get(key, False), bool) and "init" not in key else {"x": 1}
    change(tmp_path, **{key: value})
    with pytest.raises(ValueError, match=f"adapter_config.json: got {key} .*, expected"):
        rt.load_adapter(model, tmp_path)
    change(tmp_path, **{key: None})  # off, whatever it is
    rt.load_adapter(model, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": "four"}, "got r 'four', expected a whole number above 0"),
        ({"lora_alpha": None}, "got lora_alpha None, expected a number above 0"),
        (
            {"alpha_pattern": {"q_proj": True}},
            "got alpha_pattern of q_proj True, expected a number",
        ),
        (
            {"rank_pattern": {"(a+)+$": 2}},
            r"got rank_pattern '\(a\+\)\+\$', an expression, expected",
        ),
        ({"alpha_pattern": {"q_proj|v_proj": 2}}, r"alpha_pattern 'q_proj\|v_proj', an expression"),
        (
            {"alpha_pattern": {r"layers\.\d+\.q_proj": 2}},
            "an expression, expected names of modules",
        ),
        ({"target_modules": ["v_proj"]}, "holds .*q_proj.lora_A.*peft would pass over it"),
        ({"layers_to_transform": [0, 1]}, r"holds .*layers.2.*q_proj.*peft would pass over it"),
        ({"exclude_modules": ["self_attn.q_proj"]}, "holds .*q_proj.*peft would pass over it"),
    ],
)
def test_values_and_patterns_that_cannot_be_followed_are_refused(
    changes, message, model, folder, tmp_path
):
    peft_adapter(folder, tmp_path, target_modules=["q_proj"])
    change(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        rt.load_adapter(model, tmp_path)


def test_factors_that_are_not_finite_are_refused(model, folder, tmp_path):
    peft_adapter(folder, tmp_path, target_modules=["q_proj"])
    found = load_file(tmp_path / "adapter_model.safetensors")
    next(array for name, array in found.items() if "layers.2" in name)[0, 0] = np.inf
    save_file(found, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"layers.2.self_attn.q_proj has NaN or infinite weights"):
        rt.load_adapter(model, tmp_path)


def test_patterns_name_the_modules_that_they_name_for_peft(model, folder, tmp_path):
    """Suffixes at a dot, the first that fits; "^" and "$" fix the ends; "xq_proj" is no q_proj."""
    theirs = peft_adapter(
        folder,
        tmp_path,
        target_modules=["q_proj", "v_proj", "up_proj"],
        rank_pattern={r"layers\.1\.self_attn\.q_proj": 2, "q_proj": 3, "proj": 1, "_proj$": 1},
        alpha_pattern={"^model.layers.2.self_attn.v_proj$": 20, "^v_proj": 40, "up_proj": 3},
    )
    shapes = {k: v.shape for k, v in load_file(tmp_path / "adapter_model.safetensors").items()}
    ranks = [
        shapes[f"base_model.model.model.layers.{l}.self_attn.q_proj.lora_A.weight"][0]
        for l in (0, 1)
    ]
    assert ranks == [3, 2]
    got = ours(rt.load_adapter(model, tmp_path), IDS)
    assert_same(got, torch_logits(theirs, IDS), ours(model, IDS))


def test_a_long_pattern_takes_no_time(model, folder, tmp_path):
    peft_adapter(folder, tmp_path, target_modules=["q_proj"])
    change(tmp_path, rank_pattern={"a" * 100_000: 4, r"model\." * 20_000 + "x": 4})
    began = time.monotonic()
    rt.load_adapter(model, tmp_path)
    assert time.monotonic() - began < 5


def test_target_expressions_are_not_run(model, folder, tmp_path):
    theirs = peft_adapter(folder, tmp_path, target_modules=r".*\.(q|v)_proj")
    got = ours(rt.load_adapter(model, tmp_path), IDS)
    assert_same(got, torch_logits(theirs, IDS), ours(model, IDS))


# ---------------------------------------------------------------- fused modules


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("phi3", ["qkv_proj", "gate_up_proj"]),
        ("phi3", ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
        ("gpt2", ["c_attn", "c_proj", "c_fc"]),
        ("gpt_neox", ["query_key_value"]),
        ("gpt_neox", ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]),
    ],
)
def test_adapters_on_fused_modules_say_what_they_say_in_peft(family, targets, tmp_path):
    folder = tiny.make_family(tmp_path / "base", family)
    theirs = peft_adapter(
        folder,
        tmp_path / "adapter",
        target_modules=targets,
        fan_in_fan_out=family == "gpt2",
        rank_pattern={targets[0]: 3},
        alpha_pattern={targets[0]: 5},
    )
    base = lm.load(str(folder), "float32")
    got = ours(rt.load_adapter(base, tmp_path / "adapter"), IDS)
    assert_same(got, torch_logits(theirs, IDS), ours(base, IDS))


def test_of_a_fused_module_each_part_gets_its_own_rows(tmp_path):
    """By numbers of its own: one row of B alone, in the keys."""
    folder = tiny.make_family(tmp_path / "base", "phi3")
    peft_adapter(folder, tmp_path / "adapter", target_modules=["qkv_proj"])
    base = lm.load(str(folder), "float32")
    moved = rt.load_adapter(base, tmp_path / "adapter").params["blocks"]["attn"]
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.qkv_proj.lora_"
    delta = 1.5 * found[f"{name}B.weight"] @ found[f"{name}A.weight"]  # [64 + 32 + 32, 64]
    for part, rows in (("q", slice(0, 64)), ("k", slice(64, 96)), ("v", slice(96, 128))):
        before = np.asarray(base.params["blocks"]["attn"][part]["kernel"][1]).reshape(64, -1)
        after = np.asarray(moved[part]["kernel"][1]).reshape(64, -1)
        np.testing.assert_allclose(after - before, delta[rows].T, atol=1e-5)


# ---------------------------------------------------------------- rounding


@pytest.mark.parametrize(("scale", "least", "most"), [(0.1, 0, 5), (0.004, 25, 100)])
def test_a_merge_into_16_bits_says_what_is_left_of_the_update(
    scale, least, most, folder, tmp_path, capsys
):
    config = LoraConfig(target_modules=["v_proj"], r=4, lora_alpha=4)
    theirs = get_peft_model(ref.load(folder), config)
    randomize(theirs, scale=scale)
    theirs.save_pretrained(tmp_path)
    coarse = lm.load(str(folder), "bfloat16")
    before = np.asarray(coarse.params["blocks"]["attn"]["v"]["kernel"]).astype(np.float64)
    merged = rt.load_adapter(coarse, tmp_path).params["blocks"]["attn"]["v"]["kernel"]
    found = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.{}.self_attn.v_proj.lora_{}.weight"
    update = np.stack(
        [(found[name.format(l, "B")] @ found[name.format(l, "A")]).T for l in range(4)]
    )
    effect = np.asarray(merged).astype(np.float64) - before
    norm = np.linalg.norm(update)
    kept = np.linalg.norm(effect) / norm
    error = np.linalg.norm(effect.reshape(update.shape) - update) / norm
    assert least <= 100 * error <= most
    said = capsys.readouterr().out
    assert f"{tmp_path}: merged into bfloat16: the stored weights changed by {kept:.0%}" in said
    assert f"and {error:.0%} of it is rounding error" in said
    rt.load_adapter(lm.load(str(folder), "float32"), tmp_path)
    assert "merged into" not in capsys.readouterr().out


@pytest.mark.parametrize("rank", [0, 4])
def test_so_does_a_tuned_run_in_memory_and_on_disk(rank, folder, tmp_path, capsys):
    """And what is written in another type is rounded once: the base is not rounded before."""
    model = lm.load(str(folder), "bfloat16")
    run, _, _ = lora_case.make_run(tmp_path / "run", model, rank)
    tuned = convert.find_run(run)
    line = f"{run}: merged into {{}}: the stored weights changed by"
    assert tuned.over(model).params["blocks"]["attn"]["v"]["kernel"].dtype == jnp.bfloat16
    assert line.format("bfloat16") in capsys.readouterr().out
    exact = load_file(convert.run(str(run), str(tmp_path / "out")) / "model.safetensors")
    assert "merged into" not in capsys.readouterr().out
    half = convert.run(str(run), str(tmp_path / "half"), "hf", "float16", verify=True)
    assert line.format("float16") in capsys.readouterr().out
    for name, array in load_file(half / "model.safetensors").items():
        assert array.tobytes() == exact[name].astype(np.float16).tobytes(), name
