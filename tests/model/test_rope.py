"""Rotary positions against transformers' own frequencies, and a rotation written out."""

import jax.numpy as jnp
import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from reptune_jax.model import families, rope
from reptune_jax.model.arch import Rope

SCALED = {  # as published for Llama 3.1 and others
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "llama3, another band": {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 32.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 16.0,
        "original_max_position_embeddings": 2048,
    },
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
}


@pytest.mark.parametrize("scaling", SCALED.values(), ids=SCALED)
def test_frequencies_are_those_of_transformers(scaling):
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=2, head_dim=128, rope_parameters=dict(scaling)
    )
    theirs, _ = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu")
    ours = rope.rope_frequencies(families.read_rope({"rope_parameters": scaling}), 128)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.25])
def test_of_a_share_the_first_dims_have_the_wavelengths_of_so_many(share):
    R = int(64 * share)
    freq = rope.rope_frequencies(Rope(1e4, share=share), 64)
    np.testing.assert_allclose(freq, [1e4 ** (-2 * i / R) for i in range(R // 2)], rtol=1e-6)


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_pair_of_halves_is_a_complex_number_that_turns(share, dtype):
    rng, Dh = np.random.default_rng(0), 16
    x = jnp.asarray(rng.normal(size=(1, 4, 2, Dh)), dtype)
    positions = np.array([[0, 1, 300, 70_001]])  # bfloat16 knows neither of the last two
    tables = rope.rope_tables(Rope(1e4, share=share), Dh, jnp.asarray(positions))
    got, R = rope.rotate(x, tables), int(Dh * share)
    assert got.dtype == dtype
    exact = np.asarray(x, np.float64)
    freq = 1e4 ** (-np.arange(0, R, 2) / R)
    turned = (exact[..., : R // 2] + 1j * exact[..., R // 2 : R]) * np.exp(
        1j * positions[..., None, None] * freq
    )
    want = np.concatenate([turned.real, turned.imag, exact[..., R:]], -1)
    # In float32 an angle of 70,001 is known to a hundredth.
    np.testing.assert_allclose(
        np.asarray(got, np.float64), want, atol=0.02 + 0.02 * (dtype != jnp.float32)
    )
    np.testing.assert_array_equal(got[..., R:], x[..., R:])


def test_scores_depend_on_the_distance_alone():
    q, k = (jnp.asarray(np.random.default_rng(i).normal(size=(1, 1, 1, 8))) for i in (0, 1))

    def score(at_q, at_k):
        turned = [
            rope.rotate(x, rope.rope_tables(Rope(100.0), 8, jnp.array([[at]])))
            for x, at in ((q, at_q), (k, at_k))
        ]
        return float(jnp.vdot(*turned))

    assert score(7, 3) == pytest.approx(score(104, 100), rel=1e-4)
    assert abs(score(3, 7) - score(7, 3)) > 0.1  # and on which comes first
