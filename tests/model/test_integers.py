"""A frozen base held in integers: its arithmetic, its memory, and runs that tune adapters on it."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from reptune_jax import cards, frozen, lm, ranges, roles, train, tuned_run
from reptune_jax.evals import arms
from reptune_jax.folder import Study
from reptune_jax.hub.source import open_source
from reptune_jax.model import integers, lora
from tests.support import eight_devices, tiny, tiny_behavior, tuning_case
from tests.support.held_case import TUNED, run, settings
from tests.support.runs import Stop, read_log, stop_at

HOWS = ("int8", "int4")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny.make_llama(tmp_path_factory.mktemp("llama"), num_hidden_layers=7)
    return lm.load(str(folder), "float32")


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def by_hand(w_IxO, how):
    """float64: every output's, and for int4 every 32 inputs', own step of the bfloat16 kind."""
    top, group = (127, len(w_IxO)) if how == "int8" else (7, 32)
    out = np.zeros(w_IxO.shape)
    for o in range(w_IxO.shape[1]):
        for start in range(0, len(w_IxO), group):
            part = w_IxO[start : start + group, o].astype(np.float64)
            step = float(jnp.bfloat16(np.float32(np.abs(part).max()) / np.float32(top)))
            out[start : start + group, o] = np.round(part / step) * step if step else 0.0
    return out


def dequantized(model, how):
    """The model with the kernels that the integers stand for put in by hand."""
    out = {}
    for path, leaf in flat(model.params).items():
        a = np.asarray(leaf)
        if path.startswith("blocks/") and path.endswith("/kernel"):
            inputs = 2 if "/o/" in path else 1
            wide = a.reshape(len(a), int(np.prod(a.shape[1 : 1 + inputs])), -1)
            a = np.stack([by_hand(w, how) for w in wide]).reshape(a.shape).astype(np.float32)
        out[path] = jnp.asarray(a)
    return dataclasses.replace(model, params=traverse_util.unflatten_dict(out, sep="/"))


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("shape,inputs", [((96, 4, 16), 1), ((3, 16, 8), 2), ((33, 5), 1)])
def test_a_product_is_that_of_the_rounded_kernel(shape, inputs, how):
    """float64 by hand; also where the last 32 inputs are fewer, and where an output is all zero."""
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal(shape).astype(np.float32)
    kernel[..., -1] = 0
    ins, outs = shape[:inputs], shape[inputs:]
    want_IxO = by_hand(kernel.reshape(int(np.prod(ins)), -1), how)
    held = integers.hold(jnp.asarray(kernel), inputs, 0, how)
    got = np.asarray(integers.whole(held["codes"], held["step"], shape))
    np.testing.assert_array_equal(got.reshape(want_IxO.shape), want_IxO)
    x = rng.standard_normal((2, 5, *ins)).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        y = integers.product(jnp.asarray(x), held["codes"], held["step"], inputs, outs)
    want = x.reshape(2, 5, -1).astype(np.float64) @ want_IxO
    np.testing.assert_allclose(
        np.asarray(y).reshape(want.shape), want, atol=1e-6 * np.abs(want).max()
    )
    # Memory: a byte, or half of one, for each weight, and two for each step.
    I, O = want_IxO.shape
    groups = 1 if how == "int8" else -(-I // 32)
    weights = I * O if how == "int8" else groups * 16 * O
    assert sum(a.nbytes for a in held.values()) == weights + 2 * groups * O


@pytest.fixture(scope="module")
def plain(model):
    return {how: dequantized(model, how) for how in HOWS}


def stacks(hlo, a):
    """The shapes of what holds kernels of all tuned layers as floats."""
    sizes = {a.D * a.H * a.Dh, a.D * a.K * a.Dh, a.D * a.F}
    found = (tuple(map(int, s.split(","))) for s in re.findall(r"f32\[([\d,]+)\]", hlo))
    return {s for s in found if s[0] == TUNED[1] - TUNED[0] and int(np.prod(s[1:])) in sizes}


@pytest.mark.parametrize("how,remat", [("int8", "dots"), ("int4", "none")])
def test_gradients_are_those_of_dequantized_weights_and_no_stack_of_these_is_made(
    how, remat, model, plain
):
    """To 1e-5. Neither forward nor back has the compiled step such an array, even where all is
    stored that can be; where kernels are floats the same pattern sees them."""
    c = settings(how, train__remat=remat)
    grads, mean_J, hlo = run(frozen.hold(model, c), c)
    want, want_J, of_floats = run(plain[how], settings(how, train__remat="none"))
    np.testing.assert_allclose(mean_J, want_J, rtol=1e-5, atol=1e-6)
    for path, leaf in want.items():
        scale = np.abs(leaf).max()
        np.testing.assert_allclose(grads[path], leaf, rtol=1e-5, atol=1e-5 * scale, err_msg=path)
    assert not stacks(hlo, model.arch) and stacks(of_floats, model.arch)


def test_a_model_is_loaded_as_a_loaded_one_is_held(model, tmp_path):
    c = settings("int4")
    c.dtype = "float32"
    loaded, held = frozen.load(open_source(model.name), c, None), frozen.hold(model, c)
    assert loaded.sha == held.sha == model.sha and loaded.held == held.held == "int4"
    assert frozen.hold(held, c) is held and frozen.hold(model, settings("")) is model
    ours, theirs = flat(loaded.params), flat(held.params)
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        assert leaf.dtype == theirs[path].dtype, path
        np.testing.assert_array_equal(leaf, theirs[path], err_msg=path)
    # Embeddings and norms are the model's own; every kernel of a block is integers.
    np.testing.assert_array_equal(ours["embed/embedding"], model.params["embed"]["embedding"])
    assert not [path for path in ours if path.endswith("kernel")]
    kinds = {path.rpartition("/")[2]: str(leaf.dtype) for path, leaf in ours.items()}
    assert (kinds["codes"], kinds["step"], kinds["scale"]) == ("uint8", "bfloat16", "float32")


def test_what_cannot_be_is_refused_before_any_work(model, tmp_path):
    c = settings("int4", model="x")
    c.train.lora.rank = 0
    with pytest.raises(
        ValueError, match=r"train.base: got 'int4' with train.lora.rank=0, expected "
    ):
        ranges.check(c)
    c.train.base = "int3"
    with pytest.raises(ValueError, match=r"train.base: got 'int3', expected one of , int8, int4"):
        ranges.check(c)
    assert roles.is_of("train.base", roles.OF_VECTOR)  # which is read as tuning holds the model


def test_sharded_gradients_are_those_of_one_device(model, tmp_path):
    out = tmp_path / "sharded.npz"
    eight_devices.run("held_case", model.name, out)
    c = settings("int4", train__remat="none")
    found, (grads, mean_J, _) = np.load(out), run(frozen.hold(model, c), c)
    np.testing.assert_allclose(found["mean_J"], mean_J, rtol=1e-5)
    for path, leaf in grads.items():
        scale = np.abs(leaf).max()
        np.testing.assert_allclose(found[path], leaf, atol=2e-5 * scale, err_msg=path)
    assert "blocks/attn/k/kernel [7, 64, 2, 16]: 2 over tensor=8" in str(found["refused"])


# ---------------------------------------------------------------- a run


def test_a_run_stops_resumes_and_says_what_it_was_trained_on(model, monkeypatch, tmp_path):
    tiny_behavior.patch_neutral(monkeypatch)
    changes = {"train__lora__rank": 2, "train__steps": 2, "train__base": "int4"}
    changes |= {"loss__layers": TUNED, "train__layers": TUNED, "loss__ending": 0.0}
    changes |= {"vector__answers": "given", "targets__answers": "given", "train__cache_gib": 0.0}
    c = tiny_behavior.settings(model.name, tiny_behavior.write(tmp_path), **changes)
    study = Study(tmp_path / "study")
    study.path.mkdir()
    tuning_case.vector(model).save(study.vector)
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        with pytest.raises(Stop):
            train.run(c, study.path, model)  # as a study does, with the base as it is
    folder = train.run(c, study.path)  # and by itself, which loads it as integers
    assert [row["step"] for row in read_log(folder)] == [0, 1, 2, 2]
    tuned = tuned_run.load(folder)
    assert tuned.meta["config"]["train"]["base"] == "int4" and tuned.meta["model_sha"] == model.sha
    assert "trained on a base held in int4" in cards.trained_what(tuned)
    assert "held in int4" in cards.adapter_card(model.name, tuned)
    # It is evaluated, and exported, on the base as it was loaded.
    first, stop = TUNED
    merged = flat(arms.tuned(model, folder).model.params)
    for path, base in flat(model.params).items():
        got, base = np.asarray(merged[path]), np.asarray(base)
        if path in ("blocks/attn/v/kernel", "blocks/attn/o/kernel"):
            name = path.removeprefix("blocks/").removesuffix("kernel")
            a, b = (tuned.trained[name + leaf] for leaf in ("lora_a", "lora_b"))
            base = base.copy()
            base[first:stop] += lora.delta(a, b, 16.0 / 2)
        np.testing.assert_allclose(got, base, atol=1e-7, err_msg=path)
