"""Edits and cosines of the residual stream against a few lines of float64 numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from reptune_jax.model import intervene

B, T, D = 3, 5, 16


def draw(scale=1.0):
    """Residuals, a direction, a center, doses to add, shares to ablate, tokens that are edited."""
    rng = np.random.default_rng(0)
    x, v, center = rng.normal(size=(B, T, D)), scale * rng.normal(size=D), rng.normal(size=D)
    token_BxT = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 0, 1, 0]])
    return x, v, center, np.array([2.0, -1.0, 0.5]), np.array([1.0, 0.25, 0.5]), token_BxT


def edited(x, v, add_B, ablate_B, token_BxT):
    u, out = v / np.linalg.norm(v), np.array(x)
    for b, t in np.argwhere(token_BxT):
        h = x[b, t] - ablate_B[b] * (x[b, t] @ u) * u
        out[b, t] = h + add_B[b] * v
    return out


@pytest.mark.parametrize("scale", [1.0, 1e-3, 50.0])  # a direction's length must not matter
def test_an_edit_is_ablation_then_addition_where_it_is_asked_for(scale):
    x, v, _, add_B, ablate_B, token_BxT = draw(scale)
    arrays = (jnp.asarray(a, jnp.float32) for a in (x, v, add_B, ablate_B, token_BxT))
    h, direction, add, ablate, token = arrays
    got = intervene.apply_steer(h, token, direction, add, ablate)
    np.testing.assert_allclose(got, edited(x, v, add_B, ablate_B, token_BxT), atol=1e-4)


def test_an_edit_of_bfloat16_is_computed_in_float32_and_rounded_once():
    x, v, _, _, ablate_B, token_BxT = draw()
    x = jnp.asarray(30 * x, jnp.bfloat16)
    add_B = np.array([0.01, 1.01, 0.3])
    got = intervene.apply_steer(x, *(jnp.asarray(a) for a in (token_BxT, v, add_B, ablate_B)))
    assert got.dtype == jnp.bfloat16
    exact = edited(np.asarray(x, np.float64), v, add_B, ablate_B, token_BxT)
    want = np.asarray(jnp.asarray(exact, jnp.float32).astype(jnp.bfloat16), np.float64)
    same = np.asarray(got, np.float64) == want
    assert same.mean() > 0.98  # but for halves that float32 rounds the other way


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("rows", [False, True], ids=["one direction", "one a row"])
def test_a_cosine_is_taken_from_the_center(scale, rows):
    x, v, center, *_ = draw(scale)
    want = np.stack([(x - center) @ v for _ in range(1)])[0]
    want = want / np.linalg.norm(x - center, axis=-1) / np.linalg.norm(v)
    v, center = (np.tile(a, (B, 1)) if rows else a for a in (v, center))
    for dtype, atol in ((jnp.float32, 1e-5), (jnp.bfloat16, 4e-3)):
        h = jnp.asarray(x, dtype)
        h64 = np.asarray(h, np.float64) - (center[:, None] if rows else center)
        exact = (h64 * (v[:, None] if rows else v)).sum(-1)
        exact /= np.linalg.norm(h64, axis=-1) * np.linalg.norm(v[0] if rows else v)
        got = intervene.cosine(h, jnp.asarray(v), jnp.asarray(center))
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, exact, atol=1e-5)
        np.testing.assert_allclose(got, want, atol=atol)
    assert not np.asarray(intervene.cosine(jnp.asarray(x), jnp.zeros(D), jnp.zeros(D))).any()
