"""Data of other tools: what is recognised, what is made of it, and what is refused."""

import collections
import json
import os
from pathlib import Path

import pandas as pd
import pytest

from reptune_jax.data import adopt, behavior, foreign, rows, schema
from reptune_jax.data.foreign import Given

DATA = Path(os.environ.get("REPTUNE_SUITES") or "/nowhere")  # a folder with the real files
ASKED = "Would you rather rest?\n\nChoices:\n (A) Yes, now\n (B) No"
CAA = {"question": ASKED, "answer_matching_behavior": "(B)", "answer_not_matching_behavior": "(A)"}


def user(text):
    return ({"role": "user", "content": text},)


def file(folder, name, content):
    path = folder / name
    if path.suffix in (".csv", ".tsv"):
        pd.DataFrame(content).to_csv(path, index=False, sep="," if name.endswith("csv") else "\t")
    elif path.suffix == ".parquet":
        pd.DataFrame(content).to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    else:
        path.write_text(json.dumps(content))
    return path


def turns(question, answer):
    return [*user(question), {"role": "assistant", "content": answer}]


# rows -> (format, what is made of them)
PAIR_FILES = {
    "caa.json": ([CAA], "CAA's A/B items, Anthropic's evals", Given(user(ASKED), "(B)", "(A)")),
    "evals.jsonl": (
        [{"question": "Q?", "statement": "S", "label_confidence": 0.9,
          "answer_matching_behavior": " Yes", "answer_not_matching_behavior": " No"}],
        "CAA's A/B items, Anthropic's evals", Given(user("Q?"), " Yes", " No"),
    ),
    "tqa.json": ([{"prompt": "P", "correct": "(A)", "incorrect": "(B)", "category": "c"}],
                 "CAA's TruthfulQA", Given(user("P"), "(A)", "(B)")),
    "easyedit.json": ([{"prompt": "P", "matching": "m", "not_matching": "n"}],
                      "EasyEdit2", Given(user("P"), "m", "n")),
    "steereval.jsonl": ([{"question": "P", "matching": "m", "not_matching": "n"}],
                        "SteerEval", Given(user("P"), "m", "n")),
    "dpo.parquet": ([{"prompt": "P", "chosen": "c", "rejected": "r"}],
                    "preferences", Given(user("P"), "c", "r")),
    "hh.jsonl": ([{"chosen": turns("Q", "c"), "rejected": turns("Q", "r")}],
                 "preferences as dialogues", Given(user("Q"), "c", "r")),
    "repeng.json": ([{"positive": "I am glad", "negative": "I am sad"}],
                    "repeng", Given((), "I am glad", "I am sad")),
    "sv.json": ([{"positive_str": "yes sir", "negative_str": "no sir",
                  "read_positive_token_index": -1}],
                "steering-vectors", Given((), "yes sir", "no sir")),
    "tuples.json": ([["glad", "sad"], ["up", "down"]],
                    "pairs as lists of two", Given((), "glad", "sad")),
    "named.csv?prompt=ask&positive=good&negative=bad": (
        [{"ask": "P", "good": "g", "bad": "b"}], "those named", Given(user("P"), "g", "b")),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIR_FILES)
def test_a_format_is_recognised_by_its_columns(name, tmp_path):
    content, whose, expected = PAIR_FILES[name]
    file(tmp_path, name.partition("?")[0], content)
    found = foreign.read(f"{tmp_path}/{name}")
    assert found.format == whose and found.given[0] == expected
    assert len(found.given) == len(content) and not found.claims and not found.personas


@pytest.mark.parametrize("name", ["facts.csv", "facts.tsv", "facts.jsonl", "facts.parquet"])
def test_statements_with_labels_are_claims(name, tmp_path):
    content = [{"statement": "Snow is cold.", "label": 1}, {"statement": "It, is hot.", "label": 0}]
    found = foreign.read(file(tmp_path, name, content))
    assert found.claims == (("Snow is cold.", 1), ("It, is hot.", 0)) and not found.given


