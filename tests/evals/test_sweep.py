"""How the steering sweep chooses a layer and a dose within a KL budget, and what it steers."""

import numpy as np
import pytest

from reptune_jax import config, depth, ranges
from reptune_jax.evals import arms
from reptune_jax.evals.sweep import Cell, choose, spends
from tests.support.steering_case import make_vector

CELLS = [
    Cell(10, 1.0, 0.1, 0.02),
    Cell(10, 2.0, 0.3, 0.08),
    Cell(20, 1.0, 0.2, 0.10),
    Cell(20, 2.0, 0.5, 0.40),
]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (0.05, (10, 1.58)),
        (0.08, (10, 2.0)),
        (0.25, (20, 1.58)),
        (9.0, (20, 2.0)),
    ],
)
def test_the_best_effect_within_the_budget_wins(budget, expected):
    layer, dose = choose([c for c in CELLS if c.layer == 10 or budget > 0.1], budget)
    assert (layer, dose) == (expected[0], pytest.approx(expected[1], abs=0.01))


def test_a_budget_below_the_smallest_dose_is_spent_not_saved():
    layer, dose = choose([c for c in CELLS if c.layer == 10], 0.01)
    assert (layer, dose) == (10, pytest.approx(0.71, abs=0.01))


def test_a_dose_beyond_the_best_one_is_not_taken():
    cells = [Cell(10, 1.0, 0.4, 0.02), Cell(10, 2.0, 0.1, 0.08)]
    assert choose(cells, 1.0) == (10, pytest.approx(1.0, abs=0.01))


def test_tuned_weights_are_scaled_to_the_budget_whatever_their_effect():
    cells = [Cell(-1, k, effect, 0.02 * k**2) for k, effect in ((2.0, 0.1), (0.5, 9.0), (1.0, 0.2))]
    assert spends(cells, 0.02 * 1.3**2) == pytest.approx(1.3, abs=1e-3)
    assert spends(cells, 1.0) == 2.0 and spends(cells, 0.0) == 0.0
    assert spends([*cells, Cell(-1, 4.0, 1.0, float("nan"))], 1.0) == 2.0


def test_an_arm_is_steered_as_the_config_says():
    how, vector = config.default().steer, make_vector()
    plain = arms.steered(None, vector, 1, 0.5, -1, how).steer
    np.testing.assert_array_equal(plain.dose_NxD, (-0.5 * vector.at(1)).dose_NxD)
    how.operation, how.tokens, how.width = "rotate", "last:2", 2
    cond = arms.steered(None, vector, 1, 20.0, -1, how)
    assert (cond.k, cond.layer, cond.sign) == (20.0, 1, -1)
    found = cond.steer
    assert (found.doses, found.operation, found.tokens) == ({1: -20, 2: -20}, "rotate", "last:2")
    how.operation = "ablate"  # what is removed has no sign
    assert arms.steered(None, vector, 1, 0.5, -1, how).steer.doses == {1: 0.5, 2: 0.5}


def test_what_a_config_cannot_mean_by_steering_is_refused():
    for changes, message in [
        ({"steer.tokens": "first"}, "tokens: got 'first', expected all, prompt"),
        ({"select.tokens": ("all", "x")}, "tokens: got 'x'"),
        ({"steer.operation": "push"}, "steer.operation: got 'push', expected one of add, ablate"),
        (
            {"study.arms": ("steer", "bake"), "steer.operation": "clamp"},
            "study.arms: got bake with steer.operation=clamp and steer.tokens=all",
        ),
    ]:
        c = config.default()
        c.model = "m"
        c.update_from_flattened_dict(changes)
        with pytest.raises(ValueError, match=message):
            ranges.check(c)
    c = config.default()
    c.model, c.steer.layers, c.steer.width = "m", (2,), 3
    c.train.layers = c.loss.layers = (1, 3)
    depth.check(c, 5)
    with pytest.raises(ValueError, match=r"steer.layers: got \(2,\), expected layers of m, .* 4"):
        depth.check(c, 4)
