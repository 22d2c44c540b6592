"""What configs leave out, and what they say twice: as transformers reads it, and said."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig

import reptune_jax as rt
from reptune_jax.model import families
from reptune_jax.model.config_keys import DEFAULTS
from tests.support import tiny
from tests.support import torch_reference as ref
from tests.support.folders import edit_config

# Sizes of the weights: what a config has to say.
_SIZES = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 7,
    "num_attention_heads": 32,
}
_GPT2_SIZES = {"vocab_size": 320, "n_embd": 64, "n_layer": 7, "n_head": 4}


def sizes(family):
    return {"model_type": family, **(_GPT2_SIZES if family == "gpt2" else _SIZES)}


def as_transformers_reads(config):
    """The config with nothing left out, by transformers' own class."""
    kind = config["model_type"]
    return AutoConfig.for_model(**{"model_type": kind, **config}).to_dict()


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_config_of_sizes_alone_is_read_as_transformers_reads_it(family):
    bare = sizes(family)
    complete = as_transformers_reads(bare)
    assert families.from_config(bare) == families.from_config(complete)
    said = families.notes(bare)
    assert said and all("transformers' default for " + family in line for line in said)
    assert not families.notes(complete)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_default_is_the_one_of_transformers_class(family):
    theirs = as_transformers_reads(sizes(family))
    rope = theirs.get("rope_parameters") or {}
    full, local = rope.get("full_attention", rope), rope.get("sliding_attention", {})
    renamed = {
        "rope_theta": full.get("rope_theta"),
        "rotary_emb_base": full.get("rope_theta"),
        "rotary_pct": full.get("partial_rotary_factor"),
        "rope_local_base_freq": local.get("rope_theta"),
        "sliding_window_pattern": 6,  # of its layer types, which the test above compares
        "num_key_value_heads": AutoConfig.for_model(family).to_dict().get("num_key_value_heads"),
    }
    for key, value in DEFAULTS[family].items():
        want = theirs[key] if theirs.get(key) is not None else renamed.get(key)
        if key == "sliding_window" and family in ("qwen2", "qwen3"):
            want = AutoConfig.for_model(family, use_sliding_window=True).sliding_window
        assert value == want, key


@pytest.mark.parametrize(
    ("family", "lacks"),
    [
        ("llama", ("rope_parameters", "num_key_value_heads", "head_dim", "rms_norm_eps")),
        ("qwen3", ("rope_parameters", "head_dim")),
        ("gemma2", ("rope_parameters", "head_dim", "query_pre_attn_scalar")),
        ("gemma2", ("attn_logit_softcapping", "final_logit_softcapping", "hidden_activation")),
        ("smollm3", ("rope_parameters", "no_rope_layers", "tie_word_embeddings")),
        ("granite", ("attention_multiplier", "residual_multiplier", "logits_scaling")),
        ("gpt_neox", ("rope_parameters", "layer_norm_eps", "hidden_act")),
    ],
)
def test_logits_of_an_old_config_are_those_of_transformers(family, lacks, tmp_path, capsys):
    made = {"num_key_value_heads": 4} if "num_key_value_heads" in lacks else {}
    if "head_dim" in lacks:
        made["head_dim"] = {"qwen3": 128, "gemma2": 256}.get(family, 16)
    folder = tiny.make_family(tmp_path, family, **made)
    edit_config(folder, **dict.fromkeys(lacks))
    theirs = ref.load(folder)
    ids = np.random.default_rng(0).integers(4, tiny.VOCAB, (2, 40))
    with torch.no_grad():
        want = ref.logits(theirs, torch.tensor(ids), torch.ones(ids.shape).long()).numpy()
    model = rt.load(str(folder))
    got = np.asarray(model.forward(ids.astype(np.int32)).logits_BxTxV)
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()
    said = capsys.readouterr().out
    for key in set(lacks) & DEFAULTS[family].keys() - {"num_key_value_heads"}:
        assert said.count(f"note: {folder}: {key}: not in config.json; taking") == 1, key


_LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
_PLAIN = {"rope_type": "default", "rope_theta": 700.0}
_NESTED = {"full_attention": dict(_PLAIN), "sliding_attention": {**_PLAIN, "rope_theta": 900.0}}


@pytest.mark.parametrize(
    ("family", "keys", "note"),
    [
        ("llama", {"rope_scaling": _LINEAR, "rope_parameters": _PLAIN}, "reading rope_scaling,"),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": _PLAIN},
            "reading rope_scaling,",
        ),
        (
            "llama",
            {"rope_scaling": _LINEAR, "rope_parameters": {**_PLAIN, "rope_type": "yarn"}},
            "reading rope_scaling,",
        ),
        (
            "mistral",
            {"rope_parameters": _PLAIN, "rope_theta": 800.0},
            r"rope_parameters/rope_theta = 700.0 and rope_theta = 800.0 disagree",
        ),
        (
            "olmo2",
            {"rope_scaling": {**_LINEAR, "type": "default"}},
            "rope_scaling/rope_type = 'linear' and rope_scaling/type = 'default' disagree",
        ),
        (
            "phi3",
            {
                "rope_parameters": {**_PLAIN, "partial_rotary_factor": 0.5},
                "partial_rotary_factor": 0.25,
            },
            "partial_rotary_factor = 0.5 and partial_rotary_factor = 0.25 disagree",
        ),
        (
            "gpt_neox",
            {
                "rope_parameters": {**_PLAIN, "partial_rotary_factor": 0.5},
                "rotary_pct": 0.25,
                "rotary_emb_base": 700.0,
            },
            "partial_rotary_factor = 0.5 and rotary_pct = 0.25 disagree",
        ),
        (
            "gemma3_text",
            {"rope_parameters": _NESTED, "rope_theta": 800.0, "rope_local_base_freq": 900.0},
            "full_attention/rope_theta = 700.0 and rope_theta = 800.0 disagree",
        ),
        (
            "gemma3_text",
            {"rope_parameters": _NESTED, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
            "reading rope_scaling,",
        ),
        (
            "gemma3_text",
            {"layer_types": ["full_attention"] * 7, "sliding_window_pattern": 3},
            "reading layer_types,",
        ),
        (
            "smollm3",
            {"no_rope_layers": [1, 0, 0, 0, 1, 1, 1], "no_rope_layer_interval": 2},
            "reading no_rope_layers,",
        ),
        (
            "qwen2",
            {
                "use_sliding_window": True,
                "max_window_layers": 2,
                "layer_types": ["full_attention"] * 6 + ["sliding_attention"],
            },
            "reading layer_types,",
        ),
    ],
)
def test_of_two_keys_that_disagree_transformers_is_read_and_it_is_said(family, keys, note):
    config = {**sizes(family), **json.loads(json.dumps(keys))}
    before = json.dumps(config)
    got, said = families.from_config(config), families.notes(config)
    assert json.dumps(config) == before  # nothing is changed on the way
    theirs = as_transformers_reads(json.loads(before))
    assert got == families.from_config({k: v for k, v in theirs.items() if k != "rope_scaling"})
    assert sum(note in line for line in said) == 1, said
    agreeing = [line for line in said if "disagree" in line and note not in line]
    assert not agreeing  # what agrees is not spoken of


def test_llama3_scaling_without_its_context_takes_the_models():
    scaling = {k: v for k, v in tiny.LLAMA3_ROPE.items() if not k.startswith("original")}
    config = {**sizes("llama"), "rope_parameters": scaling, "max_position_embeddings": 128}
    theirs = as_transformers_reads(json.loads(json.dumps(config)))
    assert families.from_config(config) == families.from_config(theirs)
    assert families.from_config(config).rope.original_positions == 128


def test_two_keys_that_agree_are_not_spoken_of():
    both = {"rope_theta": 700.0, "rope_parameters": _PLAIN, "rope_scaling": dict(_PLAIN)}
    config = {**sizes("llama"), "rms_norm_eps": 1e-6, **both}
    assert families.notes(config) == []
