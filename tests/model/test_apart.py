"""The decoding loop with layers apart: what the scan gives, without slicing weights per token."""

import dataclasses
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reptune_jax as rt
from reptune_jax.model import decode
from reptune_jax.model.cache import init_cache
from reptune_jax.model.intervene import Steer
from reptune_jax.model.sampling import Sampling
from tests.support import tiny

B, T, NEW = 3, 21, 13


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return rt.load(str(tiny.make_llama(tmp_path_factory.mktemp("llama"), num_hidden_layers=2)))


@pytest.fixture
def quick_compilation():
    """For what does not depend on the optimizer; compiling is nearly all of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def steering(model, T):
    """Adds at one layer, ablates at another; the last row is left alone."""
    N, D = model.arch.N, model.arch.D
    direction_NxD = np.random.default_rng(1).normal(size=(N, D)).astype(np.float32)
    add, ablate = np.zeros((N, B), np.float32), np.zeros((N, B), np.float32)
    add[1, :2], ablate[2, 0] = 0.7, 1.0
    return Steer(*map(jnp.asarray, (direction_NxD, add, ablate)), jnp.ones((B, T)))


def test_tokens_are_those_of_full_forwards(tmp_path, monkeypatch, quick_compilation):
    """Windows in every other layer, soft-caps, rows padded on the left and steered apart."""
    model = rt.load(str(tiny.make_family(tmp_path, "gemma2")))
    model = dataclasses.replace(model, stop_ids=())
    tokens = np.random.default_rng(0).integers(4, tiny.VOCAB, (B, T)).astype(np.int32)
    mask = np.array([np.arange(T) >= start for start in (0, 5, 11)]).astype(np.int32)
    monkeypatch.setattr(decode, "for_loop", lambda decoder, params: decode.apart(decoder))
    new_BxM = model.generate_ids(tokens, mask, NEW, steer=steering(model, T + 1))
    both = np.concatenate([tokens, new_BxM], axis=1)
    real = np.concatenate([mask, np.ones_like(new_BxM)], axis=1)
    logits = model.forward(both, real, steer=steering(model, T + NEW)).logits_BxTxV
    said_BxMxV = np.asarray(logits)[:, T - 1 : -1]
    chosen = np.take_along_axis(said_BxMxV, new_BxM[..., None], axis=2)[..., 0]
    np.testing.assert_allclose(chosen, said_BxMxV.max(axis=2), rtol=1e-5, atol=1e-5)
    assert len(set(map(tuple, new_BxM))) == B


def lowered(model, decoder):
    """The program that continues one prompt."""
    one = jnp.ones((1, 7), jnp.int32)
    cache = init_cache(model.arch, decoder.segments, 1, 7 + NEW, model.dtype)
    none, cold, key = jnp.array([-1]), Sampling(), jax.random.key(0)
    return decode.generate.lower(
        decoder, model.params, one, one, cache, None, none, cold, key, max_new=NEW
    )


def moved_in_loop(program, sizes):
    """Instructions in the token loop that copy or slice out as many numbers as one of `sizes`."""
    bodies = dict(re.findall(r"^(?:ENTRY )?%?([\w.-]+) [^\n]*\{\n(.*?)^\}", program, re.M | re.S))
    loops = re.findall(r"= (\(.*\)) while\(.*body=%?([\w.-]+)", program)
    (start,) = [body for carried, body in loops if f"s32[1,{NEW}]" in carried]
    seen, left, found = set(), [start], []
    while left:
        if (name := left.pop()) in seen:
            continue
        seen.add(name)
        for called in re.findall(
            r"(?:calls|body|condition|to_apply|computations)=\{?([^}\s]+)", bodies[name]
        ):
            left += [c.strip("% ,") for c in called.split(",") if c.strip("% ,") in bodies]
        for dims, kind in re.findall(
            r"= \w+\[([\d,]*)\]\S* (dynamic-slice|slice|copy|transpose|concatenate)\(", bodies[name]
        ):
            if math.prod(int(d) for d in dims.split(",") if d) in sizes:
                found.append(f"{kind}[{dims}]")
    return found


def test_the_loop_slices_and_copies_no_layers_weights(llama):
    kernels = [a for a in jax.tree.leaves(llama.params["blocks"]) if a.ndim > 2]
    sizes = {a.size // llama.arch.N for a in kernels}
    assert sizes == {64 * 4 * 16, 64 * 2 * 16, 64 * 96}
    scan = lowered(llama, llama.decoder).compile().as_text()
    assert len(moved_in_loop(scan, sizes)) >= len(kernels)  # the scan does, so it would be seen
    apart = lowered(llama, decode.apart(llama.decoder)).compile()
    assert moved_in_loop(apart.as_text(), sizes) == []
    cache = 2 * llama.arch.N * 2 * (7 + NEW) * 16 * 4
    assert apart.memory_analysis().alias_size_in_bytes == cache  # written in place


def test_layers_are_apart_on_accelerators_that_have_the_memory(llama, monkeypatch):
    held = sum(a.nbytes for a in jax.tree.leaves(llama.params))
    copy = sum(a.nbytes for a in jax.tree.leaves(llama.params["blocks"]))
    need = (held + copy) * 3 / 2

    def segments(platform, stats):
        device = types.SimpleNamespace(platform=platform, memory_stats=lambda: stats)
        monkeypatch.setattr(jax, "local_devices", lambda: [device])
        return len(decode.for_loop(llama.decoder, llama.params).segments)

    assert segments("cpu", None) == 1
    assert segments("gpu", {"bytes_limit": need + 8}) == segments("tpu", None) == llama.arch.N == 2
    assert segments("gpu", {"bytes_limit": need - 8}) == 1
