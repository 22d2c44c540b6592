"""Losses, objectives and updates without a model, against what one writes down by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from ml_collections import FrozenConfigDict

from reptune_jax import config
from reptune_jax.tuning import losses, objective
from reptune_jax.tuning import step as steps
from reptune_jax.vectors.steering_vector import SteeringVector
from tests.support import tuning_case


def logits(seed, shape=(2, 3, 7)):
    return np.random.default_rng(seed).normal(size=shape)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_the_kls_gradient_is_that_of_the_tuned_model_alone():
    tuned, base, weight_RxL = logits(0), logits(1), np.array([[1.0, 0, 2], [0.5, 1, 0]])

    def total(tuned, base):
        return losses.retention_loss(tuned, base, jnp.asarray(weight_RxL)).total.sum()

    of_tuned, of_base = jax.grad(total, (0, 1))(jnp.asarray(tuned), jnp.asarray(base))
    expected = weight_RxL[..., None] * (softmax(tuned) - softmax(base))
    np.testing.assert_allclose(of_tuned, expected, atol=1e-6)
    assert not np.asarray(of_base).any()
    p, q = softmax(base), softmax(tuned)
    kl = ((p * np.log(p / q)).sum(-1) * weight_RxL).sum()
    assert float(total(tuned, base)) == pytest.approx(kl, rel=1e-5)


@pytest.mark.parametrize("length", [100.0, 0.05])
def test_the_distance_of_residuals_is_relative_whatever_their_length(length):
    rng = np.random.default_rng(0)
    base_RxMxLxD = jnp.asarray(length * rng.normal(size=(2, 3, 4, 8)), jnp.bfloat16)
    base = np.asarray(base_RxMxLxD, np.float64).swapaxes(0, 1)
    read = base + 0.1 * length * rng.normal(size=base.shape)
    weight_RxL = np.array([[1.0, 0, 1, 0], [1, 1, 1, 0]])
    got = losses.residual_loss(jnp.asarray(read, jnp.float32), base_RxMxLxD, weight_RxL)
    each_RxL = (((read - base) ** 2).sum(-1) / (base**2).sum(-1)).mean(0)
    np.testing.assert_allclose(got.total, (each_RxL * weight_RxL).sum(1), rtol=1e-3)
    np.testing.assert_array_equal(got.n, [2, 3])


def test_a_length_in_bfloat16_is_squared_in_float32():
    """Of 1,000 equal numbers a sum in bfloat16 loses most."""
    base = jnp.full((1, 1, 1, 1000), 1.0, jnp.bfloat16)
    read = np.full((1, 1, 1, 1000), 1.25, np.float32)
    for a in (base, jnp.asarray(base * 1.0078125)):
        got = losses.residual_loss(jnp.asarray(read), a, jnp.ones((1, 1)))
        b = np.asarray(a, np.float64)
        expected = ((read - b) ** 2).sum() / (b**2).sum()
        np.testing.assert_allclose(got.total, expected, rtol=1e-4)


def test_what_is_counted_is_added_up_by_behavior():
    part = losses.Sum(jnp.array([1.0, 10.0, 100.0]), jnp.array([2.0, 3.0, 4.0]))
    total_K, n_K = part.by_behavior(jnp.array([1, 0, 1]), 3)
    assert total_K.tolist() == [10, 101, 0] and n_K.tolist() == [3, 6, 0]


def made(also=(), **changes):
    """The objective of a config with further behaviors, of vectors of four layers."""
    c = tuning_case.settings(**changes)
    for name, one in also:
        c.loss.also[name] = config.also_behavior("unused")
        c.loss.also[name].update(layers=(0, 2), **one)
    v = SteeringVector(np.ones((4, 3), np.float32), np.ones(4), np.full((4, 3), 2.0), (0,), {})
    return objective.make_objective(c, v, {}, {name: v for name, _ in also})


def test_every_loss_is_annealed_as_its_config_says():
    task = made(
        [("x", {"token": 2.0, "cosine": 4.0, "anneal": (1.0, 0.0)}), ("y", {"anneal": (0.0, 2.0)})],
        loss__anneal__cosine=(0.0, 3.0),
        loss__cosine=2.0,
        loss__ending=0.0,
    )
    assert objective.loss_names(["x", "y"])[7:] == ("x/token", "x/cosine", "y/token", "y/cosine")
    each = [objective.weights_at(task, jnp.int32(i), 5).tolist() for i in (0, 2, 4)]
    assert each[0] == [1, 0, 0, 0, 0, 0, 0, 2, 4, 0, 0]
    assert each[1] == [1, 3, 0, 0, 0, 0, 0, 1, 2, 1, 1]
    assert each[2] == [1, 6, 0, 0, 0, 0, 0, 0, 0, 2, 2]
    assert objective.weights_at(task, jnp.int32(0), 1).tolist() == each[0]  # a run of one step


def test_the_losses_of_several_behaviors_stand_in_the_order_of_their_names():
    got = objective._in_order(jnp.array([1, 3, 5]), jnp.array([2, 4, 6]), jnp.arange(7, 12))
    assert got.tolist() == [1, 2, 7, 8, 9, 10, 11, 3, 4, 5, 6]


def test_only_what_is_shifted_has_a_shift_and_only_what_is_centered_a_center():
    also = [("x", {"mode": "shift", "shift": 0.5}), ("y", {"mode": "hold", "shift": 0.5})]
    spec = made(also, loss__shift=0.25).cosine
    assert spec.shift_K.tolist() == [0, 0.5, 0] and spec.hold_K.tolist() == [0, 1, 1]
    assert spec.into_K.tolist() == [1, 0, 0] and spec.out_K.tolist() == [0, 0, 0]
    assert spec.layer_KxN.tolist() == [[0, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0]]
    centers = [made(loss__center=yes).probe.center_NxD for yes in (False, True)]
    assert not centers[0].any() and (centers[1] == 2).all()


def test_adapters_are_scaled_by_alpha_over_rank():
    scaled = made(train__lora__rank=4, train__lora__alpha=10.0)
    assert float(scaled.scale) == 2.5 and float(made().scale) == 1


def test_eps_is_torchs():
    """Where gradients are no longer than eps it decides."""
    eps = 0.1
    train = FrozenConfigDict(tuning_case.settings(train__eps=eps, train__weight_decay=0.5).train)
    rng, optimizer = np.random.default_rng(0), steps.make_optimizer(train)
    weight, grads = rng.normal(size=9), 0.1 * rng.normal(size=(3, 9))
    parameter = torch.nn.Parameter(torch.tensor(weight))
    theirs = torch.optim.AdamW(
        [parameter], train.lr, (train.b1, train.b2), eps, weight_decay=train.weight_decay
    )
    ours = {"w": jnp.asarray(weight, jnp.float32)}
    state = optimizer.init(ours)
    for g in grads:
        parameter.grad = torch.tensor(g)
        theirs.step()
        update, state = optimizer.update({"w": jnp.asarray(g, jnp.float32)}, state, ours)
        ours = {"w": ours["w"] + update["w"]}
    np.testing.assert_allclose(ours["w"], parameter.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_a_clipped_gradient_keeps_its_direction():
    train = FrozenConfigDict(tuning_case.settings(train__clip=1.0, train__b1=0.0).train)
    optimizer, g = steps.make_optimizer(train), {"w": jnp.array([3.0, -4.0, 0.1])}
    _, state = optimizer.update(g, optimizer.init(g), g)
    mu = next(leaf for leaf in jax.tree.leaves(state) if leaf.shape == (3,))
    np.testing.assert_allclose(mu, g["w"] / np.linalg.norm(g["w"]), rtol=1e-6)
