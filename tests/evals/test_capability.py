"""The program on a tiny model: scores against a plain oracle, resuming, a broken model."""

import dataclasses
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pandas as pd
import pytest

from reptune_jax import lm
from reptune_jax.data import behavior as behaviors
from reptune_jax.evals import arms, capability, results
from reptune_jax.evals.arms import Condition
from reptune_jax.evals.results import Row
from reptune_jax.evals.suites import readers, scoring, shared, verdicts
from reptune_jax.evals.suites.shared import Scored
from reptune_jax.folder import Study
from reptune_jax.vectors.intervention import Intervention
from tests.support import steering_case, suites, tiny, tiny_behavior


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """(config, model) with every suite's files."""
    folder = tmp_path_factory.mktemp("capability")
    made = tiny.make_llama(folder / "model")
    data = str(suites.write(folder / "data", times=2))
    c = tiny_behavior.settings(made, tiny_behavior.write(folder), suites__data=data)
    c.suites.arms = ("base",)
    return c, lm.load(c.model, "float32")


def oracle(model, pairs) -> list[float]:
    """log p(choice | context) by a plain softmax in float64, from one padded batch."""
    out, texts = [], [f"{context} {choice}" for context, choice in pairs]
    encoded = [model.tokenizer(text, return_offsets_mapping=True) for text in texts]
    tokens, mask = np.zeros((16, 160), int), np.zeros((16, 160), int)
    for row, one in enumerate(encoded):
        tokens[row, : len(one["input_ids"])], mask[row, : len(one["input_ids"])] = (
            one["input_ids"],
            1,
        )
    mask[len(encoded) :, 0] = 1
    logits = np.asarray(model.forward(tokens, mask).logits_BxTxV, np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for row, (one, (context, _)) in enumerate(zip(encoded, pairs, strict=True)):
        ids, ends = one["input_ids"], [end for _, end in one["offset_mapping"]]
        start = next(i for i, end in enumerate(ends) if end > len(context))
        out.append(sum(logp[row, i - 1, ids[i]] for i in range(start, len(ids))))
    return out


def test_scores_are_those_of_a_plain_softmax(there):
    c, model = there
    names = ("piqa", "winogrande", "mmlu", "truthfulqa")
    questions = [readers.read(name, c.suites.data)[0] for name in names]
    rows = scoring.rows(Condition(model, "base"), _labels(model), questions, 16)
    found = {row.template: row for row in rows if row.metric == "acc"}
    pairs = [pair for q in questions for pair in zip(q.contexts, q.choices, strict=True)]
    logp = iter(oracle(model, pairs))
    for question in questions:
        each = [next(logp) for _ in question.choices]
        (gold,) = question.gold
        row, others = found[question.test], each[:gold] + each[gold + 1 :]
        assert row.logp_pos == pytest.approx(each[gold], abs=1e-4)
        assert row.logp_neg == pytest.approx(max(others), abs=1e-4)
        assert row.value == float(each[gold] > max(others))


@pytest.mark.parametrize("beside", [(2, 4), (2, 8)])
@pytest.mark.parametrize("steered", [None, "all", "answer", "generated"])
def test_choices_after_one_question_are_scored_as_whole_rows(there, steered, beside, monkeypatch):
    """Within 1e-4 nats: left-padded prefixes, groups of 1 to 7, short contexts, any token rule."""
    model, rng = there[1], np.random.default_rng(0)
    monkeypatch.setattr(shared, "_BESIDE", beside)
    steer = None
    if steered:
        vector = steering_case.make_vector(model_sha=model.sha)
        steer = Intervention(vector.at([1]) * 2, tokens=steered)

    def some(n):
        return tuple(rng.integers(5, model.arch.V, n).tolist())

    pairs = []
    for before, choices in ((21, 7), (33, 2), (9, 1), (12, 4), (3, 4), (40, 3), (17, 2)):
        context = some(before)
        pairs += [Scored(context + some(int(n)), before) for n in rng.integers(1, 20, choices)]
    asked = []
    monkeypatch.setattr(shared, "_after_prefix", noting(shared._after_prefix, asked))
    cond = Condition(model, "base", steer=steer)
    found = {}
    for part in shared.scores(cond, pairs + pairs[:3], 8):
        found |= part
    assert asked and set(found) == set(pairs)
    texts = [list(pair.ids) for pair in pairs], [pair.start for pair in pairs]
    for pair, (logp, greedy) in zip(pairs, model.score_ids(*texts, steer, 5), strict=True):
        assert found[pair][0] == pytest.approx(logp, abs=1e-4) and found[pair][1] == greedy


def noting(function, calls):
    def noted(*args):
        calls.append(args)
        return function(*args)

    return noted


def test_what_has_to_see_the_whole_row_does(there, monkeypatch):
    model = there[1]
    monkeypatch.setattr(shared, "_after_prefix", None)
    steer = SimpleNamespace(shares_prompt=False, steer=steering_case.make_vector().steer)
    context = tuple(range(5, 30))
    pairs = [Scored((*context, last, 7), 25) for last in (5, 6, 8)]
    (found,) = shared.scores(Condition(model, "base", steer=steer), pairs, 4)
    assert set(found) == set(pairs)


def _labels(model) -> dict:
    return {"behavior": "sentiment", **Condition(model, "base").labels}


def test_a_persona_stands_before_the_question(there):
    c, model = there
    persona = arms.prompted(model, behaviors.load(c.behavior).select(format="persona")[0], 1)
    question = readers.read("piqa", c.suites.data)[0]
    rows = scoring.rows(persona, {"behavior": "sentiment", **persona.labels}, [question], 4)
    context = f"You are wonderful.\n\n{question.contexts[0]}"
    (logp,) = oracle(model, [(context, "use a knife")])
    assert rows[0].logp_pos == pytest.approx(logp, abs=1e-4)


def test_a_text_beyond_the_context_keeps_its_end(there):
    c, model = there
    short = dataclasses.replace(model, config={**model.config, "max_position_embeddings": 24})
    question = readers.read("arc_easy", c.suites.data)[0]
    rows = scoring.rows(Condition(short, "base"), _labels(short), [question], 4)
    long = question.contexts[2] + " salt"
    ids = model.tokenizer(long)["input_ids"]
    assert len(ids) > 24 == short.context
    (kept,) = oracle(model, [(model.tokenizer.decode(ids[-24:])[: -len(" salt")], "salt")])
    assert rows[0].logp_pos == pytest.approx(kept, abs=1e-4)


def test_what_is_there_is_not_measured_again(there, tmp_path, monkeypatch, capsys):
    c, model = there
    c, seen = c.copy_and_resolve_references(), []

    def made_up(cond, labels, questions, batch):
        seen.append(sorted({q.test for q in questions}))
        at = {"split": "suites", "metric": "acc", "value": 1.0}
        ids = [{"template": q.test, "item_id": q.id, "cluster": q.id} for q in questions]
        return [Row(**labels, **at, **one) for one in ids]

    monkeypatch.setattr(scoring, "rows", made_up)
    c.suites.names = ("piqa",)
    (path,) = capability.run(c, tmp_path, model)
    first = path.read_bytes()
    assert path == Study(tmp_path).capability("base") and "piqa   base" in capsys.readouterr().out
    capability.run(c, tmp_path, model)
    assert seen == [["piqa"]] and path.read_bytes() == first
    c.suites.names = ("arc_easy", "piqa")  # one more: only that is asked
    capability.run(c, tmp_path, model)
    assert seen[1:] == [["arc_easy"]]
    assert results.read(path).groupby("template").item_id.nunique().tolist() == [2, 2]
    c.suites.limit = 1  # other items: asked anew, and instead of those
    capability.run(c, tmp_path, model)
    assert seen[2:] == [["arc_easy", "piqa"]]
    capability.run(c, tmp_path, model)
    other = shutil.copytree(c.suites.data, tmp_path / "other") / "choice/piqa.validation.jsonl"
    other.write_text(other.read_text().replace("use a spoon", "use a fork"))
    c.suites.data = str(tmp_path / "other")  # the same numbers, another text
    capability.run(c, tmp_path, model)
    capability.run(c, tmp_path, model)
    assert seen[3:] == [["piqa"]]
    results.write_parquet(path, [Row(**r) for r in results.read(path).drop(columns="file")
                                 .to_dict("records")])  # fmt: skip
    capability.run(c, tmp_path, model)  # a file that does not say what was asked stands
    assert seen[4:] == []
    assert results.read(path).groupby("template").item_id.nunique().tolist() == [1, 1]

    def half(base):
        return arms.Condition(base, "weights", sign=1, k=0.5)

    def asked_anew(one):
        seen.clear()
        monkeypatch.setattr(capability, "conditions", lambda *given: [one])
        capability.run(c, tmp_path, model)
        return len(seen)

    for scale, again in ((0.5, 1), (0.5, 0), (0.75, 1)):  # weights at another scale are others
        assert asked_anew(capability.Planned("weights+_s0", half, scale)) == again
    for shown, again in (("ab", 1), ("ab", 0), ("cd", 1), ("cd", 0)):  # and so is another persona
        about = {
            "behavior": "b",
            "arm": "prompt",
            "sign": 1,
            "seed": 0,
            "metric": "kl",
            "value": 0.0,
        }
        chats = [
            Row("", **about, split="chats", item_id=str(i), cluster="", prompt_sha=sha)
            for i, sha in enumerate(shown)
        ]
        results.write_parquet(Study(tmp_path).baseline, chats, {})
        (planned,) = capability._prompted(c, Study(tmp_path))
        assert asked_anew(planned._replace(make=lambda base: Condition(base, "prompt", 1))) == again


def test_a_broken_model_is_inferior_and_no_suites_are_an_error(there, tmp_path):
    """Of questions whose right choice is what the tiny model says, the broken one gets few."""
    c, model = there
    words = ["snow", "sand", "salt", "soup", "rain", "milk"]
    asked = [
        readers.Question("made", (f"{a} {b}",) * 4, tuple(words[:4]), frozenset([0]), a + b)
        for a in "abcdefghij" for b in words
    ]  # fmt: skip
    base = Condition(model, "base")
    texts = [(q.contexts[0], f" {choice}") for q in asked for choice in q.choices]
    best = np.reshape([logp for logp, _ in model.loglikelihood(texts)], (-1, 4)).argmax(1)
    known = [q._replace(gold=frozenset([int(i)])) for q, i in zip(asked, best, strict=True)]
    noise = jax.random.normal(jax.random.key(0), model.params["final_norm"]["scale"].shape)
    broken = model.params | {"final_norm": {"scale": noise}}
    tuned = Condition(dataclasses.replace(model, params=broken), "dual", 1)
    mixed = [known[i] for i in np.random.default_rng(0).permutation(len(known))]
    rows = [
        row
        for cond, of in ((base, known), (tuned, known), (Condition(model, "random", 1), mixed))
        for row in scoring.rows(cond, {"behavior": "b", **cond.labels}, of, 32)
    ]
    found = verdicts.frame(pd.DataFrame(map(dataclasses.asdict, rows)), 0.1).set_index("arm")
    assert found.acc["base"].estimate == 1.0 and found.acc["dual"].estimate < 0.9
    assert found.verdict["dual"] == "inferior"
    # The same weights, asked in another order: in other batches, beside others.
    assert found.change["random"].estimate == 0.0 and found.verdict["random"] == "retained"
    c = c.copy_and_resolve_references()
    c.suites.names = ()
    with pytest.raises(ValueError, match=r"suites\.names: got none"):
        capability.run(c, tmp_path, model)
