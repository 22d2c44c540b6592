"""Several behaviors in one run, further retention terms, annealed weights."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reptune_jax import config, lm, ranges, train, tuned_run
from reptune_jax.data.batches import Batch, choose, choose_of_each, stack_examples
from reptune_jax.folder import Study
from reptune_jax.tuning import base_cache
from reptune_jax.tuning import objective as objectives
from reptune_jax.tuning import step as steps
from reptune_jax.vectors import extraction
from reptune_jax.vectors.steering_vector import SteeringVector
from tests.support import tiny, tiny_behavior, tuning_case

NO = jnp.asarray(False)
gradient = jax.jit(steps.gradient, static_argnums=(0, 5))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return lm.load(str(tiny.make_llama(tmp_path_factory.mktemp("llama"))), "float32")


def other(**changes):
    one = config.also_behavior("unused")
    one.layers = (0, 2)
    for key, value in changes.items():
        one[key] = value
    return one


def moved(case):
    """Away from the base, where terms that refer to it have gradients."""
    return {path: 1.2 * leaf for path, leaf in case.state.trained.items()}


def rows_of(model, of, seed=0):
    examples = tuning_case.examples(len(of), model.arch.V, seed)
    return stack_examples(examples, model.pad_id, tuning_case.T, of)


def only(rows, k):
    """The rows of one behavior, as a run of its own has them."""
    rows = jax.tree.map(lambda a: a[rows.of_B == k], rows)
    return rows.replace(of_B=np.zeros_like(rows.of_B))


def test_preventative_steering_is_in_the_examples_stream_and_not_in_other_text(model):
    """The token loss against the logits of a forward pass that is steered by hand."""
    c = tuning_case.settings(sign=-1, loss__steer=-3.0, loss__cosine=0.0)
    vector = tuning_case.vector(model)
    case = tuning_case.case(model, c, vector)
    batch = tuning_case.batch(model, R=2)
    found, _ = objectives.sums(case.decoder, case.state.trained, case.objective, batch)
    rows = batch.examples
    steer = vector.at(layers=[2]) * 3.0  # sign x dose, amid layers 1 to 3
    out = model.forward(np.asarray(rows.tokens_BxT), np.asarray(rows.mask_BxT), steer=steer)
    logp = jax.nn.log_softmax(out.logits_BxTxV)
    want = sum(
        -float(w) * float(logp[b, rows.at_BxL[b, l], rows.target_BxLxC[b, l, 0]])
        for (b, l), w in np.ndenumerate(np.asarray(rows.weight_BxLxC)[..., 0])
    )
    assert float(found.total[0]) == pytest.approx(want, rel=1e-4)
    assert float(found.total[2]) == pytest.approx(0, abs=1e-3)  # KL of untouched retention text
    with pytest.raises(ValueError, match=r"loss.steer: got -3 at layer 2.*first trained layer"):
        tuning_case.case(model, tuning_case.settings(loss__steer=-3.0, train__layers=(3, 4)))


@pytest.mark.parametrize("mode", ["in", "out"])
def test_a_run_of_two_behaviors_has_the_losses_and_the_gradient_of_two_runs(model, mode):
    c = tuning_case.settings(sign=-1)
    c.loss.also.second = other(mode=mode, token=0.5, cosine=3.0)
    second = tuning_case.vector(model, seed=1)
    case = tuning_case.case(model, c, also={"second": second})
    rows = rows_of(model, [0, 1, 0, 0, 1, 1])
    args = (
        case.decoder,
        case.state.trained,
        case.objective,
        Batch(rows, None),
        case.objective.weight_J,
    )
    grads, (mean_J, cosine_KxN) = gradient(*args, 1)
    assert case.objective.weight_J.tolist() == pytest.approx([1, 1, 0, 0, 0, 0.1, 0, 0.5, 3])

    each = {
        0: tuning_case.case(model, tuning_case.settings(sign=-1)),
        1: tuning_case.case(
            model,
            tuning_case.settings(
                loss__mode=mode, loss__layers=(0, 2), loss__token=0.5, loss__cosine=3.0
            ),
            second,
        ),
    }
    total = jax.tree.map(jnp.zeros_like, grads)
    for k, alone in each.items():
        batch, weight_J = Batch(only(rows, k), None), alone.objective.weight_J
        g, (mean_alone_J, (cosine_N,)) = gradient(
            alone.decoder, alone.state.trained, alone.objective, batch, weight_J, 1
        )
        at = 7 if k else 0
        np.testing.assert_allclose(mean_J[at : at + 2], mean_alone_J[:2], rtol=1e-5)
        np.testing.assert_allclose(cosine_KxN[k], cosine_N, rtol=1e-4, atol=1e-6)
        total = jax.tree.map(jnp.add, total, g)
    for path, g in total.items():
        scale = float(jnp.abs(g).max())
        np.testing.assert_allclose(grads[path], g, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_kept_behavior_pulls_back_to_the_cosine_of_the_base_and_only_when_it_left(
    model, accumulate
):
    c = tuning_case.settings()
    c.loss.also.kept = other(mode="hold")
    case = tuning_case.case(model, c, also={"kept": tuning_case.vector(model, seed=1)})
    rows = base_cache.add_cosines(rows_of(model, [0, 1, 1, 0]), model, case.objective.probe, 3)
    batch, only_kept = Batch(rows, None), jnp.eye(9)[8]
    at_base, (mean_J, _) = gradient(
        case.decoder, case.state.trained, case.objective, batch, only_kept, accumulate
    )
    assert float(mean_J[8]) < 1e-10
    assert max(float(jnp.abs(g).max()) for g in at_base.values()) < 1e-4

    trained = moved(case)
    _, (mean_J, (_, cosine_N)) = gradient(
        case.decoder, trained, case.objective, batch, only_kept, accumulate
    )
    weights = tuning_case.tuned(model, trained, c.train.layers).params
    now = base_cache.add_cosines(
        rows, dataclasses.replace(model, params=weights), case.objective.probe, 4
    )
    apart_BxNxT = (now.base_BxNxT - rows.base_BxNxT) ** 2
    chosen = (rows.cosine_BxT * (rows.of_B == 1)[:, None])[:, None]
    expected = (apart_BxNxT[:, :2] * chosen).sum() / 2 / chosen.sum()
    assert expected > 1e-6
    assert float(mean_J[8]) == pytest.approx(expected, rel=1e-3)
    cosine = (now.base_BxNxT * chosen).sum((0, 2)) / chosen.sum()
    np.testing.assert_allclose(cosine_N, cosine, rtol=1e-3, atol=1e-5)


def test_a_shift_is_measured_from_the_base_along_the_sign(model):
    c = tuning_case.settings(sign=-1, loss__mode="shift", loss__shift=0.25)
    case = tuning_case.case(model, c)
    rows = base_cache.add_cosines(rows_of(model, [0, 0]), model, case.objective.probe, 2)
    parts, _ = objectives.sums(case.decoder, case.state.trained, case.objective, Batch(rows, None))
    assert float(parts.total[1] / parts.n[1]) == pytest.approx(0.25**2, rel=1e-4)
    further = rows.replace(base_BxNxT=rows.base_BxNxT + 0.25)  # then cos = base - shift
    parts, _ = objectives.sums(
        case.decoder, case.state.trained, case.objective, Batch(further, None)
    )
    assert float(parts.total[1]) < 1e-8


def test_l2_and_own_are_those_of_whole_forward_passes(model):
    c = tuning_case.settings(loss__l2=1.0, loss__own=1.0)
    case, keep = (
        tuning_case.case(model, c),
        tuning_case.retention_rows(model, 4, layers=c.train.layers),
    )
    batch, trained = tuning_case.batch(model).replace(retention=keep), moved(case)
    _, (mean_J, _) = gradient(case.decoder, trained, case.objective, batch, jnp.eye(7)[3], 1)
    tuned = tuning_case.tuned(model, trained, c.train.layers)
    was, now = (m.forward(keep.tokens_BxT, keep.mask_BxT, capture=True) for m in (model, tuned))
    l2, own = [], []
    for r, (at_L, weight_L) in enumerate(zip(keep.at_BxL, keep.weight_BxL, strict=True)):
        for t in at_L[weight_L > 0]:
            a, b = (np.asarray(o.residual_NxBxTxD)[1:3, r, t] for o in (was, now))
            l2.append((((b - a) ** 2).sum(-1) / (a**2).sum(-1)).mean())
            if r % 2 and t + 1 < keep.mask_BxT[r].sum():
                logp_V = jax.nn.log_softmax(now.logits_BxTxV[r, t])
                own.append(-float(logp_V[keep.tokens_BxT[r, t + 1]]))
    assert len(own) > 3 and np.mean(l2) > 1e-5
    assert float(mean_J[3]) == pytest.approx(np.mean(l2), rel=1e-3)
    assert float(mean_J[4]) == pytest.approx(np.mean(own), rel=1e-4)
    args = case.decoder, case.state.trained, case.objective, batch, jnp.eye(7)[3]
    assert max(float(jnp.abs(g).max()) for g in gradient(*args, 1)[0].values()) < 1e-5


@pytest.mark.parametrize("accumulate", [1, 2])
def test_weights_anneal_by_optimizer_step_whatever_the_micro_batches(model, accumulate):
    c = tuning_case.settings(train__steps=3, train__accumulate=accumulate)
    c.loss.anneal.token, c.loss.anneal.cosine = (1.0, 0.0), (0.0, 4.0)
    case, batch = tuning_case.case(model, c), tuning_case.batch(model)
    step, state = steps.make_step(case.decoder, case.train), case.state
    for token, cosine in ((1, 0), (0.5, 2), (0, 4)):
        state, metrics = step(state, case.objective, batch, NO)
        mean_J = metrics["mean_J"]
        expected = token * float(mean_J[0]) + cosine * float(mean_J[1])
        assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-6)


def test_a_step_takes_its_rows_of_each_behavior():
    for step in range(5):
        chosen = choose_of_each((6, 4), (4, 2), 7, step)
        np.testing.assert_array_equal(chosen[:4], choose(6, 4, 7, step))
        np.testing.assert_array_equal(chosen[4:], 6 + choose(4, 2, 7, step))


@pytest.fixture(scope="module")
def second(model, tmp_path_factory):
    """A further behavior's study folder, vector read."""
    folder = tmp_path_factory.mktemp("second")
    path = tiny_behavior.write(folder, "cheer")
    c = tiny_behavior.settings(model.name, path)
    extraction.run(c, Study(folder / "study"), lambda: model)
    return folder / "study"


