"""XLA's attention, which every other is compared with, against a float64 loop over its heads."""

import jax.numpy as jnp
import numpy as np
import pytest

from reptune_jax.model import attention
from reptune_jax.model.arch import Arch, Rope

B, T, H, K, Dh = 2, 9, 6, 2, 8


def draw(scale=1.0):
    rng = np.random.default_rng(0)
    shapes = (B, T, H, Dh), (B, K, T, Dh), (B, K, T, Dh)
    return tuple(scale * rng.normal(size=s) for s in shapes)


def exact(q, k, v, mask_BxTxS, scale, cap=0.0):
    """Head h reads the keys of group h // (H / K); a query that sees nothing is left out: 0."""
    out = np.zeros(q.shape)
    for b, t, h in np.ndindex(q.shape[:3]):
        seen = mask_BxTxS[b, t]
        if seen.any():
            score = scale * (k[b, h // (H // K)] @ q[b, t, h])
            score = cap * np.tanh(score / cap) if cap else score
            p = np.where(seen, np.exp(score - score[seen].max()), 0)
            out[b, t, h] = p @ v[b, h // (H // K)] / p.sum()
    return out


def attend(q, k, v, mask, *numbers, dtype=jnp.float32):
    return attention.attend(
        *(jnp.asarray(a, dtype) for a in (q, k, v)), jnp.asarray(mask), *numbers
    )


@pytest.mark.parametrize("window", [0, 1, 4])
@pytest.mark.parametrize("slot", [0, 5])
def test_a_token_sees_itself_and_real_tokens_before_it_within_the_window(window, slot):
    mask_BxS = np.array([[1] * 9, [0] * 3 + [1] * 6])
    got = attention.causal_mask(jnp.asarray(mask_BxS), 3, slot, window)
    for b, t, s in np.ndindex(2, 3, 9):
        at = slot + t
        sees = s <= at and mask_BxS[b, s] and (not window or s > at - window)
        assert bool(got[b, t, s]) == bool(sees), (b, t, s)


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("cap", [0.0, 2.0])  # far below the largest scores
def test_attention_is_a_loop_over_heads(window, cap):
    q, k, v = draw(2.0)
    mask = np.array(attention.causal_mask(jnp.ones((B, T), jnp.int32), T, 0, window))
    got = attend(q, k, v, mask, 0.7, cap)
    np.testing.assert_allclose(got, exact(q, k, v, mask, 0.7, cap), atol=1e-5)


def test_a_query_that_sees_nothing_is_finite_and_disturbs_no_other():
    q, k, v = draw()
    mask = np.array(attention.causal_mask(jnp.array([[0] * 4 + [1] * 5, [1] * 9]), T))
    got, want = np.asarray(attend(q, k, v, mask, 0.3)), exact(q, k, v, mask, 0.3)
    assert np.isfinite(got).all()
    real = mask.any(-1)
    np.testing.assert_allclose(got[real], want[real], atol=1e-5)


def test_scores_of_bfloat16_are_summed_and_compared_in_float32():
    """Large scores that differ by less than bfloat16 can tell."""
    q, k, v = draw(6.0)
    q, k, v = (np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in (q, k, v / 6))
    mask = np.ones((B, T, T), bool)
    got = attend(q, k, v, mask, 1.0, dtype=jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    want = exact(q, k, v, mask, 1.0)
    assert np.abs(np.asarray(got, np.float64) - want).max() < 0.03 * np.abs(want).max()


def test_positions_count_real_tokens_from_the_first():
    mask = jnp.array([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    want = [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2], [0, 1, 2, 3, 4]]
    assert attention.positions_from_mask(mask).tolist() == want


@pytest.mark.parametrize("window", [0, 2])
def test_of_several_texts_in_a_row_a_token_sees_its_own_only(window):
    text = np.array([[1, 1, 1, 2, 2, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 2], [0] * 8])
    got = attention.causal_mask(jnp.asarray(text > 0), 8, window=window, text_BxT=jnp.asarray(text))
    for b, t, s in np.ndindex(3, 8, 8):
        sees = s <= t and text[b, s] == text[b, t] and (not window or s > t - window)
        assert bool(got[b, t, s]) == bool(sees), (b, t, s)
    want = [[0, 1, 2, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6, 0], [*range(8)]]
    assert attention.positions_from_texts(jnp.asarray(text)).tolist() == want


@pytest.mark.parametrize(
    ("Dh", "hopper", "name"),
    [(128, False, "cudnn"), (136, False, "xla"), (256, True, "cudnn"), (264, True, "xla")],
)
def test_heads_of_exactly_the_limit_are_flash_attentions(Dh, hopper, name):
    arch = Arch("llama", 320, 64, 2, 4, 2, Dh, 96, Rope(1e4), 1e-5, False)
    assert attention.choose(arch, "gpu", "bfloat16", hopper=hopper).name == name
