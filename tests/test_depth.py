"""Layers as numbers and as shares of the depth."""

import pytest

from reptune_jax import config, depth, ranges
from tests.support import tiny


def settled(N, **keys):
    c = config.default()
    for key, value in keys.items():
        c[key].layers = value
    depth.settle(c, lambda: N)
    return c


@pytest.mark.parametrize(
    ("N", "trained", "steered", "written"),
    [
        (30, (10, 20), (10, 15, 20), (15,)),  # SmolLM2-135M
        (28, (9, 19), (9, 14, 19), (14,)),
        (12, (4, 8), (4, 6, 8), (6,)),
        (4, (1, 3), (1, 2, 3), (2,)),
        (2, (1, 2), (1, 1, 1), (1,)),  # a range has a layer at least
    ],
)
def test_the_defaults_fit_every_depth(N, trained, steered, written):
    c = settled(N)
    assert c.train.layers == c.loss.layers == trained
    assert (c.steer.layers, c.targets.layers) == (steered, written)
    depth.check(c, N)


def test_numbers_stay_and_both_may_stand_together():
    c = settled(20, train=(3, "0.5"), steer=("7", 8), targets=(".25", "1.0"))
    assert (c.train.layers, c.steer.layers, c.targets.layers) == ((3, 10), (7, 8), (5, 20))


def test_a_model_is_opened_for_shares_alone(tmp_path):
    c = config.default()
    c.model = str(tmp_path / "absent")
    c.loss.layers, c.train.layers, c.steer.layers, c.targets.layers = (1, 2), (1, 2), (1,), (1,)
    depth.settle(c)
    c.train.layers = ("0.3", "0.6")
    with pytest.raises((ValueError, FileNotFoundError), match="absent"):
        depth.settle(c)
    c.model = str(tiny.make_llama(tmp_path / "model"))
    depth.settle(c)
    assert all(type(layer) is int for layer in c.train.layers)


@pytest.mark.parametrize(
    ("key", "layers", "message"),
    [
        ("train", ("0.9", 3), r"train.layers: got \('0.9', 3\), expected first < stop"),
        ("loss", (4, "0.2"), r"loss.layers: got \(4, '0.2'\), expected first < stop"),
        ("steer", ("1.5",), "steer.layers: got '1.5', expected layers, counted from 0, or shares"),
        ("steer", (0.5,), "steer.layers: got 0.5, expected"),  # a number that is no layer
        ("targets", (True,), "targets.layers: got True"),
    ],
)
def test_what_is_no_layer_is_named(key, layers, message):
    with pytest.raises(ValueError, match=message):
        c = config.default()
        c.model = "m"
        c[key].layers = layers
        depth.settle(ranges.check(c), lambda: 10)
