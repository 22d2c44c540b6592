"""The decoder against transformers in torch: logits, residuals, padding, positions, programs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import reptune_jax as rt
from reptune_jax.hub import weights
from reptune_jax.model import families, rope
from reptune_jax.model.intervene import Probe
from reptune_jax.model.transformer import Decoder, collect, whole
from tests.support import tiny
from tests.support import torch_reference as ref

TOLERANCE = 1e-4  # of the largest logit, and of each residual's own length


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(variant) -> (our model, the same in torch); each is made once."""

    @functools.cache
    def make(variant):
        maker, overrides = tiny.VARIANTS[variant]
        folder = maker(tmp_path_factory.mktemp(variant), **overrides)
        return rt.load(str(folder)), ref.load(folder)

    return make


def draw_ids(B, T, seed=0):
    return np.random.default_rng(seed).integers(4, tiny.VOCAB, (B, T)).astype(np.int32)


def theirs(model, ids, mask=None):
    """(logits, residuals) of torch."""
    ids = torch.tensor(ids).long()
    mask = torch.ones_like(ids) if mask is None else torch.tensor(mask).long()
    with torch.no_grad():
        logits = ref.logits(model, ids, mask)
    return logits.numpy(), ref.residuals(model, ids, mask).numpy()


def assert_parity(out, logits, residual, real, tolerance=TOLERANCE):
    """At the real positions of [B, T]."""
    got = np.asarray(out.logits_BxTxV)[real]
    assert np.abs(got - logits[real]).max() < tolerance * np.abs(logits[real]).max()
    got, want = np.asarray(out.residual_NxBxTxD)[:, real], residual[:, real]
    error = np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)
    assert error.max(axis=1).max() < tolerance, error.max(axis=1)


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_logits_and_every_residual_equal_transformers(variant, made):
    ours, torch_one = made(variant)
    ids = draw_ids(3, 48)
    out = ours.forward(ids, capture=True)
    assert out.logits_BxTxV.dtype == jnp.float32
    assert out.residual_NxBxTxD.shape == (4, 3, 48, 64)
    assert_parity(out, *theirs(torch_one, ids), np.ones_like(ids, bool))
    assert ours.forward(ids).residual_NxBxTxD is None


