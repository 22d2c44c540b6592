"""How numbers are written."""

import math

import pytest

from reptune_jax.evals.stats import Interval
from reptune_jax.report.blocks import divergence


@pytest.mark.parametrize(
    ("kl", "text"),
    [
        (0.0131, "0.013"),
        (0.00466, "0.0047"),
        (0.000417, "0.00042"),
        (0.0, "0.000"),
        (None, "–"),
        (math.nan, "–"),
        (Interval(0.00042, 0.0001, 0.00129), "0.00042 [0.00010, 0.00129]"),
        (Interval(0.02, 0.0004, 0.1), "0.020 [0.000, 0.100]"),
    ],
)
def test_a_small_kl_is_not_rounded_to_nothing(kl, text):
    assert divergence(kl) == text
