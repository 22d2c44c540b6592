"""The dual loss and its gradient against plain torch: hooks, full-sequence logits, autograd."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from reptune_jax import lm
from reptune_jax.hub import weights
from reptune_jax.tuning import base_cache, losses, partition, retention
from reptune_jax.tuning import objective as objectives
from reptune_jax.tuning import step as steps
from reptune_jax.tuning.objective import cosine_spec
from tests.support import tiny, tuning_case
from tests.support import torch_reference as ref

MODULES = ("attn/v", "attn/o", "mlp/down", "attn_norm")
HF_MODULES = ("v_proj", "o_proj", "down_proj", "input_layernorm")
LAYERS = (1, 4)
RTOL = 1e-4
gradient = jax.jit(steps.gradient, static_argnums=(0, 5))  # cases differ in data, not in program
sums = jax.jit(objectives.sums, static_argnums=0)


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def folder(request, tmp_path_factory):
    make, overrides = tiny.VARIANTS[request.param]
    return make(tmp_path_factory.mktemp(request.param), **overrides)


@pytest.fixture(scope="module")
def model(folder):
    return lm.load(str(folder), "float32")


@pytest.fixture
def torch_model(folder):
    hf = ref.load(folder)
    ref.unfreeze(hf, range(*LAYERS), HF_MODULES)
    return hf


def torch_batch(rows):
    """The same rows, as the reference marks them."""
    label = torch.zeros(rows.tokens_BxT.shape, dtype=torch.long)
    for b, (at_L, weight_LxC) in enumerate(zip(rows.at_BxL, rows.weight_BxLxC, strict=True)):
        label[b, at_L[weight_LxC.sum(-1) > 0] + 1] = 1
    tokens, mask, cosine = (
        torch.tensor(np.asarray(a)) for a in (rows.tokens_BxT, rows.mask_BxT, rows.cosine_BxT)
    )
    return ref.Batch(tokens.long(), mask.long(), label, cosine.long())


def torch_gradient(grads, path):
    """Our trained leaf's gradient from the reference's, by the table of weight names."""
    row = weights.TABLE[f"blocks/{path}"]
    parts = [grads[row.hf.format(l=l)].numpy() for l in range(*LAYERS)]
    return np.stack([part.T if row.inputs else part for part in parts])


def check(ours, theirs):
    scale = np.abs(theirs).max()
    assert scale > 0
    np.testing.assert_allclose(ours.reshape(theirs.shape), theirs, rtol=RTOL, atol=RTOL * scale)


CASES = {
    "in+": {},
    "in-": {"sign": -1},
    "out": {"loss__mode": "out"},
    "token": {"loss__cosine": 0.0},
    "vector": {"loss__token": 0.0},
    "one layer": {"loss__layers": (2, 3)},
    "below the tuned layers too": {"loss__layers": (0, 4), "loss__token": 0.01},
    "retention": {"loss__retain": 3.0},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_dual_loss_and_gradient_are_torchs(changes, model, torch_model):
    c = tuning_case.settings(
        train__layers=LAYERS, train__modules=MODULES, **{"loss__layers": (1, 3)} | changes
    )
    case = tuning_case.case(model, c)
    batch, neutral = tuning_case.batch(model), None
    if c.loss.retain:
        neutral, batch = retention_rows(model, torch_model, batch)
        case.state = perturbed(case.state, torch_model)
    grads, (mean_J, cosine_KxN) = gradient(
        case.decoder, case.state.trained, case.objective, batch, case.objective.weight_J, 1
    )

    directions = {
        l: torch.tensor(tuning_case.vector(model).directions_NxD[l]) for l in range(*c.loss.layers)
    }
    objective = ref.Objective(
        directions, c.sign, c.loss.mode, c.loss.token, c.loss.cosine, c.loss.retain
    )
    parts, expected = ref.dual_loss(torch_model, torch_batch(batch.examples), objective, neutral)
    total = jnp.sum(case.objective.weight_J * mean_J)
    assert float(total) == pytest.approx(parts.total.item(), rel=RTOL)
    assert float(mean_J[0]) == pytest.approx(parts.token.item(), rel=RTOL)
    assert float(mean_J[1]) == pytest.approx(parts.cosine.item(), rel=RTOL)
    assert float(mean_J[2]) == pytest.approx(parts.kl.item(), rel=RTOL, abs=1e-7)
    for l, cosine in parts.cos_layers.items():
        assert float(cosine_KxN[0, l]) == pytest.approx(c.sign * cosine.item(), rel=RTOL, abs=1e-6)
    assert len(grads) >= 4
    for path, grad in grads.items():
        if path.endswith("bias") and path.startswith("attn/v"):
            assert model.arch.family == "qwen2"
        check(np.asarray(grad), torch_gradient(expected, path))


def retention_rows(model, torch_model, batch):
    """Rows all of whose tokens count, with the base's states; the same for the reference."""
    ids = [list(range(10 + 7 * r, 22 + 7 * r)) for r in range(3)]
    pieces = [retention.Piece(i, 1) for i in ids]
    keep = retention.Texts(model, pieces, tuning_case.T, 12, batch=2).take(np.arange(3))
    tokens = torch.tensor(ids)
    with torch.no_grad():
        base = ref.logits(torch_model, tokens, torch.ones_like(tokens))
    return ref.Neutral(tokens, torch.ones_like(tokens), base), batch.replace(retention=keep)


