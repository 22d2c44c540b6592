"""Configs and weights of families: old and new forms, and what is refused by name."""

import functools
import json

import ml_dtypes
import numpy as np
import pytest

import reptune_jax as rt
from reptune_jax.model import families
from reptune_jax.model.arch import Layer, Rope
from tests.support import tiny
from tests.support import torch_reference as ref
from tests.support.folders import edit_config, rewrite


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(family) -> (folder, our model, the same in torch); each is made once."""

    @functools.cache
    def make(family):
        folder = tiny.make_family(tmp_path_factory.mktemp(family), family)
        return folder, rt.load(str(folder)), ref.load(folder)

    return make


def test_old_and_new_forms_of_a_config_say_the_same(tmp_path):
    gemma3 = tiny.make_family(tmp_path / "gemma3", "gemma3_text")
    want = rt.load(str(gemma3)).arch
    scaling = {"rope_type": "linear", "factor": 4.0}
    edit_config(gemma3, rope_parameters=None, layer_types=None, sliding_window_pattern=6)
    edit_config(gemma3, rope_theta=50_000.0, rope_local_base_freq=100.0, rope_scaling=scaling)
    assert rt.load(str(gemma3)).arch == want
    neox = tiny.make_family(tmp_path / "neox", "gpt_neox")
    want = rt.load(str(neox)).arch
    edit_config(neox, rope_parameters=None, rotary_pct=0.5, rotary_emb_base=10_000)
    assert rt.load(str(neox)).arch == want
    phi3 = tiny.make_family(tmp_path / "phi3", "phi3")
    want = rt.load(str(phi3)).arch
    edit_config(phi3, rope_parameters=None, partial_rotary_factor=0.5, rope_theta=10_000.0)
    assert rt.load(str(phi3)).arch == want


@pytest.mark.parametrize(
    ("family", "window"), [("qwen2", "sliding_window"), ("gemma2", None), ("smollm3", None)]
)
def test_layer_types_are_those_that_an_old_config_means(family, window, tmp_path):
    folder = tiny.make_family(tmp_path, family)
    want = rt.load(str(folder)).arch
    edit_config(folder, layer_types=None)
    assert rt.load(str(folder)).arch == want
    if window:
        edit_config(folder, use_sliding_window=False)
        assert rt.load(str(folder)).arch.kinds == (Layer(0, Rope(10_000.0)),)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gpt2", {"model_type": "mamba"}, "got 'mamba', expected one of gemma, gemma2, gemma3_"),
        ("gemma3_text", {"model_type": "gemma3"}, "got 'gemma3'.*reads images too; use a text-on"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "'longrope'"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention: got true"),
        ("gemma2", {"hidden_activation": "silu"}, "hidden_activation: got 'silu', expected 'gelu_"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 3}, "layer_types: got chunked_attent"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "got the kinds of 2, expected .* = 3"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "got the kinds of 2, expected those of num_hid"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "by_inverse_layer_idx: got true"),
        ("gpt2", {"n_layer": None}, "n_layer: missing from the model's config"),
        ("llama", {"num_attention_heads": None}, "num_attention_heads: missing from the model's"),
        ("llama", {"rope_parameters": {"full_attention": {}}}, "got one each for full_attention"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 1e6}}, "got rope_theta for gemma3_text"),
        ("gemma3_text", {"rope_scaling": {"type": "linear"}}, "got type = 'linear' for gemma3_te"),
        (
            "gpt_neox",
            {"rope_parameters": None, "rotary_emb_base": 1e4, "rope_theta": 2e4},
            r"rotary_emb_base: got 10000.0 and rope_theta 20000.0, expected one base",
        ),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window: got"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(family, changes, message, made):
    config = json.loads((made(family)[0] / "config.json").read_text()) | changes
    with pytest.raises(ValueError, match=message):
        families.from_config({k: v for k, v in config.items() if v is not None})


def test_more_tokens_than_learned_positions_are_refused(made):
    ours = made("gpt2")[1]
    with pytest.raises(ValueError, match=r"tokens: got rows of 300 .* at most 256, the positions"):
        ours.forward(np.zeros((1, 300), np.int32))


def test_fingerprints_of_models_did_not_change_with_new_fields(made):
    arch = made("llama")[1].arch
    assert repr(arch) == (
        "Arch(family='llama', V=320, D=64, N=3, H=4, K=2, Dh=16, F=96, rope=Rope(theta=10000.0, "
        "kind='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, "
        "original_positions=64), norm_eps=1e-05, tied=False, qkv_bias=False, o_bias=False, "
        "mlp_bias=False)"
    )
    assert "act='gelu_new', gated=False, norm='layer'" in repr(made("gpt2")[1].arch)


# ---------------------------------------------------------------- weights that do not fit


def test_weights_that_do_not_fit_are_all_named_in_one_error(tmp_path):
    folder = tiny.make_family(tmp_path, "gpt2")

    def damage(found):
        del found["transformer.h.1.attn.c_attn.weight"], found["transformer.wpe.weight"]
        name = "transformer.h.0.attn.c_attn.weight"
        found[name] = found[name].T.copy()  # a Linear's orientation
        found["transformer.h.2.attn.q_proj.weight"] = np.zeros((64, 64), np.float32)

    rewrite(folder, damage)
    with pytest.raises(ValueError) as error:
        rt.load(str(folder))
    for line in (
        "4 weights do not fit config.json (gpt2)",
        "missing transformer.h.1.attn.c_attn.weight [64, 192]",
        "missing transformer.wpe.weight [256, 64]",
        "unknown transformer.h.2.attn.q_proj.weight",
        "transformer.h.0.attn.c_attn.weight: got shape [192, 64], expected [64, 192]",
    ):
        assert line in str(error.value)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_weights_that_are_not_finite_are_named(dtype, tmp_path):
    folder = tiny.make_family(tmp_path, "phi3")

    def damage(found):
        found.update({k: v.astype(dtype) for k, v in found.items()})
        found["model.layers.1.self_attn.qkv_proj.weight"][3, 4] = np.nan
        found["model.norm.weight"][7] = -np.inf

    rewrite(folder, damage)
    with pytest.raises(ValueError, match="2 tensors have NaN or infinite weights") as error:
        rt.load(str(folder))
    for name in ("model.layers.1.self_attn.qkv_proj.weight", "model.norm.weight"):
        assert name in str(error.value)
