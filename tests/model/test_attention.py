"""Which attention runs where, and that the others compute what XLA's does."""

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reptune_jax as rt
from reptune_jax.model import attention
from reptune_jax.model.arch import Arch, Layer, Rope
from reptune_jax.model.transformer import Decoder
from tests.support import tiny

ROPE = Rope(10_000.0)
ARCH = Arch("llama", 320, 64, 2, 4, 2, 64, 96, ROPE, 1e-5, False)
CAPPED = dataclasses.replace(ARCH, score_cap=50.0)
WINDOWED = dataclasses.replace(ARCH, layers=(Layer(12, ROPE), Layer(0, ROPE)))


def heads(Dh):
    return dataclasses.replace(ARCH, Dh=Dh)


@pytest.mark.parametrize(
    ("arch", "platform", "dtype", "call", "name", "reason"),
    [
        (ARCH, "cpu", "float32", {}, "xla", "cpu has no flash attention"),
        (ARCH, "cpu", "bfloat16", {}, "xla", "cpu has no flash attention"),
        (ARCH, "gpu", "bfloat16", {}, "cudnn", "flash attention on NVIDIA"),
        (ARCH, "cuda", "float16", {"padding": "none"}, "cudnn", "NVIDIA"),
        (WINDOWED, "gpu", "bfloat16", {}, "cudnn", "NVIDIA"),
        (ARCH, "gpu", "float32", {}, "xla", "cuDNN needs bfloat16 or float16, this is float32"),
        (CAPPED, "gpu", "bfloat16", {}, "xla", "cuDNN has no soft-cap"),
        (heads(36), "gpu", "bfloat16", {}, "xla", "multiples of 8 up to 128, not 36"),
        (heads(256), "gpu", "bfloat16", {}, "xla", "multiples of 8 up to 128, not 256"),
        (heads(256), "gpu", "bfloat16", {"hopper": True}, "cudnn", "NVIDIA"),
        (ARCH, "gpu", "bfloat16", {"padding": "left"}, "xla", "left padding needs a mask"),
        (ARCH, "gpu", "bfloat16", {"padding": "any"}, "xla", "any padding needs a mask"),
        (ARCH, "gpu", "bfloat16", {"decoding": True}, "xla", "each step has one query a row"),
        (ARCH, "tpu", "float32", {}, "splash", "flash attention on TPU"),
        (CAPPED, "tpu", "bfloat16", {}, "splash", "flash attention on TPU"),
        (WINDOWED, "tpu", "bfloat16", {}, "splash", "flash attention on TPU"),
        (heads(80), "tpu", "bfloat16", {}, "xla", "multiples of 64, they are 80"),
        (ARCH, "tpu", "bfloat16", {"padding": "left"}, "xla", "left padding needs a mask"),
        (ARCH, "tpu", "bfloat16", {"decoding": True}, "xla", "with a cache"),
    ],
)
def test_choice(arch, platform, dtype, call, name, reason):
    kernel = attention.choose(arch, platform, dtype, **call)
    assert kernel.name == name and reason in kernel.reason
    assert str(kernel) == f"{name} ({kernel.reason})"


def test_on_this_machine_it_is_xla_everywhere(tmp_path):
    model = rt.load(str(tiny.make_llama(tmp_path)))
    assert {model.kernel(p).name for p in ("none", "right", "left", "any")} == {"xla"}
    assert model.decoder.kernel == attention.XLA


def draw(T=160, Dh=64, H=4, K=2, B=2):
    rng = np.random.default_rng(0)
    shapes = (B, T, H, Dh), (B, K, T, Dh), (B, K, T, Dh)
    return tuple(jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes)


def exact(q, k, v, window, scale, cap):
    mask = attention.causal_mask(jnp.ones(q.shape[:2], jnp.int32), q.shape[1], 0, window)
    return attention.attend(q, k, v, mask, scale, cap)


@pytest.mark.parametrize(
    ("window", "cap", "Dh"), [(0, 0.0, 64), (40, 0.0, 128), (0, 3.0, 64), (130, 3.0, 64)]
)
def test_splash_is_xlas_attention(window, cap, Dh):
    """160 tokens: rows are filled up to two blocks."""
    q, k, v = draw(Dh=Dh)
    kernel = attention.Kernel("splash", interpret=True)
    got = attention.splash(q, k, v, kernel, window, 0.2, cap)
    np.testing.assert_allclose(got, exact(q, k, v, window, 0.2, cap), atol=2e-5)


