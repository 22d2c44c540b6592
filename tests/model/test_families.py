"""Every family against transformers in torch, on small random models with its peculiarities.

Rows of 96 tokens go beyond the tiny models' windows (12) and original contexts (64).
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

import reptune_jax as rt
from reptune_jax import mesh
from reptune_jax.cost import flops
from reptune_jax.hub import names, weights
from reptune_jax.model.arch import Layer, Rope
from reptune_jax.model.cache import init_cache
from tests.support import tiny
from tests.support import torch_reference as ref
from tests.support.folders import rewrite, tensors

TOLERANCE = 1e-4  # of the largest logit, and of each residual's own length
B, T, NEW = 3, 96, 32
LENGTHS = (T, 70, 20)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(family) -> (folder, our model, the same in torch); each is made once."""

    @functools.cache
    def make(family):
        folder = tiny.make_family(tmp_path_factory.mktemp(family), family)
        return folder, rt.load(str(folder)), ref.load(folder)

    return make


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

    cache, got = init_cache(ours.arch, ours.decoder.segments, B, T, jnp.float32), []
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
    coarse = torch_logits(ref.load(folder, torch.bfloat16), ids, mask)
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
        coarse = ref.load(folder, torch.bfloat16)
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
    want = ref.greedy(ref.load(out), model.tokenizer, prompts, 8)
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
    assert ref.load(tmp_path / "out").transformer.h[0].mlp.c_fc.weight.shape == (64, 96)


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

    want = ours.arch.N * flops.layer_flops(ours.arch, ids.size, T)
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
