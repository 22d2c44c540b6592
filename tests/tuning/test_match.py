"""The loss `match`: residuals at labels, pulled to the base's under a persona or plus a vector."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reptune_jax import config, lm, train
from reptune_jax.data import behavior as behaviors
from reptune_jax.data.batches import Batch
from reptune_jax.data.tuning import Answer
from reptune_jax.folder import Study
from reptune_jax.tuning import base_cache, corpus, partition
from reptune_jax.tuning import objective as objectives
from reptune_jax.tuning import step as steps
from reptune_jax.vectors import extraction
from tests.support import tiny, tiny_behavior, tuning_case

MATCH = objectives.LOSSES.index("match")
MOODS = {(0, 1): "wonderful", (0, -1): "terrible", (1, 1): "a good day there", (1, -1): "no"}
gradient = jax.jit(steps.gradient, static_argnums=(0, 5))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return lm.load(str(tiny.make_llama(tmp_path_factory.mktemp("llama"))), "float32")


@pytest.fixture(scope="module")
def behavior(tmp_path_factory):
    """Four prompts a split and two pairs of personas, which take turns."""
    path = tiny_behavior.write(tmp_path_factory.mktemp("behavior"))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in rows if row.get("format") != "persona"]
    for (pair, sign), mood in MOODS.items():
        turn = {"role": "system", "content": f"You are {mood}."}
        about = {"id": f"p{pair}{sign}", "cluster": f"pair{pair}", "messages": [turn]}
        of = {"format": "persona", "split": "train", "label": int(sign > 0), "pos": "", "neg": ""}
        rows.append(rows[1] | about | of)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def said(model, behavior):
    """Answers of 2 to 5 random tokens."""
    rng = np.random.default_rng(0)
    return [
        Answer(i.id, split, sign, "?", "!", rng.integers(4, model.arch.V, 2 + n).tolist(), 0.0)
        for split in ("tune", "val")
        for n, i in enumerate(behaviors.load(behavior).select(split, "free"))
        for sign in (1, -1)
    ]


def settings(model, behavior, goal, **changes):
    changes = {"loss__goal": goal, "loss__match": 2.0, "loss__cosine": 0.0} | changes
    return tiny_behavior.settings(model.name, behavior, **changes)


def stream(model, prompt, answer):
    """[N, L, D] of an unpadded row, where its labels are predicted."""
    ids = model.encode_prompt(prompt) + answer
    out = model.forward(np.array([ids]), np.ones((1, len(ids)), int), capture=True)
    start = len(ids) - len(answer) - 1
    return np.asarray(out.residual_NxBxTxD, np.float64)[:, 0, start : start + len(answer)]


@pytest.mark.parametrize("goal,sign", [("persona", -1), ("displaced", 1)])
def test_the_loss_is_that_of_whole_forward_passes(goal, sign, model, behavior, said, tmp_path):
    changes = {"sign": sign, "train__layers": (2, 4), "loss__layers": (1, 4), "loss__dose": 0.5}
    c = settings(model, behavior, goal, train__lora__rank=2 * (sign > 0), **changes)
    extraction.write_targets(Study(tmp_path).targets, said)
    texts = corpus.make_corpus(c, tmp_path, model)
    vector = tuning_case.vector(model)
    case = tuning_case.case(model, c, vector)
    found = base_cache.with_base_values(c, texts, model, case.decoder, case.objective)
    assert found.train.below_BxTxD is not None and found.train.under_BxT is None
    of_B = np.array([0, 1, 0, 0])  # a row of another behavior does not count
    rows = dataclasses.replace(found.train, of_B=of_B)
    tokens = dataclasses.replace(rows, below_BxTxD=None, below_cosine_BxMxT=None)
    moved = {
        path: leaf + 0.05 * jax.random.normal(jax.random.key(1), leaf.shape)
        for path, leaf in case.state.trained.items()
    }
    about = partition.about(model.arch, c.train)
    tuned = tuning_case.tuned(model, moved, c.train.layers, about)

    each = []  # a number a label
    answers = [a for a in said if a.split == "tune" and a.sign == sign]
    items = {i.id: i for i in behaviors.load(behavior).select("tune", "free")}
    for b, answer in enumerate(answers):
        asked = list(items[answer.item].messages)
        persona = {"role": "system", "content": f"You are {MOODS[b % 2, sign]}."}
        want = stream(model, [persona, *asked] if goal == "persona" else asked, answer.ids)[2:4]
        if goal == "displaced":
            want += sign * 0.5 * vector.directions_NxD[2:4, None].astype(np.float64)
        apart = stream(tuned, asked, answer.ids)[2:4] - want
        if not of_B[b]:
            each += [*((apart**2).sum(-1) / (want**2).sum(-1)).mean(0)]
    assert np.std(each) > 0.01  # labels differ

    only = jnp.eye(len(objectives.LOSSES))[MATCH]
    grads = []
    for accumulate, batch in ((2, rows), (1, tokens)):
        args = case.decoder, moved, case.objective, Batch(batch, None), only, accumulate
        grad, (mean_J, _) = gradient(*args)
        assert float(mean_J[MATCH]) == pytest.approx(np.mean(each), rel=1e-4)
        grads.append(grad)
    for path, g in grads[0].items():
        scale = float(jnp.abs(g).max())
        assert scale > 0
        np.testing.assert_allclose(grads[1][path], g, rtol=1e-4, atol=1e-5 * scale)


def test_no_dose_is_no_pull_and_layers_that_cannot_change_are_refused(model):
    c = tuning_case.settings(loss__match=1.0, loss__goal="displaced", loss__dose=0.0)
    case, rows = tuning_case.case(model, c), tuning_case.batch(model).examples
    rows = base_cache.add_goals(rows, model, objectives.goal_layers(c), 4)
    only = jnp.eye(len(objectives.LOSSES))[MATCH]
    args = case.decoder, case.state.trained, case.objective, Batch(rows, None), only
    grads, (mean_J, _) = gradient(*args, 1)
    assert float(mean_J[MATCH]) < 1e-10
    assert max(float(jnp.abs(g).max()) for g in grads.values()) < 1e-5
    with pytest.raises(ValueError, match=r"loss.match: got 1 at loss.layers=\(0, 1\), expected"):
        tuning_case.case(model, tuning_case.settings(loss__match=1.0, loss__layers=(0, 1)))


def test_a_run_comes_nearer(model, behavior, said, tmp_path, monkeypatch):
    tiny_behavior.patch_neutral(monkeypatch)
    study = Study(tmp_path)
    c = settings(model, behavior, "persona", loss__token=0.0, loss__l2=0.1, train__steps=8)
    c.arm, c.train.lr, c.train.measure_every = "match", 1e-2, 0
    monkeypatch.setitem(config.ARMS, "match", config.ARMS["match"] | {"loss.match": 3.0})
    extraction.run(c, study, lambda: model)
    folder = train.run(c, tmp_path, model)
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["match_loss"] for row in found if "match_loss" in row]
    nearer = [row["val/match_loss"] for row in found if "val/match_loss" in row]
    assert losses[-1] < 0.7 * losses[0] and nearer[-1] < nearer[0]
    assert all(
        row["loss"]
        == pytest.approx(3 * row["match_loss"] + 0.1 * row["l2_loss"] + 0.1 * row["ending_loss"])
        for row in found
        if "loss" in row
    )
