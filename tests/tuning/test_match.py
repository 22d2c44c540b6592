"""The loss `match`: residuals at labels, pulled to the base's under a persona or plus a vector."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from reptune_jax import lm
from reptune_jax.data import behavior as behaviors
from reptune_jax.data.batches import Batch
from reptune_jax.data.tuning import Answer
from reptune_jax.folder import Study
from reptune_jax.model import padding
from reptune_jax.tuning import base_cache, corpus
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


def stream(model, prompt, answer):
    """[N, L, D]: what every layer has where the answer is predicted."""
    ids = model.encode_prompt(prompt) + answer
    tokens, mask = padding.pad([ids], model.pad_id, left=False, bucket=96)  # of one shape
    out = model.forward(tokens, mask, capture=True)
    start = len(ids) - len(answer) - 1
    return np.asarray(out.residual_NxBxTxD, np.float64)[:, 0, start : start + len(answer)]


@pytest.mark.parametrize("goal,sign", [("persona", -1), ("displaced", 1)])
def test_the_loss_is_that_of_whole_forward_passes(goal, sign, model, behavior, said, tmp_path):
    layers = {"train__layers": (2, 4), "loss__layers": (1, 4)}
    changes = {"sign": sign, "loss__goal": goal, "loss__match": 2.0, "loss__dose": 0.5}
    c = tiny_behavior.settings(model.name, behavior, **layers, **changes)
    extraction.write_targets(Study(tmp_path).targets, said)
    texts, vector = corpus.make_corpus(c, tmp_path, model), tuning_case.vector(model)
    case = tuning_case.case(model, c, vector)
    found = base_cache.with_base_values(c, texts, model, case.objective.probe)
    found = base_cache.with_rows_below(c, found, model, case.decoder, case.objective)
    assert found.train.below_BxTxD is not None and found.train.under_BxT is None
    of_B = np.array([0, 1, 0, 0])  # a row of another behavior does not count
    rows = dataclasses.replace(found.train, of_B=of_B)
    tokens = dataclasses.replace(rows, below_BxTxD=None, below_cosine_BxMxT=None)
    moved = {
        path: leaf + 0.05 * jax.random.normal(jax.random.key(1), leaf.shape)
        for path, leaf in case.state.trained.items()
    }
    tuned, each = tuning_case.tuned(model, moved, c.train.layers), []  # a number a label
    items = {i.id: i for i in behaviors.load(behavior).select("tune", "free")}
    for b, answer in enumerate(a for a in said if a.split == "tune" and a.sign == sign):
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

    def step(trained, task=case.objective, rows=rows, accumulate=2):
        grads, (mean_J, _) = gradient(
            case.decoder, trained, task, Batch(rows, None), only, accumulate
        )
        return grads, float(mean_J[MATCH])

    grads, loss = step(moved)
    assert loss == pytest.approx(np.mean(each), rel=1e-4)
    uncached, again = step(moved, rows=tokens, accumulate=1)
    assert again == pytest.approx(loss, rel=1e-4)
    for path, g in grads.items():
        scale = float(jnp.abs(g).max())
        assert scale > 0
        np.testing.assert_allclose(uncached[path], g, rtol=1e-4, atol=1e-5 * scale)

    nearer = moved
    for _ in range(20):
        size = 0.3 / float(optax.global_norm(grads))
        nearer = {path: leaf - size * grads[path] for path, leaf in nearer.items()}
        grads, now = step(nearer)
    assert now < 0.8 * loss
    if goal == "displaced":  # without a dose the base is where it should be
        task = case.objective.replace(beyond_MxD=0 * case.objective.beyond_MxD)
        grads, loss = step(case.state.trained, task)
        assert loss < 1e-10
        assert max(float(jnp.abs(g).max()) for g in grads.values()) < 1e-5


@pytest.mark.parametrize("sign", [1, -1])
def test_a_claim_is_asked_under_the_first_persona_of_the_sign(sign, model):
    whole = behaviors.load("honesty")
    personas, claims = whole.select(format="persona"), whole.select("tune", "claim")[:2]
    few = dataclasses.replace(whole, items=(*personas[::-1], *claims))
    c = tuning_case.settings(sign=sign, loss__match=1.0, loss__position="last")
    found = corpus._claim_examples(c, None, model, few, "tune")
    of_sign = [p for p in personas if p.label == int(sign > 0)]
    persona = min(of_sign, key=lambda p: p.cluster).messages[0]
    assert len(found) == 4  # both orders
    for example, claim in zip(found, [claims[0]] * 2 + [claims[1]] * 2, strict=True):
        said = model.tokenizer.decode(example.under)
        asked = model.tokenizer.decode(example.ids)
        assert said == f"<|im_start|>system\n{persona['content']}<|im_end|>\n{asked}"
        assert claim.messages[-1]["content"] in asked
    c.loss.goal = "displaced"
    assert not any(e.under for e in corpus._claim_examples(c, None, model, few, "tune"))


def test_layers_that_cannot_change_are_refused(model):
    with pytest.raises(ValueError, match=r"loss.match: got 1 at loss.layers=\(0, 1\), expected"):
        tuning_case.case(model, tuning_case.settings(loss__match=1.0, loss__layers=(0, 1)))
