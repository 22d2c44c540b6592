"""Judges that a study makes: their scores, their worth, and that weak ones judge nothing."""

import functools
import math

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import reptune_jax as rt
from reptune_jax.data import behavior as behaviors
from reptune_jax.evals import judging, probe, rubric
from reptune_jax.evals.arms import Condition
from reptune_jax.evals.bench import Bench
from reptune_jax.evals.judging import Judge, Measured
from reptune_jax.evals.stats import auroc
from reptune_jax.folder import Study
from reptune_jax.report import about, study
from reptune_jax.vectors.steering_vector import SteeringVector
from tests.support import tiny, tiny_behavior
from tests.support import torch_reference as ref
from tests.support.chat_endpoint import said, serving
from tests.support.synthetic import synthetic_study


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judges")
    model = rt.load(str(tiny.make_llama(folder / "model")), "float32")
    path = tiny_behavior.write(folder)
    return folder, model, behaviors.load(path), path


def settings(made, **changes):
    folder, *_, path = made
    return tiny_behavior.settings(folder / "model", path, **changes)


def asked(made, **changes):
    folder, model, behavior, _ = made
    return judging.named(settings(made, **changes), Study(folder / "s"), model, behavior)


# ---------------------------------------------------------------- a chat model by a rubric


def test_the_expectation_over_the_scale():
    logp = np.log([0.1, 0.0001, 0.3, 0.2, 0.2])
    mean = (1 * 0.1 + 2 * 0.0001 + 3 * 0.3 + 4 * 0.2 + 5 * 0.2) / 0.8001
    assert rubric.expected(logp, range(1, 6)) == pytest.approx(mean)
    assert math.isnan(rubric.expected(np.log([0.1, 0.1]), (1, 2)))  # it says something else
    assert math.isnan(rubric.expected([math.nan, -0.1], (1, 2)))


def test_a_chat_models_score_is_that_of_its_next_tokens(made, monkeypatch):
    """transformers' logits, softmax over its vocabulary; to 1e-3 of the scale."""
    folder, model, behavior, _ = made
    monkeypatch.setattr(rubric, "LEAST_MASS", 0.0)
    texts = [(i, t) for i in behavior.select("test", "free")[:2] for t in (i.pos, "No.")]
    found = rubric.local(model, "It is kind.", (0, 9), 4)(texts)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    theirs = ref.load(folder / "model")
    digits = [tokenizer.encode(str(n), add_special_tokens=False)[0] for n in range(10)]
    for (item, text), score in zip(texts, found, strict=True):
        turn = {"role": "user", "content": rubric.question("It is kind.", (0, 9), item, text)}
        ids = tokenizer.apply_chat_template([turn], add_generation_prompt=True, return_dict=False)
        with torch.no_grad():
            logits_V = theirs(torch.tensor([ids])).logits[0, -1].double()
        p = torch.softmax(logits_V, 0)[digits].numpy()
        assert score == pytest.approx(float(p @ np.arange(10) / p.sum()), abs=1e-3)


def test_a_number_of_two_tokens_is_refused(made):
    with pytest.raises(ValueError, match=r"eval\.scale: got the number 10, which is 2 tokens"):
        rubric.local(made[1], "It is kind.", (0, 10), 4)


# ---------------------------------------------------------------- a probe


def test_the_residuals_are_transformers_means_over_the_answer(made):
    """Of hidden states of block 1, float32, to 1e-4; an answer of no words is its prompt's end."""
    folder, model, behavior, _ = made
    item = behavior.select("test", "free")[0]
    ours = probe.residuals(model, 1, 4)([(item, " It is good."), (item, ""), (item, "Yes")])
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    theirs = ref.load(folder / "model")
    turns = [dict(turn) for turn in item.messages]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    for row, text in zip(ours, ("It is good.", "", "Yes"), strict=True):
        answer = tokenizer.encode(text, add_special_tokens=False)
        with torch.no_grad():
            states = theirs(torch.tensor([prompt + answer]), output_hidden_states=True)
        start = len(prompt) if answer else len(prompt) - 1
        expected = states.hidden_states[2][0, start:].mean(0).numpy()
        np.testing.assert_allclose(row, expected, atol=1e-4)


