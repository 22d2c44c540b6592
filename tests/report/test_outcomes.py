"""What the report calls an arm: nothing that failed is praised, and what works is not doubted."""

import dataclasses
import json
from functools import partial

import numpy as np
import pytest

from reptune_jax import cards, config, depth
from reptune_jax.evals import results
from reptune_jax.evals.results import Row
from reptune_jax.report import html, markdown, outcomes, study
from reptune_jax.report.outcomes import COLLAPSED, MOVED, NO_BETTER, NO_EFFECT, WRONG_WAY, verdict
from reptune_jax.report.study import Setting
from tests.support.synthetic import synthetic_study

DUAL = Setting("dual", 1)


def knows(rng, label, order, skill=0.8):
    """Right minus wrong, for a model that can tell true from false this well."""
    return rng.normal(skill, 1)


def one_verdict(rng, label, order):
    return 3.0 if label else -3.0  # always "true"


def one_letter(rng, label, order):
    first_is_right = (order == "ab") == bool(label)
    return 3.0 if first_is_right else -3.0


def forgets(rng, label, order):
    return rng.normal(0, 0.01)


def chance(rng, label, order):
    return rng.normal(0, 3) * (1 if label else -1)  # as with permuted labels


def hardly(rng, label, order):
    return chance(rng, label, order) + 0.003


def claims_study(folder, seeds=(0,), mass=0.9, **arms):
    """A study of 30 claims in both letter orders; an arm is what it says, by seed or for all."""
    for arm, each in {"base": knows, **arms}.items():
        for seed in seeds if arm != "base" else (0,):
            says = each[seed] if isinstance(each, tuple) else each
            rng = np.random.default_rng(1)  # the same claims are as hard for every arm
            rows = [
                Row(
                    run_id="r", behavior="b", model_sha="0", arm=arm, sign=int(arm != "base"),
                    seed=seed, split="test", item_id=f"c{i}-{label:g}", cluster=f"c{i}",
                    format="claim", template="lettered", order=order, metric="logodds",
                    label=label, value=float(says(rng, label, order)),
                    mass=mass if arm == "dual" else 0.9,
                )
                for i in range(30) for label in (0.0, 1.0) for order in ("ab", "ba")
            ]  # fmt: skip
            path = "results/baseline.parquet"
            path = path if arm == "base" else f"{arm}+_s{seed}/results/tuned.parquet"
            results.write_parquet(folder / path, rows)
    declared = {"model": "m", "study": {"primary": "logodds:claim"}}
    (folder / "config.json").write_text(json.dumps({"config": declared}))
    return study.read(folder)


better, worse, same = (partial(knows, skill=skill) for skill in (2.0, 0.5, 0.8))


@pytest.mark.parametrize(
    ("arms", "word", "why"),
    [
        ({"dual": better}, MOVED, "against base"),
        ({"dual": better, "random": same}, MOVED, "further than random +"),
        ({"dual": better, "random": better}, NO_BETTER, "further than random +"),  # no vector in it
        ({"dual": same}, NO_EFFECT, "+0.000 [+0.000, +0.000]"),  # the identical model
        ({"dual": worse}, WRONG_WAY, "−0.300"),
        ({"base": chance, "dual": hardly}, NO_EFFECT, "no better than chance, AUROC 0."),
        ({"base": chance, "dual": better}, MOVED, "against base"),
        ({"dual": one_verdict}, COLLAPSED, "one answer"),
        ({"dual": one_letter}, COLLAPSED, "one answer"),
        ({"dual": forgets}, COLLAPSED, "log-odds are"),
        ({"dual": chance}, COLLAPSED, "tells true from false no longer"),
        ({"dual": better, "mass": 0.1}, COLLAPSED, "10.0 % of probability on the answers"),
        ({"dual": (better, better, chance), "seeds": (0, 1, 2)}, COLLAPSED, "1 of 3 seeds: tells"),
    ],
)  # fmt: skip
def test_an_arm_is_called_what_it_is(tmp_path, arms, word, why):
    read = claims_study(tmp_path, **arms)
    found = outcomes.outcomes(read)[DUAL]
    assert found.word == word and why in found.why


def test_the_first_line_says_against_what_at_what_cost_on_how_much_evidence(tmp_path):
    read = claims_study(tmp_path, dual=better, token=same)
    first = outcomes.headline(read)[0]
    assert first.startswith(f"dual +: {MOVED}; by Log-odds, claims (nats): ")
    for part in ("token +: dual ahead", "cost not measured", "60 test items in 30 clusters"):
        assert part in first
    assert markdown.render(read).startswith(f"- {first}")


def test_between_collapsed_arms_nobody_is_ahead(tmp_path):
    read = claims_study(tmp_path, dual=one_verdict, token=forgets, random=better)
    frame = outcomes.family_frame(read, read.primary)
    said = {r.rival.arm: r.verdict for r in frame.itertuples()}
    assert said == {"base": "dual collapsed", "token": "both collapsed", "random": "dual collapsed"}
    page = html.write(read).read_text()
    assert "ahead</span>" not in page and '<span class="bad">collapsed</span>' in page
    first = page.index('dual +: <span class="bad">collapsed</span>')
    assert first < page.index("<nav>")  # in the first screen


@pytest.mark.parametrize(
    ("estimate", "p", "dual", "rival", "said"),
    [
        (1, 0.01, MOVED, MOVED, "dual ahead"),
        (1, 0.01, NO_BETTER, MOVED, "dual ahead"),
        (1, 0.01, WRONG_WAY, WRONG_WAY, "dual: moved the wrong way"),
        (1, 0.01, NO_EFFECT, WRONG_WAY, "dual: no effect shown"),
        (1, 0.2, MOVED, MOVED, "no difference shown"),
        (-1, 0.01, MOVED, MOVED, "dual behind"),
        (-1, 0.01, MOVED, COLLAPSED, "rival collapsed"),
        (1, 0.01, MOVED, COLLAPSED, "rival collapsed"),
        (1, 0.01, COLLAPSED, COLLAPSED, "both collapsed"),
    ],
)
def test_a_comparison_is_not_won_by_who_failed(estimate, p, dual, rival, said):
    found = outcomes.Interval(estimate, estimate - 0.1, estimate + 0.1)
    assert verdict(found, p, dual, rival) == said


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"text": " "}, "100.0 % of the answers are empty, 0.0 % untuned"),
        ({"rep4": 0.9}, "90.0 % of 4-token runs repeat, 1.0 % untuned"),
        ({"missing": True}, "8 of 8 values of vader are not finite"),
    ],
)
def test_text_that_is_none_has_collapsed(tmp_path, change, why):
    folder = synthetic_study(tmp_path, items=8, seeds=(0,), arms=("dual",))
    path = folder / "dual+_s0/results/tuned.parquet"
    rows = [Row(**r) for r in results.pq.read_table(path).to_pylist()]

    def changed(row):
        if "text" in change and row.text:
            return dataclasses.replace(row, text=change["text"])
        if "rep4" in change and row.metric == "rep4":
            return dataclasses.replace(row, value=change["rep4"])
        if "missing" in change and row.metric == "vader":
            return dataclasses.replace(row, value=np.nan)
        return row

    results.write_parquet(path, [changed(row) for row in rows])
    read = study.read(folder, primary="logodds:free")
    found = outcomes.outcomes(read)
    assert found[DUAL].word == COLLAPSED and why in found[DUAL].why
    assert found[Setting("dual", -1)].word == MOVED
    c = config.default()
    depth.settle(c, lambda: 30)
    assert f"| outcome | collapsed ({why}" in cards.study_card(c, read)
