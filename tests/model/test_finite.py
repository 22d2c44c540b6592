"""Numbers that are not finite: errors by name in what people call, NaN where items are counted."""

import jax.numpy as jnp
import numpy as np
import pytest

import reptune_jax as rt
from reptune_jax.model.decode import MISSING
from reptune_jax.model.intervene import steer_all
from reptune_jax.vectors.steering_vector import SteeringVector
from tests.support import tiny
from tests.support import torch_reference as ref
from tests.support.folders import rewrite

PROMPTS = ["Tell me.", "Is the claim true or false?"]
ADVICE = r'in float16.*expected finite ones. Use dtype="bfloat16" or "float32" in `load`'


def overflowing(folder):
    """Every weight fits into float16, and what the first MLP writes does not."""

    def change(tensors):
        for part in ("up", "down"):
            tensors[f"model.layers.0.mlp.{part}_proj.weight"] *= 2000

    tiny.make_llama(folder)
    rewrite(folder, change)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return overflowing(tmp_path_factory.mktemp("large"))


@pytest.fixture(scope="module")
def half(folder):
    return rt.load(str(folder), dtype="float16")


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return rt.load(str(tiny.make_llama(tmp_path_factory.mktemp("llama"))))


def beyond():
    """Finite numbers whose sum over two layers float32 does not hold."""
    directions = np.zeros((4, 64), np.float32)
    directions[1:3] = 3e38
    return SteeringVector(directions, np.ones(4, np.float32), 0 * directions, (1, 2), {})


def test_a_model_that_overflows_says_so_and_nothing_else(half):
    with pytest.raises(ValueError, match=r"in 2 of 2 answers \(number 0, 1, from 0\)"):
        half.generate(PROMPTS, max_new_tokens=4)
    ids = [half.encode_prompt(p) for p in PROMPTS]
    for call in (
        lambda: half.generate(PROMPTS, max_new_tokens=4, temperature=1.0),
        lambda: half.loglikelihood([("Tell me", " of it")]),
        lambda: half.next_logp(ids, np.array([[5], [6]])),
        lambda: rt.extract(half, [("I love it.", "I hate it."), ("Good day", "Bad day")]),
    ):
        with pytest.raises(ValueError, match=ADVICE) as caught:
            call()
        assert half.name in str(caught.value)


def test_what_is_advised_works(folder):
    """The same files in float32 say what transformers says."""
    ours = rt.load(str(folder), dtype="float32")
    theirs = ref.load(folder)
    assert ours.generate(PROMPTS, max_new_tokens=4) == ref.greedy(
        theirs, ours.tokenizer, PROMPTS, 4
    )
    vector = rt.extract(ours, [("I love it.", "I hate it.")])
    assert np.abs(vector.mean_NxD).max() > np.finfo(np.float16).max


def test_a_row_that_overflows_leaves_the_others_as_they_are(ours):
    ids = np.array([[7, 8, 9], [7, 8, 9], [20, 21, 22]], np.int32)
    plain = ours.generate_ids(ids, None, 6)
    add_NxB = np.zeros((4, 3), np.float32)
    add_NxB[1, 1] = np.inf
    steer = steer_all(jnp.ones((4, 64)), jnp.zeros(4), 3, 4).replace(add_NxB=jnp.asarray(add_NxB))
    got = ours.generate_ids(ids, None, 6, steer=steer, missing=True)
    np.testing.assert_array_equal(got[[0, 2]], plain[[0, 2]])
    assert (got[1] == MISSING).all()
    with pytest.raises(ValueError, match=r"1 of 3 answers \(number 1, from 0\).*smaller doses"):
        ours.generate_ids(ids, None, 6, steer=steer)


def test_doses_that_are_too_large_are_named(ours):
    with pytest.raises(ValueError, match=r"float32, in 2 of 2 answers.*Use smaller doses"):
        ours.generate(PROMPTS, max_new_tokens=4, steer=beyond())
    with pytest.raises(ValueError, match=r"in 1 of 1 scores.*Use smaller doses"):
        ours.loglikelihood([("Tell me", " of it")], steer=beyond())


def test_where_items_are_counted_they_are_missing(ours):
    rows = [[7, 8, 9], [10, 11]]
    assert ours.generate_each(rows, 4, steer=beyond(), missing=True) == [[MISSING]] * 2
    scores = ours.score_ids(rows, [1, 1], beyond(), missing=True)
    assert np.isnan([logp for logp, _ in scores]).all() and not any(g for _, g in scores)
    logp_IxC = ours.next_logp(rows, [[1, 2], [3, 4]], beyond(), missing=True)
    assert logp_IxC.shape == (2, 2) and np.isnan(logp_IxC).all()


def test_weights_beyond_float16_are_refused_when_they_are_read(tmp_path):
    name = "model.layers.1.mlp.down_proj.weight"
    tiny.make_llama(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors[name].__imul__(1e7))
    rt.load(str(tmp_path), dtype="bfloat16")
    with pytest.raises(ValueError, match=rf"1 tensors have weights beyond float16.*{name}"):
        rt.load(str(tmp_path), dtype="float16")
