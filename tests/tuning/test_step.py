"""One training step: exact accumulation, gradients where they belong, one program for all arms."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import traverse_util
from ml_collections import FrozenConfigDict

from reptune_jax import config, lm
from reptune_jax.tuning import base_cache, partition
from reptune_jax.tuning import step as steps
from reptune_jax.tuning.objective import make_objective
from tests.support import tiny, tuning_case

gradient = jax.jit(steps.gradient, static_argnums=(0, 5))
YES, NO = jnp.asarray(True), jnp.asarray(False)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return lm.load(str(tiny.make_llama(tmp_path_factory.mktemp("llama"))), "float32")


def grads_of(case, batch, weight_J=None, accumulate=1):
    weight_J = case.objective.weight_J if weight_J is None else jnp.array(weight_J)
    return gradient(case.decoder, case.state.trained, case.objective, batch, weight_J, accumulate)


def assert_close(a, b, rtol):
    assert a.keys() == b.keys()
    for path in a:
        scale = float(jnp.abs(b[path]).max())
        np.testing.assert_allclose(a[path], b[path], rtol=rtol, atol=rtol * scale, err_msg=path)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_over_unequal_micro_batches_is_the_full_batch(accumulate, model):
    case = tuning_case.case(model, tuning_case.settings(loss__retain=0.5))
    batch = tuning_case.batch(model, B=8, R=4)
    counts = batch.examples.weight_BxLxC.sum((1, 2)).reshape(-1, accumulate).sum(0)
    assert len(set(counts.tolist())) > 1  # micro-batches carry different numbers of labels
    full, (mean_J, cosine_KxN) = grads_of(case, batch)
    parts, (mean_of_parts_J, cosine_of_parts_KxN) = grads_of(case, batch, accumulate=accumulate)
    np.testing.assert_allclose(mean_of_parts_J, mean_J, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(cosine_of_parts_KxN, cosine_KxN, rtol=1e-5, atol=1e-6)
    assert_close(parts, full, 2e-6)


def test_only_chosen_weights_of_chosen_layers_change(model):
    c = tuning_case.settings(train__modules=("attn/v", "mlp/up"))
    case = tuning_case.case(model, c)
    assert set(case.state.trained) == {"attn/v/kernel", "mlp/up/kernel"}
    before = jax.tree.map(np.asarray, model.params)
    step, state = steps.make_step(case.decoder, case.train), case.state
    for seed in range(3):
        state, _ = step(state, case.objective, tuning_case.batch(model, seed=seed), NO)
    after = traverse_util.flatten_dict(
        tuning_case.tuned(model, state.trained, c.train.layers).params, sep="/"
    )
    for path, old in traverse_util.flatten_dict(before, sep="/").items():
        new = np.asarray(after[path])
        if path not in ("blocks/attn/v/kernel", "blocks/mlp/up/kernel"):
            assert (new == old).all(), path
            continue
        moved = (new != old).reshape(4, -1).mean(1)
        assert (moved[[0, 3]] == 0).all() and (moved[[1, 2]] > 0.9).all(), path
    assert all(
        (
            np.asarray(model.params["blocks"]["attn"][k]["kernel"])
            == before["blocks"]["attn"][k]["kernel"]
        ).all()
        for k in "qkvo"
    )


def test_segmented_gradient_is_that_of_the_whole_model(model):
    batch, cut = tuning_case.batch(model), tuning_case.case(model, tuning_case.settings())
    whole = tuning_case.case(model, tuning_case.settings(train__layers=(0, 4)))
    assert len(cut.decoder.segments) == 3 and len(whole.decoder.segments) == 1
    of_whole, (mean_J, _) = grads_of(whole, batch)
    of_cut, (mean_of_cut_J, _) = grads_of(cut, batch)
    np.testing.assert_allclose(mean_of_cut_J, mean_J, rtol=1e-6)
    assert_close(of_cut, {path: g[1:3] for path, g in of_whole.items()}, 1e-5)


def test_remat_changes_the_program_and_not_the_gradient(model):
    batch, found, programs = tuning_case.batch(model), {}, {}
    for remat in ("none", "dots", "full"):
        case = tuning_case.case(model, tuning_case.settings(train__remat=remat))
        found[remat], _ = grads_of(case, batch)
        args = case.state.trained, case.objective, batch, case.objective.weight_J
        traced = jax.make_jaxpr(lambda *a, d=case.decoder: steps.gradient(d, *a, 1))(*args)
        programs[remat] = re.sub(r"0x[0-9a-f]+", "", str(traced))
    assert len(set(programs.values())) == 3
    for remat in ("dots", "full"):
        assert_close(found[remat], found["none"], 1e-5)


def test_one_compiled_step_serves_every_arm_and_sign(model):
    v, batch, programs = tuning_case.vector(model), tuning_case.batch(model), set()
    seen, examples = {}, batch.examples
    goals = base_cache.add_goals(batch.examples, model, (1, 3), 4)
    for arm in config.TUNED_ARMS:
        for sign in (1, -1):
            c = config.armed(tuning_case.settings(arm=arm, sign=sign, train__lr=3e-3))
            case = tuning_case.case(model, c, v.random_like(0) if c.vector.random else v)
            batch = batch.replace(examples=goals if c.loss.match else examples)
            step, state = steps.make_step(case.decoder, case.train), case.state
            programs.add(step)
            for _ in range(3):
                state, _ = step(state, case.objective, batch, NO)
            seen[arm, sign] = np.asarray(state.trained["attn/v/kernel"])
    # One for all, one for `preventative`, which steers while it trains, one for those with goals.
    assert len(programs) == 1 and programs.pop()._cache_size() == 3
    assert len({a.tobytes() for a in seen.values()}) == 15  # all but token, match and out differ
    assert (seen["match", 1] == seen["match", -1]).all()  # here and in the goals
    assert (seen["token", 1] == seen["token", -1]).all()  # the sign is in the targets there
    assert (seen["out", 1] == seen["out", -1]).all()


def test_a_rate_or_a_module_for_no_weight_is_an_error(model):
    c = tuning_case.settings()
    c.train.lr_by_path = {"mpl": 1e-4}
    with pytest.raises(ValueError, match=r"lr_by_path: 'mpl' matches no trained weight"):
        tuning_case.case(model, c)
    with pytest.raises(ValueError, match=r"train.modules: 'atn/v' matches no weight"):
        tuning_case.case(model, tuning_case.settings(train__modules=("atn/v",)))
    with pytest.raises(ValueError, match=r"train.layers: got \(1, 5\)"):
        tuning_case.case(model, tuning_case.settings(train__layers=(1, 5)))
    with pytest.raises(ValueError, match=r"loss.layers: got \(2, 9\)"):
        tuning_case.case(model, tuning_case.settings(loss__layers=(2, 9)))


def test_schedules():
    def rates(**changes):
        c = tuning_case.settings(train__lr=1.0, train__steps=10, **changes)
        rate = steps.schedule(FrozenConfigDict(c.train))
        return [float(rate(i)) for i in range(10)]

    assert rates(train__decay="none") == [1.0] * 10
    linear = rates(train__decay="linear", train__warmup=4)
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert linear == pytest.approx(expected, rel=1e-5)
    cosine = rates(train__decay="cosine", train__warmup=1)
    expected = [1.0] + [(1 + np.cos(np.pi * i / 9)) / 2 for i in range(9)]
    assert cosine == pytest.approx(expected, rel=1e-5)


def optimize(steps_taken=1, **changes):
    """(weights before, gradients, weights after, optimizer state) of updates without a model."""
    train = FrozenConfigDict(tuning_case.settings(**changes).train)
    rng, optimizer = np.random.default_rng(0), steps.make_optimizer(train)
    shapes = {"attn/v/kernel": (5, 4), "mlp/up/kernel": (4, 6), "mlp/down/kernel": (6, 4)}
    before = {path: jnp.array(rng.normal(size=s), jnp.float32) for path, s in shapes.items()}
    grads = [
        {path: jnp.array(rng.normal(size=s), jnp.float32) for path, s in shapes.items()}
        for _ in range(steps_taken)
    ]
    after, state = before, optimizer.init(before)
    for g in grads:
        updates, state = optimizer.update(g, state, after)
        after = optax.apply_updates(after, updates)
    return before, grads, after, state


def test_updates_are_those_of_torchs_adamw():
    before, grads, after, _ = optimize(3, train__weight_decay=0.1, train__b2=0.99, train__lr=3e-3)
    for path, old in before.items():
        parameter = torch.nn.Parameter(torch.tensor(np.array(old)))
        adamw = torch.optim.AdamW(
            [parameter], lr=3e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1
        )
        for g in grads:
            parameter.grad = torch.tensor(np.array(g[path]))
            adamw.step()
        np.testing.assert_allclose(after[path], parameter.detach().numpy(), rtol=1e-6, atol=1e-6)


def test_each_path_has_its_own_learning_rate_by_its_longest_pattern():
    rates = {"mlp/up": 1e-4, "mlp": 1e-5}
    before, _, after, _ = optimize(train__lr=1e-3, train__lr_by_path=rates)
    # Adam's first step moves every weight by its rate.
    moved = {k: float(np.median(np.abs(after[k] - before[k]))) for k in before}
    assert moved["attn/v/kernel"] == pytest.approx(1e-3, rel=0.01)
    assert moved["mlp/up/kernel"] == pytest.approx(1e-4, rel=0.01)
    assert moved["mlp/down/kernel"] == pytest.approx(1e-5, rel=0.02)


def test_clipping_bounds_the_gradient_and_zero_means_none():
    for clip, share in ((0.0, 1.0), (1e-3, None)):
        _, (grads,), _, state = optimize(train__clip=clip)
        norm = float(optax.global_norm(optax.tree_utils.tree_get(state, "mu")))
        expected = 0.1 * (share * float(optax.global_norm(grads)) if share else clip)
        assert norm == pytest.approx(expected, rel=1e-4)


def test_masters_share_no_buffer_with_the_base_model(model):
    """A step donates its state; with every layer in float32 a slice would be the base's own."""
    trained, _ = partition.split(model.params, (0, 4), ("attn/v",))
    base = model.params["blocks"]["attn"]["v"]["kernel"]
    ours = trained["attn/v/kernel"]
    assert (np.asarray(ours) == np.asarray(base)).all()
    assert ours.unsafe_buffer_pointer() != base.unsafe_buffer_pointer()


