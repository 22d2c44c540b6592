"""Golden values of the tests and intervals, and what must hold for any data."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from reptune_jax.evals import stats


def test_holm_golden():
    np.testing.assert_allclose(stats.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])


def test_dprime_golden():
    assert stats.dprime_c(65, 100, 3, 100) == pytest.approx((2.198, 0.718), abs=1e-3)
    assert stats.dprime_c(86, 100, 12, 100) == pytest.approx((2.221, 0.046), abs=1e-3)


def test_auroc_is_the_pairwise_definition_with_ties():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 6, 60), rng.integers(0, 2, 60)
    pairs = list(itertools.product(scores[labels == 1], scores[labels == 0]))
    expected = np.mean([(p > n) + 0.5 * (p == n) for p, n in pairs])
    assert stats.auroc(scores, labels) == pytest.approx(expected)
    assert math.isnan(stats.auroc([1.0, 2.0], [1, 1]))


def test_permuted_labels_give_half():
    """The interval covers 0.5 about as often as it says."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        scores, labels = rng.normal(size=200), rng.permutation(np.repeat([0, 1], 100))
        interval = stats.bootstrap_auroc(scores, labels, np.arange(200), draws=300)
        assert interval.estimate == pytest.approx(stats.auroc(scores, labels))
        covered += interval.low < 0.5 < interval.high
    assert 87 <= covered <= 99


def test_auroc_difference_is_paired():
    rng = np.random.default_rng(2)
    labels = np.repeat([0, 1], 100)
    scores = labels + rng.normal(size=200)
    same = stats.bootstrap_auroc(scores, labels, np.arange(200), other=3 * scores - 1, draws=500)
    assert (same.estimate, same.low, same.high) == (0, 0, 0)
    worse = stats.bootstrap_auroc(
        scores, labels, np.arange(200), other=rng.normal(size=200), draws=500
    )
    assert worse.low > 0


def test_auroc_over_seeds_is_the_mean_of_seeds():
    rng = np.random.default_rng(3)
    labels, seeds = np.tile([0, 1], 60), np.repeat([0, 1, 2], 40)
    scores = rng.normal(size=120) + labels * seeds
    got = stats.bootstrap_auroc(scores, labels, np.tile(np.arange(40) // 2, 3), seeds, draws=200)
    each = [stats.auroc(scores[seeds == s], labels[seeds == s]) for s in range(3)]
    assert got.estimate == pytest.approx(np.mean(each))
    assert (got.n, got.n_clusters, got.n_seeds) == (120, 20, 3)


def test_identical_arms_give_zero_and_p_one():
    zero = np.zeros(50)
    interval = stats.bootstrap_mean(zero, np.arange(50))
    assert (interval.estimate, interval.low, interval.high) == (0, 0, 0)
    assert stats.sign_flip_p(zero, np.arange(50)) == 1
    assert stats.cohen_dz(zero) == 0
    assert stats.negative_response_rate(zero) == 0


def test_bootstrap_agrees_with_the_normal_interval_when_items_are_independent():
    x = np.random.default_rng(4).normal(0.3, 1, 300)
    interval = stats.bootstrap_mean(x, np.arange(300))
    half = 1.96 * x.std(ddof=1) / np.sqrt(300)
    assert interval.estimate == pytest.approx(x.mean())
    assert interval.low == pytest.approx(x.mean() - half, abs=0.01)
    assert interval.high == pytest.approx(x.mean() + half, abs=0.01)


def test_weighted_mean_is_the_ratio_of_sums():
    nll, tokens = np.array([30.0, 8.0, np.nan]), np.array([10.0, 4.0, 5.0])
    interval = stats.bootstrap_mean(nll / tokens, [0, 1, 2], weights=tokens, draws=500)
    assert interval.estimate == pytest.approx(38 / 14)
    assert interval.n == 2
    assert interval.low == pytest.approx(2) and interval.high == pytest.approx(3)


def test_clustered_coverage_beats_naive():
    rng = np.random.default_rng(5)
    clusters = np.repeat(np.arange(30), 10)
    covered = np.zeros(2)
    trials = 150
    for _ in range(trials):
        x = np.repeat(rng.normal(size=30), 10) + 0.3 * rng.normal(size=300)
        for i, groups in enumerate((clusters, np.arange(300))):
            interval = stats.bootstrap_mean(x, groups, draws=600)
            covered[i] += interval.low <= 0 <= interval.high
    assert covered[0] / trials > 0.88
    assert covered[1] / trials < 0.6


def test_shared_items_do_not_shrink_with_seeds():
    """Three copies of the same items are no more evidence about items than one copy."""
    x = np.random.default_rng(6).normal(size=100)
    one = stats.bootstrap_mean(x, np.arange(100))
    three = stats.bootstrap_mean(
        np.tile(x, 3), np.tile(np.arange(100), 3), np.repeat(range(3), 100)
    )
    assert three.high - three.low == pytest.approx(one.high - one.low)


def test_seed_variation_widens_the_interval():
    x = np.random.default_rng(7).normal(0, 0.1, size=100)
    seeds = np.repeat([0, 1, 2], 100)
    moved = np.tile(x, 3) + np.repeat([0.0, 1.0, 2.0], 100)
    assert not stats.bootstrap_mean(moved, np.tile(np.arange(100), 3)).low < 0.5
    assert stats.bootstrap_mean(moved, np.tile(np.arange(100), 3), seeds).low < 0.5


def test_sign_flip_exact_and_sampled():
    deltas = np.array([1.0, 2.0, 3.0, 4.0, 5.0, -0.5])
    flips = np.array(list(itertools.product([-1, 1], repeat=6)))
    expected = (np.abs(flips @ deltas) >= deltas.sum()).mean()
    assert stats.sign_flip_p(deltas, range(6)) == pytest.approx(expected)
    x = np.random.default_rng(8).normal(0.2, 1, 80)
    p = stats.sign_flip_p(x, np.arange(80))
    assert p == pytest.approx(scipy.stats.ttest_1samp(x, 0).pvalue, abs=0.02)


def test_dprime_bootstrap_matches_the_point_values():
    labels = np.repeat([1, 0], 100)
    yes = np.r_[np.repeat([1, 0], [65, 35]), np.repeat([1, 0], [3, 97])]
    dprime, c = stats.bootstrap_dprime(yes, labels, np.arange(200), draws=500)
    assert (dprime.estimate, c.estimate) == pytest.approx((2.198, 0.718), abs=1e-3)
    assert dprime.low < 2.198 < dprime.high and c.low < 0.718 < c.high


def test_effect_sizes_and_verdicts():
    deltas = [0.1, 0.2, 0.3, -0.1]
    assert stats.cohen_dz(deltas) == pytest.approx(np.mean(deltas) / np.std(deltas, ddof=1))
    assert stats.negative_response_rate(deltas) == 0.25
    assert stats.negative_response_rate(deltas, sign=-1) == 0.75
    verdicts = [
        ((0.0, 0.01), "non-inferior"),
        ((0.03, 0.05), "inferior"),
        ((0.0, 0.03), "inconclusive"),
    ]
    for (low, high), word in verdicts:
        assert stats.non_inferiority(stats.Interval(0.0, low, high), 0.02) == word
