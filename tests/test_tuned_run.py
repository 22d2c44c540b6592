"""A tuned run's weights, scaled and less those of another: against arithmetic in float64."""

from pathlib import Path

import numpy as np
import pytest
from flax import traverse_util

from reptune_jax import lm
from reptune_jax.hub.rounding import Rounding
from reptune_jax.hub.safetensors_io import TensorHandle
from reptune_jax.tuned_run import TunedRun
from tests.support import tiny

LAYERS, KERNEL = (1, 3), "attn/v/kernel"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return lm.load(str(tiny.make_llama(tmp_path_factory.mktemp("llama"))), "float32")


def whole_of(model):
    return np.asarray(model.params["blocks"]["attn"]["v"]["kernel"], np.float64)


def run_of(model, seed, rank=0):
    """A run that changed one kernel by noise, and that change in float64."""
    rng, before = np.random.default_rng(seed), whole_of(model)[slice(*LAYERS)]
    meta = {"model_sha": model.sha, "model": "tiny", "layers": list(LAYERS)}
    if rank:
        a = rng.normal(size=(len(before), before.shape[1], rank)).astype(np.float32)
        b = rng.normal(size=(len(before), rank, *before.shape[2:])).astype(np.float32)
        meta["lora"] = {"rank": rank, "alpha": 6.0, "targets": ["attn/v"]}
        change = 6.0 / rank * np.einsum("ldr,lrkh->ldkh", a.astype(float), b)
        trained = {"attn/v/lora_a": a, "attn/v/lora_b": b}
    else:
        trained = {KERNEL: (before + rng.normal(size=before.shape)).astype(np.float32)}
        change = trained[KERNEL].astype(float) - before
    return TunedRun(Path(f"run{seed}"), trained, meta, 0), change


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_the_dial_adds_that_many_times_the_change(model, scale, rank):
    run, change = run_of(model, 0, rank)
    want = whole_of(model)
    want[slice(*LAYERS)] += scale * change
    got = run.scaled(scale).over(model).params["blocks"]["attn"]["v"]["kernel"]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    flat = traverse_util.flatten_dict(model.params, sep="/")
    handles = {
        name: TensorHandle(leaf.shape, np.dtype("float32"), lambda leaf=leaf: np.array(leaf))
        for name, leaf in flat.items()
    }
    streamed = run.scaled(scale).over_leaves(handles, "float32", Rounding("float32"))
    np.testing.assert_allclose(streamed[f"blocks/{KERNEL}"].read(), want, rtol=1e-5, atol=1e-5)
    if rank:  # what an exported adapter says
        assert run.scaled(scale).lora["alpha"] == 6.0 * scale


def test_as_trained_is_to_the_bit(model):
    run, _ = run_of(model, 0)
    got = run.over(model).params["blocks"]["attn"]["v"]["kernel"]
    np.testing.assert_array_equal(got[slice(*LAYERS)], run.trained[KERNEL])


@pytest.mark.parametrize("rank", [0, 2])
def test_contrastive_weights_are_the_difference_of_two_changes(model, rank):
    (plus, up), (minus, down) = run_of(model, 0, rank), run_of(model, 1, rank)
    want = whole_of(model)
    want[slice(*LAYERS)] += 0.7 * (up - down)
    got = plus.without(minus).scaled(0.7).over(model).params["blocks"]["attn"]["v"]["kernel"]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_runs_of_other_layers_are_not_subtracted(model):
    plus, (minus, _) = run_of(model, 0)[0], run_of(model, 1)
    minus.meta["layers"] = [0, 2]
    with pytest.raises(ValueError, match=r"run1: changed .*expected the same model, layers"):
        plus.without(minus)
