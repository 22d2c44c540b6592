"""Readers, scores and verdicts of the suites, on made-up rows and numbers worked out by hand."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from reptune_jax import config
from reptune_jax.evals.suites import readers, scoring, tasks, verdicts
from reptune_jax.evals.suites.readers import Question
from tests.support import suites

DATA = os.environ.get("REPTUNE_SUITES")  # a folder with the real files
COUNTS = {
    "truthfulqa": 3 * 817,
    "arc_easy": 570,
    "arc_challenge": 299,
    "hellaswag": 2000,
    "piqa": 1838,
    "winogrande": 1267,
    "openbookqa": 500,
    "bbh": 24 * 250 - (250 - 187) - (250 - 146) - (250 - 178) - 3,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(suites.write(tmp_path_factory.mktemp("suites"), times=3))


# ---------------------------------------------------------------- readers


SNOW = ("snow", "sand", "salt", "soup")
MMLU = """The following are multiple choice questions (with answers) about high school physics.

What falls?
A. apples
B. moods
C. hints
D. songs
Answer:"""
BAKING = "Baking: How to bake. Mix the dough. She"


@pytest.mark.parametrize(
    ("name", "context", "choices", "gold"),
    [
        ("arc_easy", "Question: What is white?\nAnswer:", SNOW, 2),
        ("arc_challenge", "Question: What melts?\nAnswer:", SNOW, 0),
        ("openbookqa", "Ice is frozen", SNOW, 3),
        ("piqa", "Question: cut bread\nAnswer:", ("use a spoon", "use a knife"), 1),
        ("hellaswag", BAKING, (" bakes it.", "sings.", "swims.", "flies away."), 0),
        ("mmlu", MMLU, ("A", "B", "C", "D"), 0),
    ],
)
def test_a_row_is_worded_as_the_harness_words_it(folder, name, context, choices, gold):
    first = readers.read(name, folder)[0]
    assert set(first.contexts) == {context} and len(first.contexts) == len(choices)
    assert (first.test, first.choices, first.gold) == (name, choices, frozenset([gold]))
    assert first.id == f"{name}-0"


def test_winogrande_scores_what_follows_either_name(folder):
    first = readers.read("winogrande", folder)[0]
    before = "The cup did not fit the box as the "
    assert first.contexts == (before + "cup", before + "box")
    assert first.choices == ("was too large.",) * 2 and first.gold == {0}


@pytest.mark.parametrize("hub", [False, True])
def test_truthfulqa_is_three_tests_of_one_row(folder, hub):
    row = suites.ROWS["truthfulqa/mc_task.json"]
    if hub:  # which has two lists
        as_lists = {
            k: {"choices": [*v], "labels": [*v.values()]} for k, v in row.items() if "mc" in k
        }
        mc0, mc1, mc2 = readers.READERS["truthfulqa"].ask({**row, **as_lists})
    else:
        mc0, mc1, mc2 = readers.read("truthfulqa", folder)[:3]
    assert set(mc0.contexts + mc1.contexts + mc2.contexts) == {"Q: What is rain made of?\nA:"}
    assert mc0.choices == ("Rain is water.", "Rain is milk.") and mc0.gold == {0}
    assert mc1.choices == (*mc0.choices, "Rain is glass.") and mc1.gold == {0}
    assert set(mc2.choices) == {*mc1.choices, "Water."}
    assert {mc2.choices[i] for i in mc2.gold} == {"Rain is water.", "Water."}


def test_bbh_has_the_choices_that_its_rows_list_or_are_known(folder):
    found = {q.id.split("-")[1]: q for q in readers.read("bbh", folder)}
    assert {*found} == {*readers._BBH_PARTS} - {"movie_recommendation"}  # whose target is no choice
    assert {q.test for q in found.values()} == {"bbh"} and len(found) == 23
    letters, words = found["snarks"], found["navigate"]
    assert letters.contexts[0] == "Q: Which?\nOptions:\n(A) this\n(B) that\nA:"
    assert (letters.choices, letters.gold) == (("(A)", "(B)"), {1})
    assert (words.choices, words.gold) == (("Yes", "No"), {1})
    counted = found["object_counting"]
    assert len(counted.choices) == 19 and counted.gold == {0}
    few = readers.read("bbh", folder, 7)
    assert len({q.id for q in few}) <= 7 and few == readers.read("bbh", folder, 7)


def test_a_limit_draws_the_same_rows_each_time(tmp_path):
    data = str(suites.write(tmp_path, times=20))
    drawn = [q.id for q in readers.read("piqa", data, 5)]
    assert drawn == [q.id for q in readers.read("piqa", data, 5)] and len(set(drawn)) == 5
    assert set(drawn) < {q.id for q in readers.read("piqa", data)}
    assert drawn != [f"piqa-{i}" for i in range(5)]  # the first of MMLU are one subject


def test_missing_and_foreign_files_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match=r"suites\.data .*got none for mmlu, expected one"):
        readers.read("mmlu", str(tmp_path))
    (tmp_path / "piqa.jsonl").write_text('{"goal": "g", "sol1": "a", "label": 0}\n')
    with pytest.raises(ValueError, match=r"piqa\.jsonl.*'sol2'.*Row 0"):
        readers.read("piqa", str(tmp_path))
    (tmp_path / "piqa.jsonl").write_text('{"goal": "g", "sol1": "a", "sol2": "b", "label": 2}\n')
    with pytest.raises(ValueError, match=r"no right choice of piqa.*Row 0"):
        readers.read("piqa", str(tmp_path))


def test_every_suite_of_the_config_has_a_reader():
    assert {*readers.READERS, *tasks.TASKS} == {*config.SUITES}


@pytest.mark.skipif(not (DATA and Path(DATA).is_dir()), reason="no REPTUNE_SUITES")
@pytest.mark.parametrize("name", COUNTS)
def test_the_real_files_are_read(name):
    assert len(readers.read(name, str(DATA))) == COUNTS[name]


# ---------------------------------------------------------------- scores


def asked(test, gold, *choices):
    return Question(test, ("",) * len(choices), choices, frozenset(gold), "i")


@pytest.mark.parametrize(
    ("gold", "others", "expected"),
    [(-1.0, [-2.0], 1.0), (-2.0, [-3.0, -1.0], 0.0), (-1.0, [-1.0], 0.0), (0.0, [-9, -9.0], 1.0)],
)
def test_the_right_choice_has_to_be_the_likeliest_and_a_tie_is_wrong(gold, others, expected):
    choices = "abc"[: 1 + len(others)]
    for test in ("truthfulqa_mc0", "truthfulqa_mc1", "mmlu"):
        found = scoring.values(asked(test, [0], *choices), np.array([gold, *others]))
        assert found["acc"] == expected and found["chance"] == 1 / len(choices)


def test_mc2_is_the_share_of_the_true_answers_however_small_they_are():
    question = asked("truthfulqa_mc2", [0, 2], "a", "b", "c", "d")
    share = scoring.values(question, np.log([0.1, 0.2, 0.3, 0.4]))
    assert share == {"acc": pytest.approx(0.4), "chance": 0.5}
    assert scoring.values(question, np.full(4, -2000.0))["acc"] == 0.5
    far = scoring.values(question, np.array([-2000.0, -2001, -2002, -2003]))["acc"]
    near = np.exp([0.0, -1, -2, -3])
    assert far == pytest.approx((near[0] + near[2]) / near.sum())


def test_normalized_is_by_characters_without_the_space():
    question = asked("piqa", [1], "ab", "abcd")
    found = scoring.values(question, np.array([-3.0, -4.0]))  # -1.5 and -1 a character
    assert (found["acc"], found["acc_norm"]) == (0.0, 1.0)
    # With the space counted -1.0 and -1.02: the other one.
    found = scoring.values(question, np.array([-3.0, -5.1]))
    assert found["acc_norm"] == 1.0


def test_what_is_not_finite_is_missing():
    found = scoring.values(asked("piqa", [1], "a", "b"), np.array([np.nan, -4.0]))
    assert np.isnan(found["acc"]) and np.isnan(found["acc_norm"]) and found["chance"] == 0.5


# ---------------------------------------------------------------- verdicts


def table_of(base, arm, test="piqa", chance=0.5, metric="acc"):
    """Rows of two conditions on the same items."""
    rows = []
    for name, sign, values in (("base", 0, base), ("dual", 1, arm)):
        for i, value in enumerate(values):
            about = {"arm": name, "sign": sign, "seed": 0, "k": 0.0, "layer": -1, "split": "suites"}
            about |= {"template": test, "item_id": f"i{i}"}
            rows += [{**about, "metric": metric, "value": value}]
            rows += [{**about, "metric": "chance", "value": chance}]
    return pd.DataFrame(rows)


def verdict(base, arm, margin=0.03, **more):
    found = verdicts.frame(table_of(base, arm, **more), margin).set_index("arm")
    return found.loc["dual"]


KNOWS = np.arange(400) % 4 > 0  # .75


def test_an_identical_model_is_retained_where_there_are_items_enough():
    same = verdict(KNOWS * 1.0, KNOWS * 1.0)
    assert (same.change.estimate, same.verdict) == (0.0, "retained")
    z2 = 1.96**2  # the score interval of pairs that all agree
    assert same.change.high == -same.change.low == pytest.approx(z2 / (400 + z2))
    few = verdict(KNOWS[:40] * 1.0, KNOWS[:40] * 1.0)
    assert (few.change.estimate, few.verdict) == (0.0, "undecided")


def test_a_lost_skill_is_inferior_and_a_small_loss_undecided():
    rng = np.random.default_rng(0)
    lost = verdict(KNOWS * 1.0, rng.integers(0, 2, 400) * 1.0)
    assert lost.verdict == "inferior" and lost.change.high < -0.03
    slightly = KNOWS & (np.arange(400) % 25 != 1)
    assert verdict(KNOWS * 1.0, slightly * 1.0).verdict == "undecided"
    assert verdict(KNOWS * 1.0, slightly * 1.0, margin=0.1).verdict == "retained"


def test_a_base_at_chance_says_nothing_of_anyone():
    guesses = (np.arange(400) % 2 == 0) * 1.0
    for arm in (guesses, guesses * 0, guesses * 0 + 1):
        assert verdict(guesses, arm).verdict == "uninformative"
    assert verdict(guesses, guesses, chance=0.25).verdict == "retained"


def test_what_is_missing_is_not_retained():
    arm = np.where(np.arange(400) < 5, np.nan, KNOWS)
    found = verdict(KNOWS * 1.0, arm)
    assert (found.missing, found.change.estimate, found.verdict) == (5, 0.0, "undecided")


def test_the_number_of_a_suite_is_the_one_it_is_known_by():
    both = [table_of([1.0] * 9, [1.0] * 9, "hellaswag", metric=m) for m in ("acc", "acc_norm")]
    found = verdicts.frame(pd.concat(both), 0.03)
    assert set(found.metric) == {"acc_norm"} and found["items"].tolist() == [9, 9]
