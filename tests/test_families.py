"""Every family against transformers in torch, on small random models with its peculiarities.

Rows of 96 tokens go beyond the tiny models' windows (12) and original contexts (64).
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

import reptune_jax as rt
from reptune_jax import mesh
from reptune_jax.hub import names, weights
from reptune_jax.model import families
from reptune_jax.model.arch import Layer, Rope
from reptune_jax.model.transformer import init_cache
from reptune_jax.tuning import cost
from tests import tiny
from tests import torch_reference as ref

TOLERANCE = 1e-4  # of the largest logit, and of each residual's own length
B, T, NEW = 3, 96, 32
LENGTHS = (T, 70, 20)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(family) -> (folder, our model, the same in torch); each is made once."""

    @functools.cache
    def make(family):
        folder = tiny.make_family(tmp_path_factory.mktemp(family), family)
        return folder, rt.load(str(folder)), torch_model(folder)

    return make


def torch_model(folder, dtype=torch.float32):
    """Eager: another implementation may leave out a soft-cap."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    ).eval()


def rows(side="none", seed=0):
    """(ids, mask) of three rows of different lengths, padded on one side or not at all."""
    ids = np.random.default_rng(seed).integers(4, tiny.VOCAB, (B, T)).astype(np.int32)
    mask = np.array([np.arange(T) < n for n in LENGTHS]).astype(np.int32)
    if side == "none":
        return ids, np.ones_like(mask)
    return ids, mask if side == "right" else mask[:, ::-1].copy()


def torch_logits(model, ids, mask):
    with torch.no_grad():
        args = torch.tensor(ids).long(), torch.tensor(mask).long()
        return ref.logits(model, *args).float().numpy()


def tensors(folder):
    """Every tensor of a folder, of all its shards."""
    return {k: v for p in sorted(folder.glob("*.safetensors")) for k, v in load_file(p).items()}


def rewrite(folder, change):
    """Changes the tensors of a folder of one file."""
    found = tensors(folder)
    change(found)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **changes):
    """None removes a key."""
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {k: v for k, v in config.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(kept))


# ---------------------------------------------------------------- parity


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits_and_every_residual_equal_transformers(family, made):
    _, ours, theirs = made(family)
    for side in ("none", "left", "right"):
        ids, mask = rows(side)
        out, real = ours.forward(ids, mask, capture=True), mask.astype(bool)
        want = torch_logits(theirs, ids, mask)[real]
        got = np.asarray(out.logits_BxTxV)
        assert np.isfinite(got).all()
        assert np.abs(got[real] - want).max() < TOLERANCE * np.abs(want).max(), side
        args = torch.tensor(ids).long(), torch.tensor(mask).long()
        want = ref.residuals(theirs, *args).numpy()[:, real]
        error = np.asarray(out.residual_NxBxTxD)[:, real] - want
        error = np.linalg.norm(error, axis=-1) / np.linalg.norm(want, axis=-1)
        assert error.max() < TOLERANCE, (side, error.max(axis=1))


OFF = {
    "act": "silu",
    "qk_norm": "",
    "parallel": False,
    "scale": 0.0,
    "score_cap": 0.0,
    "logit_cap": 0.0,
    "embed_scale": 1.0,
    "residual_scale": 1.0,
    "logit_divisor": 1.0,
}


def without(arch):
    """(what is missing, an Arch that computes it wrongly) for each peculiarity of `arch`."""
    for field, off in OFF.items():
        if getattr(arch, field) != off:
            yield field, dataclasses.replace(arch, **{field: off})
    if arch.rope and arch.rope != Rope(arch.rope.theta):
        yield "rope", dataclasses.replace(arch, rope=Rope(arch.rope.theta), layers=())
    for name, change in {
        "one token less in a window": lambda l: Layer(max(l.window - 1, 0), l.rope),
        "one rope for all": lambda l: Layer(l.window, arch.rope),
    }.items():
        layers = tuple(change(l) for l in arch.layers)
        if layers != arch.layers:
            yield name, dataclasses.replace(arch, layers=layers)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_tolerance_would_show_a_peculiarity_left_out(family, made):
    _, ours, _ = made(family)
    ids = rows()[0][:1, :40]
    want = np.asarray(ours.forward(ids).logits_BxTxV)
    for missing, arch in without(ours.arch):
        got = np.asarray(dataclasses.replace(ours, arch=arch).forward(ids).logits_BxTxV)
        error = np.abs(got - want).max() / np.abs(want).max()
        assert error > 30 * TOLERANCE, (missing, error)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_with_a_cache_as_without(family, made):
    """In three pieces of 32 tokens, so that windows reach back into earlier ones."""
    _, ours, _ = made(family)
    ids, mask = rows("left")
    want = np.asarray(ours.forward(ids, mask, capture=True).logits_BxTxV)

    @jax.jit
    def piece(tokens, cache, slot):
        hidden, cache = ours.decoder.apply(
            {"params": ours.params}, tokens, jnp.asarray(mask), cache=cache, slot=slot
        )
        return ours.decoder.apply({"params": ours.params}, hidden, method="logits"), cache

    cache, got = init_cache(ours.arch, B, T, jnp.float32), []
    for slot in range(0, T, NEW):
        logits, cache = piece(ids[:, slot : slot + NEW], cache, slot)
        got.append(logits)
    real = mask.astype(bool)
    error = np.abs(np.concatenate(got, axis=1) - want)[real].max()
    assert error < 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_greedy_ids_are_those_of_transformers(family, made):
    _, ours, theirs = made(family)
    ids, mask = rows("left", seed=1)
    ids, mask = ids[:, NEW:], mask[:, NEW:]
    with torch.no_grad():
        want = theirs.generate(
            torch.tensor(ids).long(),
            attention_mask=torch.tensor(mask).long(),
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=tiny.PAD_ID,
        )[:, T - NEW :].tolist()
    got = ours.generate_ids(ids, mask, NEW)
    for row, their_row in zip(got, want, strict=True):
        cut = ours.cut(row)
        assert their_row[: len(cut)] == cut
    assert len(set(map(tuple, want))) > 1  # a tied random model may repeat itself, not all the same


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_bfloat16_rounds_as_torch_does_and_keeps_the_argmax(family, made):
    """Agreement is counted where the float32 margin is over twice bfloat16's mean error."""
    folder, exact, _ = made(family)
    ids, mask = rows()
    want = np.asarray(exact.forward(ids, mask, capture=True).logits_BxTxV)
    coarse = torch_logits(torch_model(folder, torch.bfloat16), ids, mask)
    got = np.asarray(rt.load(str(folder), dtype="bfloat16").forward(ids, mask).logits_BxTxV)
    error, theirs = np.abs(got - want).mean(), np.abs(coarse - want).mean()
    assert 0 < error < 1.2 * theirs
    top = np.sort(want, axis=-1)
    clear = top[..., -1] - top[..., -2] > 2 * error
    assert clear.mean() > 0.5
    assert (got.argmax(-1) == want.argmax(-1))[clear].mean() >= 0.99


