"""Sampling by a decoder that finds every token equally likely."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reptune_jax import lm
from reptune_jax.model import decode

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
    tokens, one = jnp.ones((B, 3), jnp.int32), jnp.float32(1)
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

    def generate_ids(self, tokens, mask, max_new, temperature, steer, seed, missing):
        seeds.append(seed)
        return np.ones((len(tokens), 1), int)

    monkeypatch.setattr(lm.Model, "generate_ids", generate_ids)
    arch = lm.Arch("llama", V, 8, 1, 1, 1, 8, 8, None, 1e-5, False)
    model = lm.Model(arch, {}, None, {}, "made", jnp.dtype("float32"), (), {}, None)
    model.generate_each([[1] * n for n in (3, 1, 4, 2)], 1, 1.0, batch_size=size, seed=7)
    assert len(seeds) == len(set(seeds)) == 4 // size
