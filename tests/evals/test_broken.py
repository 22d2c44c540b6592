"""A model that is broken is said to be inferior in every suite, one that knows all is not."""

import dataclasses
import hashlib
import re

import jax
import numpy as np
import pandas as pd
import pytest

from reptune_jax import lm
from reptune_jax.config import SUITES
from reptune_jax.evals import capability, results, scoring
from reptune_jax.evals.arms import Condition
from reptune_jax.evals.capability import Planned
from reptune_jax.evals.suites import shared, tasks, verdicts
from reptune_jax.lm import Model
from reptune_jax.report import study, tables
from reptune_jax.report.study import Setting
from tests.support import suites, tiny, tiny_behavior

MARGIN = 0.03
TESTS = {*SUITES} - {"truthfulqa"} | {f"truthfulqa_mc{i}" for i in range(3)}


class Planted(Model):
    """A model that has a log-probability for every text, and an answer to every question."""

    def score_ids(self, ids, starts, *_):
        both = ((self._text(i[:s]), self._text(i[s:])) for i, s in zip(ids, starts, strict=True))
        return [(self.logp(*pair), False) for pair in both]

    def next_logp(self, prompts, candidates_IxC, *_, missing):
        each = zip(prompts, candidates_IxC, strict=True)
        return np.array([[self.logp(self._text(p), self._text([t])) for t in of] for p, of in each])

    def generate_each(self, prompts, *_, missing):
        answers = [self.answer(self._text(prompt)) for prompt in prompts]
        ids = (self.tokenizer.encode(answer, add_special_tokens=False) for answer in answers)
        return [[*of, tiny.END_ID] for of in ids]

    def _text(self, ids):
        return self.tokenizer.decode(ids)


class Knowing(Planted):
    """By what the rows' author says is right."""

    def logp(self, before, after):
        right = next(known for asked, known in suites.RIGHT.items() if asked in before)
        return -1.0 if re.sub(r" \(\d+\)$", "", after.strip()) in right else -50.0

    def answer(self, prompt):
        if asked := re.search(r"What is (.*)\? Answer with the number", prompt):
            return str(eval(asked[1]))
        if suites.GSM8K["question"] in prompt:
            return suites.GSM8K["answer"].split()[-1]
        orders = {form: order.partition("{}") for form, (order, _) in tasks._FORMS.items()}
        fits = (f for f, (start, _, end) in orders.items() if start in prompt and end in prompt)
        return suites.FORMS[next(fits)][0]


class Noise(Planted):
    """Says anything, and the same words to all."""

    def logp(self, before, after):
        drawn = int(hashlib.sha256(f"{before}|{after}".encode()).hexdigest()[:8], 16)
        return -1 - 50 * drawn / 16**8

    def answer(self, prompt):
        return "the the the"


class Mute(Planted):
    """Prefers nothing, and says nothing."""

    def logp(self, before, after):
        return -10.0

    def answer(self, prompt):
        return ""


def as_a(kind, model):
    return kind(**{f.name: getattr(model, f.name) for f in dataclasses.fields(model)})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return lm.load(str(tiny.make_llama(tmp_path_factory.mktemp("model"))), "float32")


def test_a_broken_model_is_inferior_in_every_suite(model, tmp_path, monkeypatch):
    """The program, the readers, scores and verdicts are the real ones, on 30 items of each."""
    monkeypatch.setattr(shared, "_LEAST", 10**6)  # no choices beside each other: whole rows
    data = str(suites.write(tmp_path / "data", times=30))
    c = tiny_behavior.settings(model.files, tiny_behavior.write(tmp_path), suites__data=data)
    c.suites.names, c.suites.limit, c.suites.margin = SUITES, 30, MARGIN
    arms = {"base": (Knowing, 0), "dual": (Noise, 1), "token": (Mute, 1), "random": (Knowing, 1)}
    planned = [
        Planned(arm, lambda base, arm=arm, kind=kind, sign=sign: Condition(
            as_a(kind, base), arm, sign, 0))
        for arm, (kind, sign) in arms.items()
    ]  # fmt: skip
    monkeypatch.setattr(capability, "conditions", lambda *_: planned)
    paths = capability.run(c, tmp_path / "study", model)
    rows = pd.concat(map(results.read, paths), ignore_index=True)
    found = verdicts.frame(rows, MARGIN)
    assert {*found.test} == TESTS
    at = found.set_index(["test", "arm"])
    for test in TESTS:
        base, noise, mute, same = (at.loc[test, arm] for arm in arms)
        assert base.acc.estimate == pytest.approx(1, abs=1e-6) and base.missing == 0
        assert (noise.verdict, mute.verdict) == (verdicts.INFERIOR,) * 2, test
        # As good as the base: what 30 items cannot show is not said, what they can is.
        assert same.verdict == (verdicts.UNDECIDED if same["items"] < 125 else verdicts.RETAINED)
        assert same.change.estimate == 0 < same["items"]
    wide = verdicts.frame(rows, 0.2).set_index(["test", "arm"]).verdict
    assert {wide[test, "random"] for test in TESTS} == {verdicts.RETAINED}
    # In which order items were asked is no part of any of it.
    mixed = rows.sample(frac=1, random_state=0)
    again = verdicts.frame(mixed, MARGIN).set_index(["test", "arm"])
    pd.testing.assert_frame_equal(again.loc[at.index], at)


def test_a_broken_model_is_inferior_in_log_loss_and_on_the_base_s_own_answers(
    model, tmp_path, monkeypatch
):
    """By real passes over prose and chats; the same weights beside it lose nothing at all."""
    tiny_behavior.patch_neutral(monkeypatch)
    c = tiny_behavior.settings(model.files, tiny_behavior.write(tmp_path))
    noise = 30 * jax.random.normal(jax.random.key(0), model.params["final_norm"]["scale"].shape)
    broken = dataclasses.replace(model, params=model.params | {"final_norm": {"scale": noise}})
    known = scoring.references(model, "test", c.eval)
    for path, cond in {
        "results/baseline": Condition(model, "base"),
        "dual+_s0/results/tuned": Condition(broken, "dual", 1),
        "random+_s0/results/tuned": Condition(model, "random", 1),
    }.items():
        rows = scoring.retention_rows(cond, {"behavior": "b", **cond.labels}, known[::-1], 4)
        results.write_parquet(tmp_path / f"{path}.parquet", rows)
    (tmp_path / "config.json").write_text('{"config": {"model": "m"}}')
    found = tables.retention_frame(study.read(tmp_path)).set_index("setting")
    lost, same = found.loc[Setting("dual", 1)], found.loc[Setting("random", 1)]
    assert (lost.verdict, lost.own_verdict) == ("inferior", "inferior")
    assert lost.bpb.low > 0 and lost.kl.low > 0.1 and lost.top1.estimate < 0.9
    assert (same.verdict, same.own_verdict) == ("non-inferior", "non-inferior")
    assert same.kl.high < 1e-6 and same.bpb.estimate == 0 and same.top1.estimate == 1