def test_a_probe_finds_what_is_planted_and_nothing_in_noise():
    rng = np.random.default_rng(0)
    planted = rng.standard_normal(30)
    labels = rng.integers(0, 2, 400)
    features = rng.standard_normal((400, 30)) + np.outer(labels - 0.5, planted)
    read = lambda texts: features[[i for i, _ in texts]]  # noqa: E731
    rows = [(i, "") for i in range(400)]
    score = probe.train(read, rows[:200], labels[:200])
    assert auroc(score(rows[200:]), labels[200:]) > 0.95
    of_noise = probe.train(read, rows[:200], rng.permutation(labels[:200]))
    assert 0.35 < auroc(of_noise(rows[200:]), labels[200:]) < 0.65
    with pytest.raises(ValueError, match="expected some with and some against the behavior"):
        probe.train(read, rows[:5], [1] * 5)


def test_the_probe_learns_from_train_and_tune_and_is_measured_on_test(made, monkeypatch, capsys):
    learned = []
    train = probe.train
    monkeypatch.setattr(
        probe, "train", lambda read, texts, y: learned.extend(texts) or train(read, texts, y)
    )
    found = asked(made, eval__judge="probe:2", eval__batch=64)
    assert {item.split for item, _ in learned} == {"train", "tune"}
    assert {item.split for item, _ in found.texts} == {"test"} and found.fit
    assert found.auroc.estimate == auroc(found.scores, found.labels) > 0.8
    out = capsys.readouterr().out
    assert "judge probe:2: AUROC 1.000" in out and "too weak" not in out


# ---------------------------------------------------------------- which judge, and its worth


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lexicon", ("", "")),
        ("", ("", "")),
        ("probe", ("probe", "")),
        ("probe:3", ("probe", "3")),
        ("chat:org/name", ("chat", "org/name")),
        ("chat:a/b:c.gguf", ("chat", "a/b:c.gguf")),
        ("openai:m@http://localhost:1/v1", ("openai", "m@http://localhost:1/v1")),
    ],
)
def test_names_of_judges(text, expected):
    assert judging.parse(text) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval__judge": "prob"}, "eval.judge: got 'prob', expected lexicon, probe"),
        ({"eval__judge": "probe:x"}, "eval.judge: got 'probe:x'"),
        ({"eval__judge": "embed"}, "eval.judge: got 'embed'"),
        ({"eval__judge": "chat"}, r"eval\.rubric: got '', expected what chat is to look for"),
        ({"study__primary": "probe:free"}, "eval.judge: got 'lexicon', expected one that gives"),
        ({"eval__judge": "probe", "study__primary": "rubric:free"}, "expected one that gives rub"),
    ],
)
def test_what_cannot_judge_is_said_before_anything_is_made(made, changes, message):
    with pytest.raises(ValueError, match=message):
        judging.check(settings(made, **changes), made[2])


def test_a_layer_that_is_not_there_and_a_library_that_is_not_installed(made):
    with pytest.raises(ValueError, match="got 'probe:4', expected a layer below 4"):
        asked(made, eval__judge="probe:4")
    with pytest.raises(ValueError, match="package sentence-transformers to be installed"):
        asked(made, eval__judge="embed:some/model")


def test_an_embedding_library_is_used_where_it_is(made, monkeypatch):
    class Fake:
        def __init__(self, name):
            assert name == "some/model"

        def encode(self, texts):
            return np.array([["good" in t, "terrible" in t] for t in texts], float)

    module = type("module", (), {"SentenceTransformer": Fake})
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", module)
    assert asked(made, eval__judge="embed:some/model").auroc.estimate == 1


@pytest.mark.parametrize(
    ("scores", "fit"),
    [
        ([1, 0, 1, 0, 1, 0, 1, 0, 1, 0], True),
        ([1, 0, 0, 1, 1, 0, 0, 1, 1, 0], False),  # AUROC .6
        ([math.nan, 0, 1, math.nan, 1, 0, 1, 0, 1, 0], True),
        ([math.nan, 0, 1, math.nan, 1, 0, 1, math.nan, 1, 0], False),  # three of ten are missing
        ([math.nan] * 10, False),
    ],
)
def test_a_judge_needs_its_auroc_and_most_of_its_scores(made, scores, fit):
    items = made[2].select(format="free")[:5]
    texts = [(i, t) for i in items for t in (i.pos, i.neg)]
    assert Measured(Judge("probe", len), texts, [1, 0] * 5, scores).fit is fit


def bench(made, named, **changes):
    _, model, *_ = made
    zeros = np.zeros((4, 64), np.float32)
    vector = SteeringVector(zeros, np.ones(4, np.float32), zeros, (1,), {})
    return Bench(settings(made, **changes), model, vector, functools.partial(lambda x: x, named))