@pytest.mark.parametrize("variant", ["llama_llama3", "qwen2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_no_real_position(side, variant, made):
    ours, torch_one = made(variant)
    ids, lengths = draw_ids(3, 48), (48, 30, 7)
    mask = np.array([np.arange(48) < n for n in lengths]).astype(np.int32)
    mask = mask[:, ::-1].copy() if side == "left" else mask
    out = ours.forward(ids, mask, capture=True)
    assert np.isfinite(np.asarray(out.logits_BxTxV)).all()
    assert_parity(out, *theirs(torch_one, ids, mask), mask.astype(bool))
    alone = ids[2][mask[2].astype(bool)][None]
    logits, _ = theirs(torch_one, alone)  # what padding says must not matter at all
    last = -1 if side == "left" else lengths[2] - 1
    got = np.asarray(out.logits_BxTxV)[2, last]
    assert np.abs(got - logits[0, -1]).max() < TOLERANCE * np.abs(logits).max()


@pytest.mark.parametrize("rope", [tiny.LINEAR_ROPE, tiny.LLAMA3_ROPE], ids=["linear", "llama3"])
def test_positions_beyond_4096(rope, tmp_path):
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    rope = {**rope, "rope_theta": 500_000.0}
    folder = tiny.make_llama(tmp_path, rope_parameters=rope, max_position_embeddings=8192, **shape)
    ours, torch_one = rt.load(str(folder)), ref.load(folder)
    ids = draw_ids(1, 4160)
    real = np.arange(4160)[None] >= 4096
    assert_parity(ours.forward(ids, capture=True), *theirs(torch_one, ids), real)


def test_scaled_positions_are_not_the_plain_ones():
    plain, linear, llama3 = (
        rope.rope_frequencies(families.read_rope({"rope_parameters": r}), 16)
        for r in ({"rope_theta": 1e4}, tiny.LINEAR_ROPE, tiny.LLAMA3_ROPE)
    )
    np.testing.assert_allclose(linear, plain / 4, rtol=1e-6)
    stretch = plain / llama3  # one end kept, the other stretched, some between
    assert stretch[0] == 1 and stretch[-1] == pytest.approx(8)
    assert np.any((stretch > 1.01) & (stretch < 7.9))


# ---------------------------------------------------------------- programs


def cut(params, *sizes):
    """The one-segment tree cut into segments s0, s1, ..."""
    starts = np.cumsum([0, *sizes])
    parts = {
        f"s{i}": jax.tree.map(lambda a, i=i: a[starts[i] : starts[i + 1]], params["blocks"])
        for i in range(len(sizes))
    }
    return {**{k: v for k, v in params.items() if k != "blocks"}, **parts}


def segments(*sizes):
    return tuple((f"s{i}", n) for i, n in enumerate(sizes))


def run(decoder, params, ids, **kwargs):
    hidden, _ = decoder.apply({"params": params}, ids, jnp.ones_like(ids), **kwargs)
    return hidden


def test_segments_equal_one_scan_and_are_other_programs(made):
    ours, _ = made("qwen2")
    ids = jnp.asarray(draw_ids(2, 16))
    decoder = Decoder(ours.arch, segments(1, 2, 1))
    params = cut(ours.params, 1, 2, 1)

    @jax.jit
    def captured(params):
        (hidden, _), sown = decoder.apply(
            {"params": params},
            ids,
            jnp.ones_like(ids),
            keep_residual=True,
            mutable=["intermediates"],
        )
        return hidden, collect(sown["intermediates"], decoder.segments, "residual")

    hidden, residual = captured(params)
    want = ours.forward(ids, capture=True)
    np.testing.assert_allclose(residual, want.residual_NxBxTxD, rtol=1e-5, atol=1e-5)
    logits = decoder.apply({"params": params}, hidden, method="logits")
    np.testing.assert_allclose(logits, want.logits_BxTxV, rtol=1e-5, atol=1e-5)

    def scans(decoder, params):
        jaxpr = jax.make_jaxpr(functools.partial(run, decoder))(params, ids)
        return sum(e.primitive.name == "scan" for e in jaxpr.eqns)

    assert scans(decoder, params) == 3
    assert scans(ours.decoder, ours.params) == 1


@pytest.mark.parametrize("cuts", [(), (1, 2, 1)])
def test_what_is_known_up_to_a_layer_goes_on_from_there(cuts, made):
    """By one program for all layers; those below do not run, so their weights may be anything."""
    ours, _ = made("qwen2")
    ids = jnp.asarray(draw_ids(3, 16))
    known = ours.forward(ids, capture=True).residual_NxBxTxD
    decoder = Decoder(ours.arch, segments(*cuts)) if cuts else ours.decoder
    want = run(ours.decoder, ours.params, ids)

    @jax.jit
    def above(params, first, x):
        return run(decoder, params, ids, above=(first, x))

    for first in range(1, ours.arch.N + 1):
        blocks = jax.tree.map(lambda a, n=first: a.at[:n].set(jnp.nan), ours.params["blocks"])
        params = ours.params | {"blocks": blocks}
        found = above(cut(params, *cuts) if cuts else params, first, known[first - 1])
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)
    assert above._cache_size() == 1


def test_only_the_tuned_segment_is_differentiated(made):
    """Nothing below is linearised: the scan below keeps no residuals for a backward pass."""
    ours, _ = made("llama")
    ids = jnp.asarray(draw_ids(2, 16))
    decoder, params = Decoder(ours.arch, segments(3, 1)), cut(ours.params, 3, 1)

    def loss(top, rest, decoder):
        return jnp.square(run(decoder, {**rest, **top}, ids)).sum()

    def whole_loss(blocks, rest, decoder):
        return jnp.square(run(decoder, {**rest, "blocks": blocks}, ids)).sum()

    rest = {k: v for k, v in params.items() if k != "s1"}
    step = jax.jit(jax.grad(loss), static_argnums=2)
    got = step({"s1": params["s1"]}, rest, decoder)
    rest_whole = {k: v for k, v in ours.params.items() if k != "blocks"}
    full = jax.jit(jax.grad(whole_loss), static_argnums=2)
    want = full(ours.params["blocks"], rest_whole, ours.decoder)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(want))
    for a, b in zip(jax.tree.leaves(got["s1"]), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b[3:], atol=1e-5 * scale)
    jaxpr = str(
        jax.make_jaxpr(jax.grad(loss), static_argnums=2)({"s1": params["s1"]}, rest, decoder)
    )
    assert jaxpr.count("length=3") == 1  # forward only
    assert jaxpr.count("length=1") >= 2  # forward and backward