def test_measuring_reports_each_losss_own_gradient_and_changes_nothing(model):
    c = tuning_case.settings(loss__retain=0.5, loss__cosine=2.0, train__lr=2e-3)
    case = tuning_case.case(model, c)
    moved = {k: 1.1 * v for k, v in case.state.trained.items()}  # else the KL has no gradient
    case.state = case.state.replace(trained=moved)
    batch = tuning_case.batch(model, R=4)
    each = [grads_of(case, batch, row)[0] for row in np.eye(7, dtype=np.float32)[:3]]
    step = steps.make_step(case.decoder, case.train)
    copy = jax.tree.map(jnp.copy, case.state)
    measured, metrics = step(case.state, case.objective, batch, YES)
    unmeasured, quiet = step(copy, case.objective, batch, NO)
    norms = [float(optax.global_norm(g)) for g in each]
    assert min(norms) > 1e-3
    np.testing.assert_allclose(metrics["norm_J"], [*norms, 0, 0, 0, 0], rtol=1e-4)
    dot = sum(float(jnp.vdot(each[0][k], each[1][k])) for k in each[0])
    assert float(metrics["conflict"]) == pytest.approx(dot / norms[0] / norms[1], abs=1e-4)
    assert (np.asarray(quiet["norm_J"]) == 0).all()
    assert step._cache_size() == 1
    for path, leaf in measured.trained.items():
        assert (np.asarray(leaf) == np.asarray(unmeasured.trained[path])).all()