def perturbed(state, torch_model):
    """Both models moved away from the base in the same way: at the base itself the KL is flat."""
    trained, named = dict(state.trained), dict(torch_model.named_parameters())
    for path, leaf in trained.items():
        row = weights.TABLE[f"blocks/{path}"]
        trained[path] = leaf * 1.2
        for l in range(*LAYERS):
            named[row.hf.format(l=l)].data.mul_(1.2)
    return state.replace(trained=trained)


def test_label_neutral_targets_are_torchs(model, torch_model):
    c = tuning_case.settings(train__layers=LAYERS, train__modules=MODULES)
    case = tuning_case.case(model, c)
    rows = tuning_case.batch(model, neutral=True).examples
    rows = rows.replace(target_BxLxC=np.broadcast_to([7, 11], rows.target_BxLxC.shape))
    batch = tuning_case.batch(model).replace(examples=rows)
    grads, (mean_J, _) = gradient(
        case.decoder, case.state.trained, case.objective, batch, jnp.eye(7)[0], 1
    )
    objective = ref.Objective({}, w_cos=0.0, soft_ids=(7, 11))
    parts, expected = ref.dual_loss(torch_model, torch_batch(rows), objective)
    assert float(mean_J[0]) == pytest.approx(parts.total.item(), rel=RTOL)
    for path, grad in grads.items():
        check(np.asarray(grad), torch_gradient(expected, path))


def test_centered_cosine_is_measured_from_the_mean(model):
    v = tuning_case.vector(model)
    c = tuning_case.settings(loss__center=True)
    case, batch = tuning_case.case(model, c, v), tuning_case.batch(model)
    evaluate = steps.make_evaluate(case.decoder)
    _, (cosine_N,), _ = evaluate(case.state.trained, case.objective, batch)
    rows = batch.examples
    h = np.asarray(model.forward(rows.tokens_BxT, rows.mask_BxT, capture=True).residual_NxBxTxD)
    x, d = h - v.mean_NxD[:, None, None], v.directions_NxD[:, None, None]
    cosine_NxBxT = (x * d).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(d, axis=-1)
    expected_N = (cosine_NxBxT * rows.cosine_BxT).sum((1, 2))
    np.testing.assert_allclose(cosine_N, expected_N, rtol=1e-4, atol=1e-5)


def test_losses_return_their_sum_and_count():
    logits_BxLxV = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]]))
    weight = jnp.array([[[1.0, 0.0], [0.5, 0.5]]])
    token = losses.token_loss(logits_BxLxV, jnp.array([[[0, 0], [0, 2]]]), weight)
    expected = -np.log(0.5) - 0.5 * np.log(0.1 * 0.8)
    assert token.total.tolist() == pytest.approx([expected], rel=1e-5)
    assert token.n.tolist() == [2]

    cosine_NxBxT = jnp.array([[[0.5, -1.0]], [[1.0, 0.25]], [[9.0, 9.0]]])
    weight_BxT = jnp.array([[1.0, 1.0]])

    def cosine(sign, into):
        c = tuning_case.settings(sign=sign, loss__mode="in" if into else "out", loss__layers=(0, 2))
        return losses.cosine_loss(cosine_NxBxT, weight_BxT, cosine_spec(c, 3), jnp.array([0]))

    assert float(cosine(1, 1).total[0]) == pytest.approx((0.25 + 1.0 + 0.0 + 0.375) / 2)
    assert float(cosine(-1, 1).total[0]) == pytest.approx((0.75 + 0.0 + 1.0 + 0.625) / 2)
    assert float(cosine(1, 0).total[0]) == pytest.approx((0.5 + 1.0 + 1.0 + 0.25) / 2)
    assert cosine(1, 1).n.tolist() == [2]

    base, own = jnp.log(jnp.array([[[0.5, 0.5]]])), jnp.log(jnp.array([[[0.9, 0.1]]]))
    kl = losses.retention_loss(own, base, jnp.array([[2.0]]))
    expected = 0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1)
    assert kl.total.tolist() == pytest.approx([2 * expected], rel=1e-5) and kl.n.tolist() == [2]


