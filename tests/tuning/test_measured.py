"""What a step and an evaluation say of themselves, around a gradient that is written by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from reptune_jax.data.batches import Batch, Examples
from reptune_jax.model.intervene import Probe
from reptune_jax.tuning import losses
from reptune_jax.tuning import step as steps
from reptune_jax.tuning.objective import Objective
from tests.support import tuning_case

GRADS_JxD = np.array([[3.0, 4.0], [0.0, 2.0], [1.0, 1.0], [6.0, 8.0], [5.0, 12.0]])
MEAN_J = np.array([1.0, 2.0, 3.0, 4.0, 5.0])


def task(weight_J, anneal_Jx2=None, K=1):
    anneal_Jx2 = np.ones((len(weight_J), 2)) if anneal_Jx2 is None else anneal_Jx2
    probe = Probe(jnp.zeros((2, K, 3)), jnp.zeros((2, K, 3)))
    weights = jnp.asarray(weight_J), jnp.asarray(anneal_Jx2)
    return Objective({}, probe, None, *weights, stop_S=jnp.zeros(0, int))


def step_of(monkeypatch, objective, at, measure=False, **changes):
    """(state, metrics) of a step at which loss j has the gradient GRADS_JxD[j]."""
    train = FrozenConfigDict(tuning_case.settings(**changes).train)

    def gradient(decoder, trained, objective, batch, weight_J, accumulate, mesh):
        return {"w": weight_J @ jnp.asarray(GRADS_JxD)}, (jnp.asarray(MEAN_J), jnp.zeros((1, 2)))

    monkeypatch.setattr(steps, "gradient", gradient)
    state = steps.init_state({"w": jnp.zeros(2)}, train).replace(step=jnp.int32(at))
    return steps.update(None, train, None, state, objective, None, jnp.asarray(measure))


@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_step_reports_its_loss_its_gradient_and_its_rate(at, monkeypatch):
    anneal_Jx2 = np.array([[1.0, 0.0], [0.0, 3.0], [1, 1], [1, 1], [1, 1]])
    weight_J = np.array([2.0, 1.0, 0.5, 0.0, 0.0])
    changes = {"train__decay": "linear", "train__steps": 5, "train__lr": 0.1, "train__clip": 0.01}
    state, metrics = step_of(monkeypatch, task(weight_J, anneal_Jx2), at, **changes)
    now_J = weight_J * (anneal_Jx2 @ [1 - at / 4, at / 4])
    assert float(metrics["loss"]) == pytest.approx(now_J @ MEAN_J, rel=1e-6)
    before_clipping = np.linalg.norm(now_J @ GRADS_JxD)
    assert float(metrics["grad_norm"]) == pytest.approx(before_clipping, rel=1e-6)
    assert float(metrics["lr"]) == pytest.approx(0.1 * (1 - at / 5), rel=1e-6)
    assert int(state.step) == at + 1 and not np.asarray(metrics["norm_J"]).any()


def test_each_losss_own_gradient_is_measured_the_first_three_whatever_they_weigh(monkeypatch):
    _, metrics = step_of(monkeypatch, task([1.0, 0.0, 0.0, 0.0, 0.25]), 0, measure=True)
    norm_J = np.linalg.norm(GRADS_JxD, axis=1)
    np.testing.assert_allclose(metrics["norm_J"], [*norm_J[:3], 0, norm_J[4]], rtol=1e-6)
    conflict = GRADS_JxD[0] @ GRADS_JxD[1] / norm_J[0] / norm_J[1]
    assert float(metrics["conflict"]) == pytest.approx(conflict, rel=1e-6)


def test_an_evaluation_counts_each_behaviors_tokens_and_spreads_the_main_ones(monkeypatch):
    rng = np.random.default_rng(0)
    cosine_NxBxT = rng.uniform(-1, 1, (2, 4, 6))
    chosen_BxT = rng.integers(0, 2, (4, 6)).astype(np.float32)
    of_B = np.array([0, 1, 0, 2])
    found = losses.Sum(jnp.zeros(9), jnp.ones(9)), jnp.asarray(cosine_NxBxT)
    monkeypatch.setattr(steps, "sums", lambda *_: found)
    rows = Examples(*(jnp.zeros((4, 6)),) * 5, jnp.asarray(chosen_BxT), jnp.asarray(of_B))
    evaluate = steps.make_evaluate("a decoder of this test alone")
    _, cosine_KxN, spread = evaluate({}, task(np.ones(9), K=3), Batch(rows, None))
    for k in range(3):
        expected_N = (cosine_NxBxT * chosen_BxT)[:, of_B == k].sum((1, 2))
        np.testing.assert_allclose(cosine_KxN[k], expected_N, rtol=1e-5)
    assert float(spread.count_P.sum()) == chosen_BxT[of_B == 0].sum()
    mean_N = (cosine_NxBxT * chosen_BxT)[:, of_B == 0].sum((1, 2))
    np.testing.assert_allclose(spread.cosine_NxP.sum(1), mean_N, rtol=1e-5)