def test_personas_with_questions(tmp_path):
    trait = {
        "instruction": [{"pos": "Be evil.", "neg": "Be kind."}],
        "questions": ["Why?", "How?"],
        "eval_prompt": "…",
    }
    found = foreign.read(file(tmp_path, "evil.json", trait))
    assert found.personas == (("Be evil.", "Be kind."),) and found.questions == ("Why?", "How?")
    items = adopt.asked(found)
    assert [i.format for i in items] == ["persona"] * 2 + ["free"] * 2
    assert [(i.label, i.text) for i in items[:2]] == [(1, "Be evil."), (0, "Be kind.")]
    with pytest.raises(ValueError, match=r"behavior evil: got personas and questions.*vector\.dat"):
        behavior.load(tmp_path / "evil.json")


def test_a_limit_takes_the_first_rows(tmp_path):
    path = file(tmp_path, "t.csv", [{"statement": f"s{i}", "label": i % 2} for i in range(9)])
    assert [text for text, _ in foreign.read(f"{path}?limit=3").claims] == ["s0", "s1", "s2"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", [{"x": "1", "y": "2"}], "got columns x, y; expected those of one of these: CAA"),
        ("a.json", {"a": 1}, "got one JSON object with a, expected a list of rows"),
        ("a.json", [], "got no rows"),
        ("a.json", ["text"], "got 'text' as its first row, expected those"),
        ("a.json", [CAA, CAA | {"question": 3}], "row 1, from 0: got question: 3, not a string"),
        ("a.json", [CAA, {"question": "q"}], "row 1, from 0: got no 'answer_matching_behavior'"),
        ("a.json", [{"statement": "s", "label": "maybe"}], "row 0.*'maybe', not 0, 1, true or fal"),
        ("a.json?positive=a", [{"a": "1"}], "got columns for positive, expected positive and neg"),
        ("a.json?positive=ab&negative=b", [{"aa": "1", "b": "2"}], "positive=ab.* Did you mean 'b"),
        ("a.json?positiv=a", [{"a": "1"}], "option: got 'positiv'.* Did you mean 'positive'"),
        ("a.json?limit=few", [CAA], "got limit='few', expected a number of rows"),
        (
            "a.json",
            {"instruction": [{"pos": "p"}], "questions": ["q"]},
            "got instruction.*pos and n",
        ),
        ("a.json", {"instruction": [{"pos": "p", "neg": "n"}], "questions": []}, "got questions"),
    ],
)
def test_what_is_not_understood_is_named(name, content, message, tmp_path):
    file(tmp_path, name.partition("?")[0], content)
    with pytest.raises(ValueError, match=message) as error:
        foreign.read(f"{tmp_path}/{name}")
    assert "\n" not in str(error.value) and "a.json" in str(error.value)


def test_files_that_are_not_there_or_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.csv: not a file"):
        foreign.read(tmp_path / "gone.csv")
    with pytest.raises(ValueError, match=r"got the ending '\.txt', expected one of \.json"):
        foreign.read(tmp_path / "a.txt")
    (tmp_path / "cut.json").write_text('[{"question": ')
    with pytest.raises(ValueError, match=r"cut\.json: "):
        foreign.read(tmp_path / "cut.json")


def test_the_hub_is_streamed_in_the_split_and_config_that_are_named(monkeypatch):
    import datasets

    asked = {}

    def load(path, config, **how):
        asked.update(path=path, config=config, **how)
        return iter([{"a": "one", "b": "two"}] * 5)

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = foreign.read("hub:org/set?split=test&config=main&positive=a&negative=b&limit=2")
    assert asked == {"path": "org/set", "config": "main", "split": "test", "streaming": True}
    assert found.given == (Given((), "one", "two"),) * 2 and found.name == "set"


# ---------------------------------------------------------------- as a behavior


def numbered(n, **more):
    return [{**CAA, "question": f"Number {i}. {ASKED}", **more} for i in range(n)]


def test_lettered_choices_are_taken_apart(tmp_path):
    read = behavior.load(file(tmp_path, "rest.json", numbered(40)))
    assert read.name == "rest" and read.kind == "free"
    assert read.measures == ("logodds:free", "logodds:ab")
    splits = collections.Counter((i.split, i.format) for i in read.items)
    assert splits["train", "free"] == 10 and splits["tune", "free"] == 12
    assert splits["val", "free"] == splits["val", "ab"] == 4
    assert splits["test", "free"] == splits["test", "ab"] == 14
    for item in read.items:
        assert item.text.endswith("Would you rather rest?")
        assert (item.pos, item.neg) == ("No", "Yes, now")
    assert not [d for d in schema.check(read.items) if "cluster" in d or "missing" in d]