def test_remat_changes_the_program_and_not_the_gradient(made):
    ours, _ = made("llama")
    ids, saved, grads = jnp.asarray(draw_ids(2, 16)), {}, {}
    for policy in ("none", "dots", "full"):
        decoder = Decoder(ours.arch, (("blocks", 4),), remat=policy)

        def loss(params, decoder=decoder):
            return jnp.square(run(decoder, params, ids)).mean()

        assert ("remat" in str(jax.make_jaxpr(loss)(ours.params))) == (policy != "none")
        eqns = jax.make_jaxpr(jax.grad(loss))(ours.params).eqns
        forward = next(e for e in eqns if e.primitive.name == "scan")
        saved[policy] = sum(v.aval.size for v in forward.outvars)
        grads[policy] = jax.tree.leaves(jax.jit(jax.grad(loss))(ours.params))
    assert saved["none"] > saved["dots"] > 2 * saved["full"]
    for policy in ("dots", "full"):
        for want, got in zip(grads["none"], grads[policy], strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_nothing_is_sown_for_those_who_do_not_ask(made):
    ours, _ = made("llama")
    ids = jnp.asarray(draw_ids(2, 16))
    zeros = jnp.zeros((4, 64))
    everything = {
        "read_BxPxT": jnp.ones((2, 1, 16)),
        "probe": Probe(zeros, zeros),
    }

    def flops(**asked):
        f = jax.jit(functools.partial(run, ours.decoder))
        return f.lower(ours.params, ids, **asked).compile().cost_analysis()["flops"]

    kept = jax.make_jaxpr(functools.partial(run, ours.decoder, keep_residual=True))
    plain = jax.make_jaxpr(functools.partial(run, ours.decoder))
    assert str(kept(ours.params, ids)) == str(plain(ours.params, ids))
    assert flops(**everything) < 1.02 * flops()
    asked = functools.partial(ours.decoder.apply, **everything, mutable=["intermediates"])
    _, sown = jax.eval_shape(asked, {"params": ours.params}, ids, ids)
    assert set(sown["intermediates"]["blocks"]) == {"read", "cosine"}


def test_initializing_makes_the_tree_of_the_checkpoint(made):
    for variant in ("llama_tied", "llama_biases"):
        ours, _ = made(variant)
        shapes = weights.abstract_params(ours.arch)
        flat = jax.tree_util.tree_flatten_with_path(ours.params)[0]
        loaded = {"/".join(k.key for k in path): leaf.shape for path, leaf in flat}
        assert loaded == {path: leaf.shape for path, leaf in shapes.items()}
    assert whole(ours.arch).segments == (("blocks", 4),)


def test_bfloat16_is_as_near_to_float32_as_torchs_is(tmp_path):
    folder = tiny.make_llama(tmp_path)
    ids = draw_ids(4, 64)
    exact, _ = theirs(ref.load(folder), ids)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        coarse = model(torch.tensor(ids).long()).logits.float().numpy()
    ours = rt.load(str(folder), dtype="bfloat16")
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(ours.params))
    got = np.asarray(ours.forward(ids).logits_BxTxV)
    assert got.dtype == np.float32
    error, theirs_error = np.abs(got - exact).mean(), np.abs(coarse - exact).mean()
    assert 0 < error < 1.2 * theirs_error
    assert (got.argmax(-1) == exact.argmax(-1)).mean() > 0.93


# ---------------------------------------------------------------- a real model


@pytest.mark.slow
def test_smollm2_gguf_equals_transformers_own_loading():
    if tiny.smollm2_path() is None:
        pytest.skip("no SmolLM2-135M-Instruct GGUF here")
    ours, torch_one = tiny.smollm2(), tiny.smollm2_in_torch().eval()
    prompts = ["Tell me about the weather in the mountains.", "Is 17 a prime number?"]
    ids = [ours.encode_prompt(p) for p in prompts]
    T = max(map(len, ids))
    mask = np.array([[0] * (T - len(row)) + [1] * len(row) for row in ids], np.int32)
    tokens = np.array([[0] * (T - len(row)) + row for row in ids], np.int32)
    out = ours.forward(tokens, mask, capture=True)
    assert_parity(out, *theirs(torch_one, tokens, mask), mask.astype(bool))
