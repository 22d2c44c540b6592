"""Steps that begin at the lowest trained layer are those that begin at the tokens."""

import collections
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reptune_jax import config, lm, train
from reptune_jax.data.batches import Batch, stack_examples
from reptune_jax.tuning import base_cache
from reptune_jax.tuning import step as steps
from tests.support import tiny, tiny_behavior, tuning_case


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def model(request, tmp_path_factory):
    make, overrides = tiny.VARIANTS[request.param]
    return lm.load(str(make(tmp_path_factory.mktemp(request.param), **overrides)), "float32")


@pytest.mark.parametrize("rank", [0, 4])
def test_a_step_from_kept_states_has_the_losses_and_gradient_of_one_from_tokens(model, rank):
    c = tuning_case.settings(train__lora__rank=rank, train__layers=(2, 4), loss__layers=(1, 3))
    c.train.modules, c.loss.retain, c.loss.l2 = ("attn/v", "attn/o"), 2.0, 1.0
    c.loss.also.second = config.also_behavior("unused")
    c.loss.also.second.layers = (0, 4)
    case = tuning_case.case(model, c, also={"second": tuning_case.vector(model, seed=1)})
    examples = tuning_case.examples(5, model.arch.V)
    rows = stack_examples(examples, model.pad_id, tuning_case.T, [0, 1, 1, 0, 1])
    keep = tuning_case.retention_rows(model, 3, layers=c.train.layers)
    moved = {
        path: leaf + 0.05 * jax.random.normal(jax.random.key(1), leaf.shape)
        for path, leaf in case.state.trained.items()
    }

    def gradient(batch):
        args = case.decoder, moved, case.objective, batch, case.objective.weight_J
        return jax.jit(steps.gradient, static_argnums=(0, 5))(*args, 1)

    grads, (mean_J, cosine_KxN) = gradient(Batch(rows, keep))
    known = [
        base_cache.add_below(side, model, case.decoder, case.objective, 2) for side in (rows, keep)
    ]
    assert known[0].below_BxTxD.shape == (5, tuning_case.T, model.arch.D)
    ours, (mean_ours_J, cosine_ours_KxN) = gradient(Batch(*known))
    np.testing.assert_allclose(mean_ours_J, mean_J, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(cosine_ours_KxN, cosine_KxN, rtol=1e-4, atol=1e-6)
    for path, g in grads.items():
        scale = float(jnp.abs(g).max())
        np.testing.assert_allclose(ours[path], g, rtol=1e-4, atol=1e-5 * scale)


def test_a_run_is_the_same_with_and_without_kept_states_and_packed(
    model, tmp_path, monkeypatch, capsys
):
    tiny_behavior.patch_neutral(monkeypatch)
    behavior, logs = tiny_behavior.write(tmp_path), {}
    packed = [(1.0, "on")] * (model.arch.family == "llama")
    for gib, pack in [(0.0, "off"), (1.0, "off"), *packed]:
        c = tiny_behavior.settings(model.name, behavior, loss__retain=0.5, train__cache_gib=gib)
        c.train.pack = pack
        folder = train.run(c, tmp_path / f"{gib}-{pack}", model)
        said = capsys.readouterr().out
        assert ("layers below 1: computed once" in said) == bool(gib)
        assert ("packed: 2 rows of " in said) == (pack == "on")
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        logs[gib, pack] = [json.loads(line) for line in lines]
    for a, *others in zip(*logs.values(), strict=True):
        for b in others:
            for key in a.keys() - {"examples_per_s", "tokens_per_s"}:
                assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5), key


def test_what_is_kept_fits_what_is_allowed(model):
    rows = tuning_case.batch(model).examples
    size = rows.tokens_BxT.size * model.arch.D * 4 / 2**30
    assert base_cache.below_gib(model, 1, rows) == pytest.approx(size)
    assert base_cache.below_gib(model, 0, rows) == 0


def test_what_enters_is_remembered_once_for_all_vectors_and_within_a_limit(model, monkeypatch):
    monkeypatch.setattr(base_cache, "_known", collections.OrderedDict())
    c, examples = tuning_case.settings(), tuning_case.batch(model).examples
    entered = []
    for seed in (0, 1):  # two vectors, the same examples
        case = tuning_case.case(model, c, tuning_case.vector(model, seed))
        found = base_cache.add_below(examples, model, case.decoder, case.objective, 4)
        entered.append(found.below_BxTxD)
    assert entered[0] is entered[1] and len(base_cache._known) == 3  # it, and two vectors' cosines
    for i in range(4):
        base_cache._remember(f"other {i}", np.zeros(1000, np.float32), limit=9000)
    assert [*base_cache._known] == ["other 2", "other 3"]


def end_probability(model, examples):
    """p(a stop token comes next) at every label, from the plain forward pass, [B, L]."""
    logits = model.forward(examples.tokens_BxT, examples.mask_BxT).logits_BxTxV
    p_BxTxV = np.asarray(jax.nn.softmax(logits, axis=-1), np.float64)
    p_BxT = p_BxTxV[..., list(model.stop_ids)].sum(-1)
    return np.take_along_axis(p_BxT, examples.at_BxL, axis=1)


def test_endings_are_the_untuned_models_and_hold_where_an_answer_goes_on(model):
    model = dataclasses.replace(model, stop_ids=(2, 0))
    examples = tuning_case.batch(model).examples
    examples.target_BxLxC[1, 0] = 2  # an answer that ends
    examples = dataclasses.replace(  # as beside rows with two candidates a label: 0 of weight 0
        examples,
        target_BxLxC=np.pad(examples.target_BxLxC, ((0, 0), (0, 0), (0, 1))),
        weight_BxLxC=np.pad(examples.weight_BxLxC, ((0, 0), (0, 0), (0, 1))),
    )
    held = base_cache.add_endings(examples, model, 2)
    labels_BxL = examples.weight_BxLxC.sum(-1)
    labels_BxL[1, 0] = 0
    np.testing.assert_array_equal(held.goes_on_BxL, labels_BxL)
    want_BxL = np.log(end_probability(model, examples))
    np.testing.assert_allclose(held.ending_BxL, want_BxL, rtol=1e-4)


def test_answers_that_were_cut_do_not_teach_to_go_on(model):
    c = tuning_case.settings(loss__cosine=0.0, train__layers=(1, 4), loss__layers=(1, 4))
    batch = tuning_case.batch(model)
    # Many, so that together they are as likely as the end of a sentence makes an ending.
    said = set(batch.examples.target_BxLxC.ravel().tolist())
    model = dataclasses.replace(model, stop_ids=tuple(set(range(model.arch.V)) - said)[:100])
    labels_BxL, share = batch.examples.weight_BxLxC.sum(-1) > 0, {}
    before_BxL = end_probability(model, batch.examples)
    rows = base_cache.add_endings(batch.examples, model, 4)
    for keeps in (False, True):
        c.loss.ending = 1.0 * keeps
        case = tuning_case.case(model, c)
        step, state = steps.make_step(case.decoder, case.train), case.state
        for _ in range(60):
            state, _ = step(state, case.objective, Batch(rows, None), jnp.asarray(False))
        tuned = tuning_case.tuned(model, state.trained, c.train.layers)
        after_BxL = end_probability(tuned, batch.examples)
        share[keeps] = float((after_BxL / before_BxL)[labels_BxL].mean())
    assert share[False] < 0.1
    assert share[True] == pytest.approx(1, abs=0.3)