@pytest.mark.parametrize("fit", [True, False])
def test_a_weak_judge_judges_nothing_and_its_worth_is_kept(made, fit):
    _, model, behavior, _ = made
    texts, labels = judging.labelled(behavior, "test")
    judge = Judge("rubric", lambda texts: [3.5] * len(texts))
    named = Measured(judge, texts, labels, [float(y if fit else 1 - y) for y in labels])
    own = bench(made, named)
    untuned = Condition(model, "base")
    rows = own.free_rows(untuned, own.prompts("test"))
    assert ("rubric" in {row.metric for row in rows}) is fit and "vader" in {r.metric for r in rows}
    assert {row.value for row in rows if row.metric == "rubric"} == ({3.5} if fit else set())
    assert all(row.text for row in rows if row.metric in ("rubric", "vader"))
    kept = own.judge_rows(untuned)
    found = {name: [r.value for r in kept if r.template == name] for name in ("vader", "rubric")}
    assert found["rubric"] == named.scores and len(found["vader"]) == len(texts)


def test_more_prompts_may_be_scored_than_are_answered(made):
    rows = bench(made, None, eval__answered=1).behavior_rows(Condition(made[1], "base"), "test")
    of = {m: len([row for row in rows if row.metric == m]) for m in ("logodds", "vader")}
    assert of == {"logodds": len(made[2].select("test", "free")), "vader": 1}


def test_a_study_cannot_be_decided_by_a_weak_judge(made, monkeypatch):
    monkeypatch.setattr(probe, "train", lambda *_: lambda texts: [0.0] * len(texts))
    assert not asked(made, eval__judge="probe").fit
    with pytest.raises(ValueError, match=r"study\.primary: got probe:free .*AUROC.* is 0\.50"):
        asked(made, eval__judge="probe", study__primary="probe:free")


def test_a_few_scores_may_be_missing_in_a_choice_but_not_many(made):
    own = bench(made, None, eval__judge="probe", study__primary="probe:free")
    item = made[2].select("val", "free")[0]
    labels = own.labels(Condition(made[1], "base"))

    def effect(*values):
        row = functools.partial(judging_row, item, labels)
        return own.effect([row(value) for value in values])

    assert effect(1.0, 2.0, 3.0, 4.0, math.nan) == 2.5
    assert math.isnan(effect(1.0, 2.0, math.nan))


def judging_row(item, labels, value):
    from reptune_jax.evals.results import Row

    return Row.of(item, labels, metric="probe", value=value)


def test_an_endpoint_judges_through_the_config(made, tmp_path, monkeypatch):
    monkeypatch.delenv("REPTUNE_JUDGE_KEY", raising=False)

    def kind(body, _):
        return said("5" if "It is good." in body["messages"][0]["content"] else "1")

    _, model, behavior, _ = made
    with serving(kind) as served:
        c = settings(made, eval__judge=f"openai:m@{served.url}", eval__rubric="It is kind.")
        found = judging.named(c, Study(tmp_path), model, behavior)
    assert found.auroc.estimate == 1 and set(found.scores) == {1.0, 5.0}
    assert len(served.asked) == len(found.texts) == 8
    assert len((tmp_path / "judge.jsonl").read_text().splitlines()) == 8


# ---------------------------------------------------------------- in the report


@pytest.mark.parametrize("used", [True, False])
def test_the_report_says_what_each_judge_is_worth(tmp_path, used):
    read = study.read(synthetic_study(tmp_path, items=6, seeds=(0,), arms=("dual",)))
    rows, config = read.rows, dict(read.config)
    config["config"] = {**config.get("config", {}), "eval": {"judge": "chat:/home/me/big.gguf"}}
    weak = rows[rows.metric == "judge"].assign(template="rubric", value=0.0)
    more = [rows[rows.metric == "vader"].assign(metric="rubric")] if used else []
    rows = study.pd.concat([rows, weak, *more], ignore_index=True)
    lines = about.limitations(study.dataclasses.replace(read, rows=rows, config=config))
    first, second = (line for line in lines if line.startswith("The judge"))
    assert "VADER" in first and "AUROC" in first and "weak" not in first
    assert second.startswith("The judge (Rubric score of generated answers, chat:big.gguf)")
    assert "0.500" in second and "too weak to be evidence" in second
    assert ("judged nothing" in second) is not used
