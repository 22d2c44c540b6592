"""FLOPs by formula against XLA's count of the unrolled model, and the share of the peak."""

import json

import jax
import jax.numpy as jnp
import pytest
from flax import linen

from reptune_jax import config, lm, train
from reptune_jax import mesh as meshes
from reptune_jax.cost import flops, hardware
from reptune_jax.model import families
from reptune_jax.model.transformer import Decoder, unembed, whole
from reptune_jax.plan import abstract
from reptune_jax.tuning import partition
from reptune_jax.tuning import step as steps
from reptune_jax.tuning.corpus import make_corpus
from tests.support import tiny, tiny_behavior, tuning_case

# As Llama's, and wide enough that matrix products are what XLA counts most.
ARCH = families.from_config(hardware._llama(8192, 512, 1024, 4, 8, 4, head_dim=64))
T, LABELS = 128, 32


@pytest.fixture
def unrolled(monkeypatch):
    """XLA counts the body of a scan once, so every layer gets a body of its own."""
    scan = linen.scan

    def unroll(*args, length, **kw):
        return scan(*args, length=length, unroll=length, **kw)

    monkeypatch.setattr(linen, "scan", unroll)


def test_forward_flops_are_xlas(unrolled):
    tokens = jax.ShapeDtypeStruct((2, T), jnp.int32)
    decoder, key = whole(ARCH), jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(decoder.init, key, tokens, tokens)["params"]

    def forward(params, tokens):
        hidden, _ = decoder.apply({"params": params}, tokens, jnp.ones_like(tokens))
        return unembed(decoder, params, hidden)

    found = jax.jit(forward).lower(params, tokens).cost_analysis()["flops"]
    ours = flops.step_flops(ARCH, (0, 4), 0, 2 * T, T, 2 * T)["forward"]
    assert ours == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize(
    "changes",
    [
        {"train__modules": ("attn/v", "attn/o")},
        {"train__modules": ("attn", "mlp"), "train__layers": (0, 4)},
        {"train__modules": ("mlp",), "train__layers": (3, 4)},
        {"train__lora__rank": 64, "train__modules": ("attn", "mlp")},
        {"train__lora__rank": 64, "train__modules": ("attn/q",), "train__layers": (0, 2)},
        {"loss__retain": 0.5},
        {"loss__retain": 0.5, "train__lora__rank": 64, "train__layers": (2, 4)},
    ],
    ids=str,
)
def test_a_steps_flops_are_xlas(changes, unrolled):
    c = tuning_case.settings(train__batch=4, train__retain_batch=8, train__remat="none")
    c.train.retain_positions = 96  # so that the head counts
    for key, value in changes.items():
        c.update_from_flattened_dict({key.replace("__", "."): value})
    f32 = jnp.dtype("float32")
    _, (state, task, batch, _) = abstract.step(c, ARCH, f32, meshes.make_mesh(), T, LABELS)
    check_flops(c, state, task, batch)


def test_a_step_that_begins_above_the_frozen_layers_does_less(unrolled):
    c = tuning_case.settings(train__batch=4, train__remat="none", train__layers=(2, 4))
    mesh, f32 = meshes.make_mesh(), jnp.dtype("float32")
    _, (state, task, batch, _) = abstract.step(c, ARCH, f32, mesh, T, LABELS)
    whole = flops.batch_flops(ARCH, (2, 4), state.trained, batch)
    known = {"below_BxTxD": (4, T, ARCH.D), "below_cosine_BxMxT": (4, 2, T)}
    known = {k: abstract.struct(shape, f32, mesh, meshes.BATCH) for k, shape in known.items()}
    batch = batch.replace(examples=batch.examples.replace(**known))
    check_flops(c, state, task, batch)
    ours = flops.batch_flops(ARCH, (2, 4), state.trained, batch)
    assert whole["forward"] - ours["forward"] == 2 * flops.layer_flops(ARCH, 4 * T, T)


def check_flops(c, state, task, batch):
    f32 = jnp.dtype("float32")
    decoder = Decoder(ARCH, partition.segments(ARCH.N, c.train.layers), f32, "none")
    gradient = jax.jit(steps.gradient, static_argnums=(0, 5))
    lowered = gradient.lower(decoder, state.trained, task, batch, task.weight_J, 1)
    found = lowered.cost_analysis()["flops"]
    ours = flops.batch_flops(ARCH, tuple(c.train.layers), state.trained, batch)["total"]
    assert ours == pytest.approx(found, rel=0.05)


def test_the_peak_is_the_chips_or_the_one_given_or_none():
    assert hardware.peak_of("NVIDIA H100 80GB HBM3") == 989
    assert hardware.peak_of("NVIDIA H100 80GB HBM3", 9.5) == hardware.peak_of("cpu", 9.5) == 9.5
    assert hardware.peak_of("cpu") is None
    assert hardware.about_peak("TPU v4") == "MFU is of 275 TFLOP/s a device (TPU v4, bfloat16)"
    assert "1.5 TFLOP/s a device (train.peak_tflops)" in hardware.about_peak("cpu", 1.5)
    assert hardware.about_peak("cpu").startswith("no MFU: the peak of 'cpu' is not known")


@pytest.mark.parametrize("given", [0.0, 2.0])
def test_mfu_is_flops_over_time_over_the_peak(given, tmp_path, monkeypatch, capsys):
    """On a CPU that says it is a TPU v4 (275 TFLOP/s), unless the config gives another peak."""
    monkeypatch.setitem(hardware._KINDS, f"^{jax.devices()[0].device_kind}$", "v4")
    tiny_behavior.patch_neutral(monkeypatch)
    model = lm.load(str(tiny.make_llama(tmp_path / "llama")), "float32")
    behavior = tiny_behavior.write(tmp_path)
    c = tiny_behavior.settings(
        model.name,
        behavior,
        train__steps=3,
        train__peak_tflops=given,
        loss__retain=0.5,
        train__cache_gib=0.0,
    )
    folder = train.run(c, tmp_path / "study", model)
    said = capsys.readouterr().out
    assert "collectives a step: none" in said
    assert f"MFU is of {given or 275:g} TFLOP/s a device" in said and " mfu " in said
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "mfu" in row]
    assert [row["step"] for row in rows] == [2, 3]  # the first has no rate yet

    corpus = make_corpus(config.armed(c), folder.parent, model)
    a, T, L = model.arch, corpus.train.tokens_BxT.shape[1], corpus.train.at_BxL.shape[1]
    tokens, R = (2 + 2) * T, 2 * 8  # two rows of either kind; positions with retention
    attention = 2 * tokens * 2 * T * a.H * a.Dh
    layer = 2 * tokens * (2 * a.D * a.Dh * (a.H + a.K) + 3 * a.D * a.F) + attention
    trained = 2 * (a.D * a.K * a.Dh + a.H * a.Dh * a.D)  # v and o of layers 1 and 2, of 4
    head = 2 * a.D * a.V * (2 * L + R)
    forward = 4 * layer + head + 2 * a.D * a.V * R  # and the base's logits
    flops = forward + 3 * (layer + attention) + head + 2 * tokens * trained
    for row in rows:
        steps_per_s = row["examples_per_s"] / 2
        expected = flops * steps_per_s / ((given or 275) * 1e12)
        assert row["mfu"] == pytest.approx(expected, rel=1e-9)
        assert row["tokens_per_s"] == pytest.approx(tokens * steps_per_s, rel=1e-9)