# ---------------------------------------------------------------- weights in and out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_out_and_in_again_is_the_same_to_the_byte(family, dtype, made, tmp_path):
    """In float32 from one file, in bfloat16 from shards with an index."""
    folder, ours, theirs = made(family)
    if dtype == "bfloat16":
        coarse = torch_model(folder, torch.bfloat16)
        folder = tmp_path / "in"
        coarse.save_pretrained(folder, max_shard_size="40KB")
        assert (folder / "model.safetensors.index.json").exists()
        ours = rt.load(str(folder), dtype)
    out = rt.save_hf(ours, tmp_path / "out")
    want, got = tensors(folder), tensors(out)
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].dtype == array.dtype and got[name].tobytes() == array.tobytes(), name
    configs = [json.loads((f / "config.json").read_text()) for f in (folder, out)]
    assert configs[0] == configs[1]
    if dtype == "float32":
        again, info = AutoModelForCausalLM.from_pretrained(
            out, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"]
        ids, mask = rows("left")
        same = torch_logits(again.eval(), ids, mask), torch_logits(theirs, ids, mask)
        np.testing.assert_array_equal(*same)


@pytest.mark.parametrize("family", ["phi3", "gpt2", "gpt_neox", "gemma3_text"])
def test_an_exported_folder_says_the_same_in_transformers(family, tmp_path):
    folder = tiny.make_family(tmp_path / "in", family)
    model = rt.load(str(folder))
    out = rt.save_hf(model, tmp_path / "out")
    prompts = ["Tell me.", "What do you think of the weather?"]
    want = ref.greedy(torch_model(out), model.tokenizer, prompts, 8)
    assert model.generate(prompts, max_new_tokens=8) == want


def test_gpt2_without_its_prefix_and_with_buffers_goes_out_as_it_came(made, tmp_path):
    """The original checkpoints' form. The mask buffers are read by nobody and not kept."""
    ours = made("gpt2")[1]
    folder = tiny.make_family(tmp_path / "in", "gpt2")
    bare = {k.removeprefix("transformer."): v for k, v in tensors(folder).items()}
    buffers = {f"h.{l}.attn.bias": np.tri(4, dtype=np.float32)[None, None] for l in range(3)}
    save_file({**bare, **buffers}, folder / "model.safetensors", metadata={"format": "pt"})
    model = rt.load(str(folder))
    same = jax.tree.map(lambda a, b: bool((a == b).all()), model.params, ours.params)
    assert all(jax.tree.leaves(same))
    assert tensors(rt.save_hf(model, tmp_path / "out")).keys() == bare.keys()
    assert torch_model(tmp_path / "out").transformer.h[0].mlp.c_fc.weight.shape == (64, 96)


@pytest.mark.parametrize(
    ("family", "name", "copied"),
    [
        ("gpt_neox", "lm_head.weight", "embed_out.weight"),
        ("qwen3", "lm_head.weight", "model.embed_tokens.weight"),
    ],
)
def test_a_renamed_or_a_copied_head_goes_out_as_it_came(family, name, copied, tmp_path):
    folder = tiny.make_family(tmp_path / "in", family)

    def respell(found):
        found[name] = found[copied].copy()
        if not copied.endswith("embed_tokens.weight"):
            del found[copied]

    rewrite(folder, respell)
    got, want = tensors(rt.save_hf(rt.load(str(folder)), tmp_path / "out")), tensors(folder)
    assert got.keys() == want.keys()
    assert all(got[k].tobytes() == want[k].tobytes() for k in want)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_leaf_has_a_name_and_a_layout(family, made):
    leaves = weights.abstract_params(made(family)[1].arch)
    assert leaves.keys() <= names.table(tiny.FAMILIES[family][0]).keys()
    for path, leaf in leaves.items():
        assert len(mesh.spec(path, leaf.ndim)) == leaf.ndim


def test_projections_keep_their_names_in_every_family(made):
    """What adapters are put on: unfused, one dense layer each."""
    for family in tiny.FAMILIES:
        arch = made(family)[1].arch
        found = {p for p in weights.abstract_params(arch) if p.endswith("kernel")}
        want = {f"blocks/attn/{n}/kernel" for n in "qkvo"} | {"blocks/mlp/up/kernel"}
        want |= {"blocks/mlp/down/kernel"} | ({"blocks/mlp/gate/kernel"} if arch.gated else set())
        assert found == want


def product_flops(jaxpr):
    """2 x multiplications of every matrix product, those of a scan once for each turn."""
    total = 0.0
    for eqn in jaxpr.eqns:
        turns = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        inside = [p.jaxpr for p in eqn.params.values() if hasattr(p, "jaxpr")]
        total += turns * sum(map(product_flops, inside))
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            inner = np.prod([eqn.invars[0].aval.shape[d] for d in contracted])
            total += 2.0 * np.prod(eqn.outvars[0].aval.shape) * inner
    return total


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gpt_neox"])
def test_the_formula_counts_every_product_of_a_forward(family, made):
    ours, ids = made(family)[1], rows()[0]

    def hidden(params):
        return ours.decoder.apply({"params": params}, ids, jnp.ones_like(ids))[0]

    want = ours.arch.N * cost.layer_flops(ours.arch, ids.size, T)
    assert product_flops(jax.make_jaxpr(hidden)(ours.params).jaxpr) == want


# ---------------------------------------------------------------- real weights


@pytest.mark.slow
@pytest.mark.parametrize("file", ["gemma-3-270m-*.gguf", "qwen2.5-*0.5b-*.gguf"])
def test_a_real_gguf_file_equals_transformers_own_loading(file):
    path = tiny.real_gguf(file)
    if path is None:
        pytest.skip(f"no {file} here")
    ours = rt.load(str(path))
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    text = "The mountains were quiet that winter, and the road to the village had been closed."
    ids = np.array([ours.tokenizer.encode(text)], np.int32)
    want = torch_logits(theirs, ids, np.ones_like(ids))
    got = np.asarray(ours.forward(ids).logits_BxTxV)
    assert np.abs(got - want).max() < 1e-3 * np.abs(want).max()
    logp = torch.tensor(want[0, :-1]).log_softmax(-1).numpy()
    assert -logp[np.arange(len(logp)), ids[0, 1:]].mean() < 5  # a language model, not noise


# ---------------------------------------------------------------- configs


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
        ("gemma2", {"rope_parameters": None}, "rope_theta: found neither"),
        ("gemma3_text", {"rope_parameters": None, "rope_theta": 1e6}, "rope_local_base_freq: miss"),
        ("gpt_neox", {"rope_parameters": {"rope_theta": 1e4}}, "partial_rotary_factor: missing"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "'longrope'"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention: got true"),
        ("gemma2", {"hidden_activation": "silu"}, "hidden_activation: got 'silu', expected 'gelu_"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 3}, "layer_types: got chunked_attent"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "got the kinds of 2, expected .* = 3"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "got the kinds of 2, expected those of num_hid"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "by_inverse_layer_idx: got true"),
        ("gpt2", {"n_positions": None}, "n_positions: missing from the model's config"),
        ("granite", {"residual_multiplier": None}, "residual_multiplier: missing"),
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


def test_a_folder_without_tokenizer_takes_token_ids(tmp_path):
    folder = tiny.make_family(tmp_path, "llama")
    want = rt.load(str(folder))
    for path in folder.glob("*token*"):
        path.unlink()
    model, (ids, mask) = rt.load(str(folder)), rows("left")
    assert model.tokenizer is None
    got = model.generate_ids(ids[:, NEW:], mask[:, NEW:], NEW)
    np.testing.assert_array_equal(got, want.generate_ids(ids[:, NEW:], mask[:, NEW:], NEW))
    for call in (lambda: model.generate(["Hi"]), lambda: model.loglikelihood([("a", "b")])):
        with pytest.raises(ValueError, match=r"has no tokenizer, .* Use `generate_ids`"):
            call()