@pytest.mark.parametrize("window", [0, 40])
def test_what_cudnn_is_asked_for_is_xlas_attention(window, monkeypatch):
    """The same call, computed by XLA: scale, causality, window and grouping mean what they must."""
    asked = jax.nn.dot_product_attention
    seen = {}

    def by_xla(*args, implementation, **kwargs):
        seen.update(kwargs, implementation=implementation)
        return asked(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    q, k, v = draw(T=96)
    kernel = attention.Kernel("cudnn")
    got = attention.flash(q, k, v, kernel=kernel, window=window, scale=0.2, cap=0.0)
    np.testing.assert_allclose(got, exact(q, k, v, window, 0.2, 0.0), atol=2e-5)
    assert seen["is_causal"] and seen["implementation"] == "cudnn"


def test_a_decoder_with_two_kinds_of_layers_and_splash_is_that_with_xla(tmp_path):
    """Right padding and no mask; forward and gradient."""
    model = rt.load(str(tiny.make_family(tmp_path, "gemma2", num_hidden_layers=2)))
    segments = (("blocks", 2),)
    ids = np.random.default_rng(0).integers(4, tiny.VOCAB, (2, 40)).astype(np.int32)
    mask = jnp.asarray(np.arange(40) < np.array([[40], [25]]), jnp.int32)

    def loss(params, kernel):
        decoder = Decoder(model.arch, segments, jnp.float32, kernel=kernel)
        hidden, _ = decoder.apply({"params": params}, ids, mask)
        return (
            jnp.square(hidden * mask[..., None]).mean() + (hidden * mask[..., None])[..., 0].sum()
        )

    both = [
        jax.jit(jax.value_and_grad(functools.partial(loss, kernel=kernel)))(model.params)
        for kernel in (attention.XLA, attention.Kernel("splash", interpret=True))
    ]
    (want, want_grads), (got, got_grads) = both
    assert got == pytest.approx(float(want), rel=1e-5)
    for a, b in zip(jax.tree.leaves(got_grads), jax.tree.leaves(want_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()))


# A training step of a decoder with windows and soft-caps on four chips, by the real TPU compiler.
_COMPILE = """
import json, jax, jax.numpy as jnp, numpy as np
from flax import traverse_util
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from reptune_jax import mesh as meshes
from reptune_jax.hub import weights
from reptune_jax.model import attention
from reptune_jax.model.arch import Arch, Layer, Rope
from reptune_jax.model.transformer import Decoder

topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
mesh = Mesh(np.array(topology.devices).reshape(1, 2, 2), meshes.AXES)
rope = Rope(1e4)
found = {}
for Dh in (64, 128):
    arch = Arch("gemma2", 512, 256, 2, 4, 2, Dh, 512, rope, 1e-5, True, score_cap=50.0,
                layers=(Layer(100, rope), Layer(0, rope)))
    kernel = attention.choose(arch, "tpu", "bfloat16", mesh=mesh)
    decoder = Decoder(arch, (("blocks", 2),), jnp.bfloat16, kernel=kernel)

    def shaped(path, leaf):
        layout = NamedSharding(mesh, meshes.spec(path, leaf.ndim))
        return jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=layout)

    flat = {p: shaped(p, leaf) for p, leaf in weights.abstract_params(arch).items()}
    params = traverse_util.unflatten_dict(flat, sep="/")
    rows = jax.ShapeDtypeStruct((4, 300), jnp.int32, sharding=NamedSharding(mesh, meshes.BATCH))

    def loss(params, tokens, mask):
        hidden, _ = decoder.apply({"params": params}, tokens, mask)
        return jnp.square(hidden.astype(jnp.float32)).mean()

    text = jax.jit(jax.grad(loss)).lower(params, rows, rows).compile().as_text()
    found[Dh] = text.count("tpu_custom_call")
print(json.dumps(found))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the libtpu package")
def test_splash_compiles_for_a_tpu_slice():
    # No TPU is opened, so that other processes with the library are no trouble.
    settings = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    run = subprocess.run(
        [sys.executable, "-c", _COMPILE],
        env={**os.environ, **settings, "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads(run.stdout.splitlines()[-1])
    # Forward, and both backward kernels, of each kind of layer.
    assert all(count >= 6 for count in found.values()) and len(found) == 2, found
