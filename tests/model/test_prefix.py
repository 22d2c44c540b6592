"""What rows share is computed once, and nothing changes by it."""

import numpy as np
import pytest

import reptune_jax as rt
from reptune_jax.model.prefix import shared_length
from reptune_jax.vectors.capture import Span, read_batch
from reptune_jax.vectors.steering_vector import SteeringVector
from tests.support import tiny

TOLERANCE = 1e-4  # absolute, of log-probabilities and of residuals of length about 5


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return rt.load(str(tiny.make_llama(tmp_path_factory.mktemp("llama"))))


def rows(common: int) -> list[list[int]]:
    """Five rows of unequal length whose first `common` tokens are the same."""
    rng = np.random.default_rng(0)
    first = rng.integers(4, tiny.VOCAB, common).tolist()
    return [first + rng.integers(4, tiny.VOCAB, n).tolist() for n in (9, 4, 12, 7, 5)]


def steering(model):
    a, rng = model.arch, np.random.default_rng(1)
    directions = rng.normal(size=(a.N, a.D)).astype(np.float32)
    vector = SteeringVector(directions, np.ones(a.N), directions * 0, tuple(range(a.N)), {})
    return vector.at(layers=[1]) * 0.5


def test_shared_lengths():
    same = list(range(40))
    assert shared_length([same, same], 100) == 40
    assert shared_length([same, same], 31) == 24
    assert shared_length([same, same[:20] + [99]], 100) == 16
    assert shared_length([same, same[:7] + [99]], 100) == 0
    assert shared_length([same, [7]], 100) == shared_length([same], 0) == 0


@pytest.mark.parametrize("steered", [False, True])
def test_scores_after_a_shared_prefix_are_those_of_the_whole_rows(steered, ours):
    ids, steer = rows(37), steering(ours) if steered else None
    starts = [len(r) - 3 for r in ids]
    prefix, P = ours.split_prefix(ids, min(starts) - 1, steer)
    assert P == 32 and prefix.tokens_GxP.shape == (1, 32)
    got = ours.score_ids(ids, starts, steer)
    for row, start, (value, _) in zip(ids, starts, got, strict=True):
        logits = np.asarray(ours.forward(np.array([row]), steer=steer).logits_BxTxV)[0]
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        want = sum(logp[t - 1, row[t]] for t in range(start, len(row)))
        assert value == pytest.approx(want, abs=TOLERANCE)


def test_reads_after_a_shared_prefix_are_those_of_the_whole_rows(ours):
    ids = rows(37)
    spans = [Span(row, len(row) - 3, len(row) - 1) for row in ids]
    assert ours.split_prefix(ids, min(s.start for s in spans))[1] == 32
    got_NxBxD = np.asarray(read_batch(ours, spans, rows=8))
    for b, span in enumerate(spans):
        residual = ours.forward(np.array([span.ids]), capture=True).residual_NxBxTxD
        want_NxD = np.asarray(residual)[:, 0, span.start : span.stop].mean(1)
        np.testing.assert_allclose(got_NxBxD[:, b], want_NxD, atol=TOLERANCE)


def test_a_span_within_the_shared_part_is_read_there(ours):
    ids = rows(37)
    spans = [Span(row, 5, 8) for row in ids]
    assert ours.split_prefix(ids, 5) == (None, 0)
    got_NxBxD = np.asarray(read_batch(ours, spans, rows=5))
    residual = ours.forward(np.array([ids[0]]), capture=True).residual_NxBxTxD
    np.testing.assert_allclose(got_NxBxD[:, 0], np.asarray(residual)[:, 0, 5:8].mean(1), atol=1e-4)
