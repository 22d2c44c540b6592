"""Sampling: by a decoder that finds every token equally likely, and against transformers'."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process as theirs

from reptune_jax import lm
from reptune_jax.model import decode, sampling
from reptune_jax.model.sampling import Sampling

V, M = 50, 40


class Uniform:
    """A decoder whose logits are zero; hashable, as a decoder must be."""

    segments = (("blocks", 1),)

    def clone(self, segments):
        return self

    def apply(self, params, tokens_BxT, *args, method=None, cache=None, **kwargs):
        if method == "logits":
            return jnp.zeros((*tokens_BxT.shape[:-1], V))
        return jnp.zeros((*tokens_BxT.shape, 1)), cache


def sample(seed, B=8):
    tokens, one = jnp.ones((B, 3), jnp.int32), Sampling.of(1.0)
    cache = {"blocks": {"k": jnp.zeros((1, B, 1, 3 + M, 1))}}
    args = Uniform(), {"blocks": {}}, tokens, tokens, cache, None, jnp.array([-1]), one
    return np.asarray(decode.generate(*args, jax.random.key(seed), max_new=M)[0])


def test_every_token_of_every_row_has_noise_of_its_own():
    new_BxM = sample(0)
    share = 1 / V + 4 * np.sqrt(1 / V / new_BxM.size)  # how often two that are drawn apart agree
    assert (new_BxM[:, 1:] == new_BxM[:, :-1]).mean() < share  # from token to token
    assert (new_BxM[1:] == new_BxM[:-1]).mean() < share  # from row to row
    assert (new_BxM == sample(1)).mean() < share  # from seed to seed
    count_V = np.bincount(new_BxM.ravel(), minlength=V)
    expected = new_BxM.size / V
    assert ((count_V - expected) ** 2 / expected).sum() < 90  # chi2 of 49: p .0003


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_batch_of_prompts_has_a_seed_of_its_own(size, monkeypatch):
    seeds = []

    def generate_ids(self, tokens, mask, max_new, sampling, steer, seed, missing):
        seeds.append(seed)
        return np.ones((len(tokens), 1), int)

    monkeypatch.setattr(lm.Model, "generate_ids", generate_ids)
    arch = lm.Arch("llama", V, 8, 1, 1, 1, 8, 8, None, 1e-5, False)
    model = lm.Model(arch, {}, None, {}, "made", jnp.dtype("float32"), (), {}, None)
    model.generate_each([[1] * n for n in (3, 1, 4, 2)], 1, 1.0, batch_size=size, seed=7)
    assert len(seeds) == len(set(seeds)) == 4 // size


def warped(logits_BxV, said_BxT, temperature, top_k=0, top_p=1.0, repetition_penalty=1.0):
    """As transformers' generate has it."""
    each = [theirs.RepetitionPenaltyLogitsProcessor(float(repetition_penalty))]
    each += [theirs.TemperatureLogitsWarper(temperature)] if temperature else []
    each += [theirs.TopKLogitsWarper(top_k)] if top_k and temperature else []
    each += [theirs.TopPLogitsWarper(top_p)] if top_p < 1 and temperature else []
    scores = torch.tensor(logits_BxV)
    for warp in each:
        scores = warp(torch.tensor(said_BxT), scores)
    return scores.numpy()


@pytest.mark.parametrize(
    "asked",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.0, "top_k": 2 * V},
        {"temperature": 1.3, "top_p": 0.6},
        {"temperature": 1.0, "top_p": 1e-4},
        {"temperature": 0.5, "top_k": 7, "top_p": 0.9, "repetition_penalty": 1.3},
        {"temperature": 1.0, "repetition_penalty": 0.8},
        {"temperature": 0.0, "top_k": 3, "repetition_penalty": 1.5},
    ],
    ids=str,
)
def test_what_is_drawn_from_is_as_transformers_has_it(asked):
    rng = np.random.default_rng(0)
    logits_BxV = rng.normal(0, 3, (16, V)).astype(np.float32)
    said_BxT = rng.integers(0, V, (16, 9))
    mask_BxT = np.ones((16, 9), np.int32)
    how = Sampling.of(**asked)
    seen_BxV = sampling.seen(how, jnp.asarray(said_BxT), jnp.asarray(mask_BxT), V)
    got_BxV = np.asarray(sampling.warp(how, jnp.asarray(logits_BxV), seen_BxV))
    want_BxV = warped(logits_BxV, said_BxT, **asked)
    np.testing.assert_array_equal(np.isfinite(got_BxV), np.isfinite(want_BxV))
    np.testing.assert_allclose(got_BxV, want_BxV, rtol=1e-5)


def test_a_penalty_meets_what_is_in_the_row_and_not_its_padding():
    how = Sampling.of(0.0, repetition_penalty=2.0)
    tokens, mask = jnp.array([[3, 3, 1], [0, 2, 2]]), jnp.array([[0, 0, 1], [0, 1, 1]])
    seen_BxV = sampling.seen(how, tokens, mask, 5)
    assert np.argwhere(seen_BxV).tolist() == [[0, 1], [1, 2]]
    logits_BxV = jnp.array([[0.0, 9.0, 0, 5.0, 0], [-9.0, -9, -4, -9, -5]])
    token_B, seen_BxV = sampling.draw(how, logits_BxV, seen_BxV, jax.random.key(0))
    assert token_B.tolist() == [3, 4] and np.argwhere(seen_BxV).tolist() == [
        [0, 1], [0, 3], [1, 2], [1, 4]
    ]  # fmt: skip


def test_the_models_own_numbers_are_taken_where_none_are_given(monkeypatch):
    asked = []
    monkeypatch.setattr(lm.Model, "encode_prompt", lambda *a: [1])
    monkeypatch.setattr(
        lm.Model, "generate_each", lambda self, ids, n, how, *a: asked.append(how) or []
    )
    own = sampling.declared(
        {"top_p": 0.8, "top_k": 20, "repetition_penalty": "x", "temperature": 2}
    )
    assert own == {"top_p": 0.8, "top_k": 20}
    arch = lm.Arch("llama", V, 8, 1, 1, 1, 8, 8, None, 1e-5, False)
    model = lm.Model(arch, {}, None, {}, "made", jnp.dtype("float32"), (), {}, None, own)
    model.generate(["a"], chat=False)
    model.generate(["a"], chat=False, temperature=0.5)
    model.generate(["a"], chat=False, temperature=0.5, top_k=0, top_p=0.3)
    assert [jax.tree.leaves(how) for how in asked] == [
        [],
        [0.5, 20, jnp.float32(0.8)],
        [0.5, jnp.float32(0.3)],
    ]
    for name, value in (("top_p", 0.0), ("top_p", 1.5), ("top_k", -1), ("repetition_penalty", 0)):
        with pytest.raises(ValueError, match=f"{name}: got {value}, expected a"):
            model.generate(["a"], chat=False, temperature=1.0, **{name: value})