def test_masters_are_float32_where_the_model_is_bfloat16(tmp_path):
    small = lm.load(str(tiny.make_llama(tmp_path, num_hidden_layers=3)), "bfloat16")
    c = tuning_case.settings(train__layers=(1, 2), loss__layers=(1, 2), train__lr=1e-6)
    case = tuning_case.case(small, c)
    before = {path: np.array(leaf) for path, leaf in case.state.trained.items()}
    batch = tuning_case.batch(small)
    state, _ = steps.make_step(case.decoder, case.train)(case.state, case.objective, batch, NO)
    for path, leaf in state.trained.items():
        assert leaf.dtype == jnp.float32
        assert (np.asarray(leaf) != before[path]).mean() > 0.9  # an update of 1e-6 is kept
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(case.objective.frozen))


def test_the_task_is_the_armed_config_as_data(model):
    v = tuning_case.vector(model)
    task = make_objective(config.armed(tuning_case.settings(arm="out", sign=-1)), v, {})
    spec = task.cosine
    assert (float(spec.into_K[0]), float(spec.out_K[0]), float(spec.sign_K[0])) == (0, 1, -1)
    assert spec.layer_KxN.tolist() == [[0, 1, 1, 0]]
    assert task.weight_J.tolist() == pytest.approx([1, 1, 0, 0, 0, 0.1, 0])
    token = make_objective(config.armed(tuning_case.settings(arm="token")), v, {})
    assert token.weight_J.tolist() == pytest.approx([1, 0, 0, 0, 0, 0.1, 0])