def test_logits_are_computed_at_labels_only_and_loss_is_that_of_the_whole_sequence(model):
    case, batch = tuning_case.case(model, tuning_case.settings()), tuning_case.batch(model)
    parts, _ = sums(case.decoder, case.state.trained, case.objective, batch)
    params = partition.merge(case.state.trained, case.objective.frozen, model.dtype)
    rows = batch.examples
    hidden, _ = case.decoder.apply({"params": params}, rows.tokens_BxT, rows.mask_BxT)
    logits_BxTxV = case.decoder.apply({"params": params}, hidden, method="logits")
    logp = np.asarray(jax.nn.log_softmax(logits_BxTxV))
    expected = -sum(
        weight * logp[b, t, target]
        for b in range(len(rows.tokens_BxT))
        for t, targets, w in zip(
            rows.at_BxL[b], rows.target_BxLxC[b], rows.weight_BxLxC[b], strict=True
        )
        for target, weight in zip(targets, w, strict=True)
    )
    assert float(parts.total[0]) == pytest.approx(float(expected), rel=1e-5)
    assert float(parts.n[0]) == rows.weight_BxLxC.sum()

    B, L, V, T = *rows.at_BxL.shape, model.arch.V, tuning_case.T
    assert L < T
    args = case.decoder, case.state.trained, case.objective
    program = str(jax.make_jaxpr(lambda b: objectives.sums(*args, b)[0].total[0])(batch))
    assert f"f32[{B},{L},{V}]" in program and f"f32[{B},{T},{V}]" not in program


def test_retention_keeps_the_states_of_the_base_at_its_positions(model):
    keep = tuning_case.retention_rows(model, 3)
    out = model.forward(keep.tokens_BxT, keep.mask_BxT)
    logits = model.decoder.apply({"params": model.params}, keep.hidden_BxLxD, method="logits")
    at = np.take_along_axis(np.asarray(out.logits_BxTxV), keep.at_BxL[..., None], 1)
    np.testing.assert_allclose(logits, at, rtol=1e-4, atol=1e-4)
    assert (np.take_along_axis(keep.mask_BxT, keep.at_BxL, 1) == 1).all()
    assert all(len(set(at_L)) == len(at_L) for at_L in keep.at_BxL.tolist())


def test_the_ending_loss_is_the_squared_distance_of_log_probabilities():
    rng = np.random.default_rng(0)
    logits, stops = rng.normal(size=(2, 3, 9)) * 4, [2, 5]
    base, weight = np.log(rng.uniform(0, 0.4, (2, 3))), np.array([[1.0, 0.5, 0], [0, 2, 1]])
    logits[0, 0, stops], base[0, 0] = -40, -90  # both rarer than 1e-4: no distance
    p = np.exp(logits).astype(np.float64)
    p = (p / p.sum(-1, keepdims=True))[..., stops].sum(-1)
    each = weight * np.log((p + 1e-4) / (np.exp(base) + 1e-4)) ** 2
    found = losses.ending_loss(
        jnp.array(logits), jnp.array(base), jnp.array(weight), jnp.array(stops)
    )
    np.testing.assert_allclose(found.total, each.sum(1), rtol=1e-4)
    np.testing.assert_allclose(found.n, weight.sum(1))
    assert each[0, 0] < 1e-9 < each[0, 1]


def test_endings_are_held_by_their_weight_and_average_over_labels_that_go_on(model):
    """In a step: what `ending_loss` gives for the whole batch, whatever the micro-batches."""
    model = dataclasses.replace(model, stop_ids=(2, 0))
    c = tuning_case.settings(loss__ending=0.5)
    batch = tuning_case.batch(model)
    batch.examples.target_BxLxC[1, 0] = 2  # an ending: not held
    held = base_cache.add_endings(batch.examples, model, 2)
    held = held.replace(ending_BxL=held.ending_BxL + 1)  # as if the base ended e times as often
    case = tuning_case.case(model, c)
    assert objectives.LOSSES[5] == "ending" and float(case.objective.weight_J[5]) == 0.5
    logits = model.forward(held.tokens_BxT, held.mask_BxT).logits_BxTxV
    at_BxLxV = jnp.take_along_axis(logits, held.at_BxL[..., None], axis=1)
    args = at_BxLxV, held.ending_BxL, held.goes_on_BxL, jnp.array(model.stop_ids)
    want = losses.ending_loss(*args).over_rows()
    for accumulate in (1, 2):
        _, (mean_J, _) = gradient(
            case.decoder,
            case.state.trained,
            case.objective,
            batch.replace(examples=held),
            case.objective.weight_J,
            accumulate,
        )
        assert float(mean_J[5]) == pytest.approx(float(want.total / want.n), rel=1e-4)
        assert float(want.n) == (batch.examples.weight_BxLxC.sum() - 1) and mean_J[5] > 0.1
