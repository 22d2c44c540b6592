"""Statistics of data made so that the right answer is known exactly, not about."""

import itertools
import math

import numpy as np
import pytest

from reptune_jax.evals import stats


def test_a_sampled_permutation_p_is_never_zero():
    """2^40 patterns, of which two are as extreme: 100 draws do not meet one of them."""
    assert stats.sign_flip_p(np.ones(40), np.arange(40), draws=100) == 1 / 101


def test_all_patterns_are_counted_where_they_just_fit():
    deltas = np.random.default_rng(0).normal(0.5, 1, 6)
    flips = np.array(list(itertools.product([-1, 1], repeat=6)))
    expected = (np.abs(flips @ deltas) >= abs(deltas.sum()) - 1e-9).mean()
    assert stats.sign_flip_p(deltas, range(6), draws=64) == expected


def test_a_cluster_flips_as_one():
    deltas, clusters = [1.0, 1.0, 1.0, 1.0], [0, 0, 1, 1]
    assert stats.sign_flip_p(deltas, clusters) == 0.5  # of ++ +- -+ --; by rows it were 2 of 16


def test_both_sides_count_and_so_does_the_pattern_that_was_observed():
    x = np.random.default_rng(1).normal(-0.3, 1, 30)
    assert stats.sign_flip_p(x, np.arange(30)) == pytest.approx(
        stats.sign_flip_p(-x, np.arange(30)), abs=0.02
    )
    for seed in range(20):  # sums of the same numbers in another order differ in their last bit
        x = np.random.default_rng(seed).normal(2, 0.1, 5)
        assert stats.sign_flip_p(x, range(5)) == 2 / 32


def test_seeds_and_clusters_are_drawn_apart():
    """As many seeds as clusters, effects that would cancel if both were drawn alike."""
    n = 8
    effect = np.linspace(-1, 1, n)
    seeds, clusters = (a.ravel() for a in np.indices((n, n)))
    got = stats.bootstrap_mean(effect[seeds] - effect[clusters], clusters, seeds, draws=4000)
    rng = np.random.default_rng(0)
    drawn = [effect[rng.integers(0, n, (20_000, n))].mean(1) for _ in range(2)]
    low, high = np.quantile(drawn[0] - drawn[1], [0.025, 0.975])
    assert (got.low, got.high) == pytest.approx((low, high), rel=0.06)
    assert got.estimate == pytest.approx(0)


def alike(seed_rows, copies=5):
    """(values, labels, clusters, seeds) of clusters that are all the same: only seeds vary."""
    rows = [(v, y, c, s) for s, one in enumerate(seed_rows) for c in range(copies) for v, y in one]
    return (np.array(column) for column in zip(*rows, strict=True))


def test_an_aurocs_interval_spans_its_seeds():
    right, wrong = [(1.0, 1), (0.0, 0)], [(0.0, 1), (1.0, 0)]
    scores, labels, clusters, seeds = alike([right, wrong])
    got = stats.bootstrap_auroc(scores, labels, clusters, seeds, draws=400)
    assert (got.estimate, got.low, got.high) == (0.5, 0.0, 1.0)
    same = stats.bootstrap_auroc(scores, labels, clusters, seeds, other=scores, draws=50)
    assert (same.estimate, same.low, same.high) == (0, 0, 0)


def test_a_means_interval_spans_its_seeds():
    values, _, clusters, seeds = alike([[(1.0, 0)], [(4.0, 0)]])
    got = stats.bootstrap_mean(values, clusters, seeds, draws=400)
    assert (got.estimate, got.low, got.high) == (2.5, 1.0, 4.0)
    weights = np.where(seeds == 0, 3.0, 1.0)
    got = stats.bootstrap_mean(values, clusters, seeds, weights, draws=400)
    assert (got.estimate, got.low, got.high) == (7 / 4, 1.0, 4.0)


def test_the_interval_of_dprime_spans_its_seeds():
    sharp, dull = [(1, 1), (0, 0), (0, 0)], [(1, 1), (1, 0), (0, 0)]
    yes, labels, clusters, seeds = alike([sharp, dull])
    dprime, c = stats.bootstrap_dprime(yes, labels, clusters, seeds, draws=400)
    ends = [stats.dprime_c(10, 10, fas, 20) for fas in (10, 0)]  # one seed twice, the other not
    assert (dprime.low, dprime.high) == pytest.approx((ends[0][0], ends[1][0]))
    assert (c.low, c.high) == pytest.approx((ends[0][1], ends[1][1]))
    assert dprime.estimate == pytest.approx(stats.dprime_c(10, 10, 5, 20)[0])


@pytest.mark.parametrize(("level", "z"), [(0.5, 0.674), (0.8, 1.282)])
def test_an_interval_has_its_level(level, z):
    x = np.random.default_rng(2).normal(size=400)
    got = stats.bootstrap_mean(x, np.arange(400), draws=4000, level=level)
    half = z * x.std() / 20
    assert (got.low, got.high) == pytest.approx((x.mean() - half, x.mean() + half), abs=0.005)


def test_a_resample_has_as_many_clusters_as_there_are():
    assert (stats._counts(7, 50, 0).sum(1) == 7).all()


def test_ties_are_half_a_win_in_a_bootstrap_too():
    scores, labels = [1.0, 2.0, 2.0, 1.0, 3.0], [0, 1, 0, 1, 0]
    got = stats.bootstrap_auroc(scores, labels, range(5), draws=20)
    assert got.estimate == stats.auroc(scores, labels) == (0.5 + 1 + 0.5) / 6


def test_a_pair_of_arms_leaves_out_what_either_has_not():
    scores, other = [3.0, 2.0, 1.0, 0.0, 5.0], [3.0, 0.0, 1.0, 2.0, math.nan]
    labels = [1, 1, 0, 0, 0]
    got = stats.bootstrap_auroc(scores, labels, range(5), other=other, draws=200)
    assert (got.estimate, got.n) == (1 - 2 / 4, 4)


def test_an_adjusted_p_is_no_more_than_one():
    np.testing.assert_allclose(stats.holm([0.6, 0.01, 0.7]), [1, 0.03, 1])


def test_an_interval_that_touches_a_value_does_not_exclude_it():
    for low, high, excludes in [(0.0, 1.0, False), (-1.0, 0.0, False), (0.1, 1.0, True)]:
        assert stats.Interval(0.5, low, high).excludes() == excludes
    for low, high in [(0.0, 0.02), (0.02, 0.03)]:
        assert stats.non_inferiority(stats.Interval(0.01, low, high), 0.02) == "inconclusive"


def test_a_weighted_mean_is_not_that_of_rows():
    got = stats.bootstrap_mean([2.0, 5.0], [0, 1], weights=[3.0, 1.0], draws=20)
    assert got.estimate == 11 / 4
