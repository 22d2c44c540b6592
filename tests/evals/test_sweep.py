"""How the steering sweep chooses a layer and a dose within a KL budget."""

import pytest

from reptune_jax.evals.sweep import Cell, choose, spends

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