def also(model, behavior, second, **changes):
    c = tiny_behavior.settings(model.name, behavior, loss__l2=0.5, loss__own=0.1)
    c.loss.also.cheer = config.also_behavior(str(second))
    c.loss.also.cheer.update(layers=(2, 4), **{"batch": 2} | changes)
    return ranges.check(c)


@pytest.fixture
def behavior(tmp_path, monkeypatch):
    tiny_behavior.patch_neutral(monkeypatch)
    return tiny_behavior.write(tmp_path)


def logged(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def test_a_run_of_two_behaviors_end_to_end(model, behavior, second, tmp_path):
    c = also(model, behavior, second, cosine=20.0)
    c.loss.match = 1.0
    folder = train.run(c, tmp_path / "study", model)
    first, *_, last = logged(folder)
    assert 0.001 < first["match_loss"] != last["match_loss"] and "grad_norm/match" in first
    for name in ("token_loss", "cosine_loss", "cosine"):
        assert f"cheer/{name}" in first
    assert {"l2_loss", "own_loss", "grad_norm/l2", "grad_norm/cheer/cosine"} <= first.keys()
    assert last["cheer/cosine_loss"] < first["cheer/cosine_loss"]
    assert first["l2_loss"] < 1e-8 < last["l2_loss"]
    run = tuned_run.load(folder)
    _, meta, _ = run.trained, run.meta, run.step
    used = SteeringVector.load(folder / "vector_cheer.safetensors")
    assert meta["also"] == {"cheer": used.digest}


def test_a_kept_behavior_moves_less_than_one_that_is_only_watched(
    model, behavior, second, tmp_path
):
    apart = {}
    for weight in (1e-6, 100.0):
        c = also(model, behavior, second, mode="hold", cosine=weight, batch=4)
        rows = logged(train.run(c, tmp_path / str(weight), model))
        assert rows[0]["cheer/token_loss"] == 0 and rows[0]["cheer/cosine_loss"] < 1e-10
        apart[weight] = rows[-1]["cheer/cosine_loss"]
    assert apart[100.0] < 0.5 * apart[1e-6], apart


def test_an_arm_without_a_loss_is_without_it_for_every_behavior():
    c = config.default()
    c.loss.also.x = config.also_behavior("x")
    for arm, expected in {"token": (1, 0), "vector": (0, 1), "dual": (1, 1)}.items():
        c.arm = arm
        one = config.armed(c).loss.also.x
        assert (one.token, one.cosine) == expected
    assert (c.loss.also.x.token, c.loss.also.x.cosine) == (1, 1)


def test_bad_objectives_are_named(model, behavior, second, tmp_path):
    with pytest.raises(ValueError, match=r"loss.also.cheer.mode: got 'inn', expected one of in"):
        also(model, behavior, second, mode="inn")
    with pytest.raises(ValueError, match=r"loss.also.cheer.batch: got 3, expected a multiple of"):
        c = also(model, behavior, second)
        c.loss.also.cheer.batch, c.train.accumulate = 3, 2
        ranges.check(c)
    with pytest.raises(ValueError, match=r"loss.anneal.token: got -1.0, expected 0 or"):
        c = also(model, behavior, second)
        c.loss.anneal.token = (1.0, -1.0)
        ranges.check(c)
    with pytest.raises(ValueError, match=r"loss.also.cheer.folder: .*has no config.json, vector"):
        train.run(also(model, behavior, tmp_path / "none"), tmp_path / "study", model)
    c = also(model, behavior, second)
    c.loss.also.cheer.layers = (2, 9)
    with pytest.raises(ValueError, match=r"loss.also.cheer.layers: got \(2, 9\), expected 0 <="):
        train.run(c, tmp_path / "layers", model)
