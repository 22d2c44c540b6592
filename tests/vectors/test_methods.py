"""Vector methods on residuals whose direction is known, each against another way to compute it."""

import numpy as np
import pytest
from sklearn.covariance import ledoit_wolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression

from reptune_jax import config, ranges
from reptune_jax.evals.stats import auroc
from reptune_jax.vectors import directions
from reptune_jax.vectors.methods import METHODS
from tests.support.vector_case import cosines, folded, planted


def anisotropic(**changes):
    """Noise that is long in a few coordinates, and small elsewhere."""
    return planted(**{"noise_D": np.r_[np.full(6, 12.0), np.full(18, 0.5)]} | changes)


def test_the_config_names_the_methods():
    assert config.METHODS == tuple(METHODS) == ranges.RANGES["vector.method"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_a_planted_direction_at_the_same_dose(method):
    positive, negative, planted_NxD = planted(P=400, strength=5.0)
    vector, _ = folded(method, positive, negative)
    assert cosines(vector.directions_NxD, planted_NxD).min() > 0.95
    length_N = np.linalg.norm((positive - negative).mean(1), axis=1)
    np.testing.assert_allclose(np.linalg.norm(vector.directions_NxD, axis=1), length_N, rtol=1e-4)
    assert (vector.meta["method"], vector.meta["pairs"], vector.layers) == (method, 400, (0, 1))
    assert vector.meta["sign"]["by"] == ("pairs" if method.startswith("pca") else "classes")
    along = np.einsum("npd,nd->np", positive - negative, vector.directions_NxD)
    np.testing.assert_allclose(vector.meta["sign"]["share"], (along > 0).mean(1), atol=1e-4)
    assert min(vector.meta["sign"]["share"]) > 0.95


@pytest.mark.parametrize("method", METHODS)
def test_batches_and_their_order_make_no_difference(method):
    positive, negative, _ = planted(P=60)
    vector, _ = folded(method, positive, negative)
    shuffled = np.random.default_rng(1).permutation(60)
    again, rows = folded(method, positive, negative, batch=25, order=shuffled)
    scale = np.abs(vector.directions_NxD).max()
    assert np.abs(again.directions_NxD - vector.directions_NxD).max() < 1e-5 * scale
    np.testing.assert_array_equal(rows.layer(1)[0], positive[1])  # in the order given
    for name in ("residual_norm_N", "mean_NxD"):
        np.testing.assert_allclose(getattr(again, name), getattr(vector, name), rtol=1e-4)


@pytest.mark.parametrize(("P", "D"), [(12, 30), (50, 8)])
@pytest.mark.parametrize("method", ["pca", "pca_center"])
def test_pca_is_the_first_component_of_the_differences_and_of_pair_centred_rows(method, P, D):
    positive, negative, _ = planted(P=P, D=D, strength=2.0)
    vector, _ = folded(method, positive, negative)
    for l in range(2):
        difference = positive[l].astype(np.float64) - negative[l]
        middle = (positive[l].astype(np.float64) + negative[l]) / 2
        centred = np.concatenate([positive[l] - middle, negative[l] - middle])
        for rows in (difference, centred):
            top_D = np.linalg.eigh(rows.T @ rows)[1][:, -1]
            top_D *= np.sign(np.median(difference @ top_D))
            assert cosines(vector.directions_NxD[[l]], top_D[None])[0] > 1 - 1e-5


def test_the_sign_of_a_component_is_that_of_most_pairs():
    """The component is the same whichever side is called positive: one of the signs is wrong."""
    positive, negative, planted_NxD = planted(N=1, P=50, D=8)
    raw = [
        directions.first_component(*sides)
        for sides in ((positive[0], negative[0]), (negative[0], positive[0]))
    ]
    np.testing.assert_allclose(raw[0], raw[1], atol=1e-6)
    there = folded("pca", positive, negative)[0].directions_NxD
    back = folded("pca", negative, positive)[0].directions_NxD
    np.testing.assert_allclose(there, -back, rtol=1e-4, atol=1e-5)
    assert cosines(there, planted_NxD)[0] > 0.9

    one = np.zeros((1, 10, 4), np.float32)  # nine pairs say +, their mean says -
    one[0, :, 0], one[0, 0, 0] = 1, -30
    vector, _ = folded("pca", one, np.zeros_like(one))
    assert vector.directions_NxD[0, 0] > 0 and vector.meta["sign"]["share"] == [0.9]
    assert folded("mean_diff", one, np.zeros_like(one))[0].directions_NxD[0, 0] < 0
    one[0, :5, 0] = -2  # as many as there are +
    assert folded("pca", one, np.zeros_like(one))[0].directions_NxD[0, 0] < 0


def two_sides(P=40, D=24):
    return [side[0].astype(np.float64) for side in anisotropic(N=1, P=P, D=D)[:2]]


@pytest.mark.parametrize(("P", "D"), [(10, 24), (60, 24)])
def test_whitened_is_the_difference_under_the_inverse_covariance(P, D):
    positive, negative = two_sides(P, D)
    rows = np.concatenate([positive - positive.mean(0), negative - negative.mean(0)])
    covariance_DxD, _ = ledoit_wolf(rows, assume_centered=True)
    want = np.linalg.solve(covariance_DxD, positive.mean(0) - negative.mean(0))
    np.testing.assert_allclose(directions.whitened(positive, negative), want, rtol=1e-6)


@pytest.mark.parametrize("P", [10, 60])
def test_lda_is_scikit_learns(P):
    positive, negative = two_sides(P)
    negative = negative[: P - 3]  # sides of unequal length weigh by their rows
    rows, sides = np.concatenate([positive, negative]), [1] * P + [0] * (P - 3)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(rows, sides)
    np.testing.assert_allclose(directions.lda(positive, negative), theirs.coef_[0], rtol=1e-6)


def test_logistic_is_scikit_learns_on_rows_of_mean_variance_one():
    positive, negative = two_sides()
    rows = np.concatenate([positive, negative])
    deviation = np.sqrt(rows.var(0).mean())
    theirs = LogisticRegression(C=1.0, max_iter=1000, tol=1e-8).fit(
        (rows - rows.mean(0)) / deviation, [1] * 40 + [0] * 40
    )
    ours = directions.logistic(positive, negative)
    assert cosines(ours[None], theirs.coef_)[0] > 0.9999
    for scale in (1e-2, 1e3):  # the penalty weighs the same where residuals are longer
        again = directions.logistic(scale * positive, scale * negative)
        assert cosines(ours[None], again[None])[0] > 0.9999


def test_a_nuisance_that_is_long_is_weighed_down_by_whitening():
    """The mean difference follows a few coordinates of long noise: it separates new rows worse."""
    positive, negative, _ = anisotropic()
    new = anisotropic(P=200, seed=5)
    planted_NxD = anisotropic()[2]
    shift = (planted_NxD - new[2])[:, None] * 1.5  # the direction of the first, noise of the second
    fresh = np.concatenate([new[0] + shift, new[1] - shift], 1)
    labels = [1] * 200 + [0] * 200
    found = {}
    for method in ("mean_diff", "whitened", "lda"):
        vector, _ = folded(method, positive, negative)
        found[method] = [auroc(fresh[l] @ vector.directions_NxD[l], labels) for l in range(2)]
    for l in range(2):
        assert min(found["whitened"][l], found["lda"][l]) > found["mean_diff"][l] + 0.2


@pytest.mark.parametrize("method", METHODS)
def test_a_single_pair_is_its_difference(method):
    positive, negative, _ = planted(P=1)
    vector, _ = folded(method, positive, negative)
    np.testing.assert_allclose(vector.directions_NxD, (positive - negative)[:, 0], atol=2e-4)


@pytest.mark.parametrize("method", METHODS)
def test_projecting_out_leaves_nothing_along_the_nuisance(method):
    positive, negative, planted_NxD = planted(P=60, strength=5.0)
    nuisance_NxD = planted(seed=9)[2] + 0.5 * planted_NxD  # not orthogonal to what is looked for
    nuisance_NxD[1] = 0  # nothing is removed there
    plain, _ = folded(method, positive, negative)
    vector, rows = folded(method, positive, negative, nuisance=7 * nuisance_NxD)
    u_D = nuisance_NxD[0] / np.linalg.norm(nuisance_NxD[0])
    length = np.linalg.norm(vector.directions_NxD[0])
    assert abs(vector.directions_NxD[0] @ u_D) < 1e-6 * length
    assert abs(plain.directions_NxD[0] @ u_D) > 0.1 * length
    np.testing.assert_allclose(
        vector.directions_NxD[1], plain.directions_NxD[1], rtol=1e-4, atol=1e-5
    )
    clean = [x - np.outer(x @ u_D, u_D) for x in (positive[0], negative[0])]
    np.testing.assert_allclose(rows.layer(0)[0], clean[0], atol=1e-4)
    want_D = (clean[0] - clean[1]).mean(0)
    np.testing.assert_allclose(length, np.linalg.norm(want_D), rtol=1e-4)
    unit = clean[0] - clean[1]
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    agreement = (np.square(unit.sum(0)).sum() - 60) / (60 * 59)
    np.testing.assert_allclose(vector.meta["agreement"][0], agreement, atol=1e-3)
    # norms and means are the model's own
    np.testing.assert_array_equal(vector.mean_NxD, plain.mean_NxD)
    np.testing.assert_array_equal(vector.residual_norm_N, plain.residual_norm_N)


def test_a_contrast_that_is_all_nuisance_is_refused():
    positive, negative, _ = planted(P=9)
    difference_NxD = (positive - negative).mean(1)
    with pytest.raises(ValueError, match=r"the same mean .*, but for what is projected out"):
        folded("mean_diff", positive, negative, nuisance=difference_NxD)
    difference_NxD[0] = 0
    assert folded("mean_diff", positive, negative, nuisance=difference_NxD)[0].layers == (0,)