def test_the_same_prompt_is_in_one_split_and_splits_do_not_hang_on_order(tmp_path):
    content = numbered(30)
    a = behavior.load(file(tmp_path, "a.json", content + content[:9]))
    b = behavior.load(file(tmp_path, "b.json", content[::-1]))
    splits = collections.defaultdict(set)
    for item in a.items + b.items:
        splits[item.text].add(item.split)
    assert len(splits) == 30 and all(len(found) == 1 for found in splits.values())


@pytest.mark.parametrize(
    ("question", "answers", "expected"),
    [
        ("Q\n (A) x\n (B) y\n\nAnswer:", (" (A)", " (B)"), ("Q", "x", "y")),
        ("Q\n\nChoices:\n(A) x\n(B) y\n(C) z", ("(C)", "(A)"), ("Q", "z", "x")),
        ("Q\n\nChoices:\n(A) x\n(B) y", ("(C)", "(A)"), None),
        ("Is it so?", (" Yes", " No"), ("Is it so?", "Yes", "No")),
        ("Q (A) is x, (B) is y", ("(A)", "(B)"), ("Q (A) is x, (B) is y", "(A)", "(B)")),
    ],
)
def test_choices_of_every_spelling(question, answers, expected):
    found = adopt.unlettered(Given(user(question), *answers))
    if expected is None:
        expected = (question, *answers)
    assert (found.prompt[0]["content"], found.positive, found.negative) == expected


def test_claims_are_balanced_in_every_split(tmp_path):
    content = [{"statement": f"Fact number {i}.", "label": i % 2} for i in range(80)]
    read = behavior.load(file(tmp_path, "facts.csv", content))
    assert read.kind == "claim" and read.measures == ("logodds:claim",)
    counts = collections.Counter((i.split, i.label) for i in read.items)
    assert all(counts[split, 0] == counts[split, 1] > 0 for split in ("train", "tune", "val"))
    for item in read.items:
        assert (item.pos == "True") == (item.label == 1) == (item.neg == "False")


def test_a_damaged_file_of_ours_is_not_taken_for_anothers(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"id": "x", "messages": []}\n')
    assert not behavior.is_foreign(path)
    with pytest.raises(ValueError, match=r"mine\.jsonl, line 1: missing"):
        behavior.load(path)


def test_our_own_items_give_pairs_of_the_train_split():
    found = foreign.read(os.fspath(schema.find("sentiment")))
    train = behavior.load("sentiment").select("train", "free")
    assert [g.positive for g in found.given] == [i.pos for i in train]
    claims = foreign.read(os.fspath(schema.find("honesty"))).claims
    assert len(claims) == len(behavior.load("honesty").select("train", "claim"))


REAL = {
    "caa/generate__sycophancy__generate_dataset.json": ("given", 1000),
    "caa/test__refusal__test_dataset_ab.json": ("given", 50),
    "caa/test__truthfulqa__truthful_qa.json": ("given", 817),
    "anthropic_evals/persona__agreeableness.jsonl": ("given", 400),
    "anthropic_evals/human__survival-instinct.jsonl": ("given", 953),
    "repe/facts__facts_true_false.csv": ("claims", 612),
}


@pytest.mark.parametrize("name", REAL)
def test_the_real_files_are_read(name):
    if not (DATA / name).is_file():
        pytest.skip("no REPTUNE_SUITES")
    kind, count = REAL[name]
    assert len(getattr(foreign.read(DATA / name), kind)) == count
    items = behavior.load(DATA / name).items
    assert {i.split for i in items} == {"train", "tune", "val", "test"}
    if name.startswith("caa/test__refusal"):
        assert all(i.pos[0] != "(" and "(A)" not in i.text for i in items)


def test_names_say_where_rows_are(tmp_path):
    assert rows.place("hub:a/b?split=x").hub and rows.place("hub:a/b").name == "b"
    odd = tmp_path / "what?.json"
    odd.write_text("[]")
    assert rows.place(odd).path == str(odd)
