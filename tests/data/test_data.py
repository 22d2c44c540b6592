"""The shipped data keeps its promises, and the loader says what is wrong with a file."""

import collections
import json
import re

import pytest

from reptune_jax.data import behavior, schema
from reptune_jax.data.neutral import KINDS, load_neutral
from reptune_jax.data.schema import check, read_jsonl, select
from reptune_jax.hub.tokenizer import gguf_tokenizer
from tests.support import hub_models

SHIPPED = sorted(
    f.name.removesuffix(".jsonl")
    for f in schema.shipped("behaviors").iterdir()
    if f.name.endswith(".jsonl")
)
ROW = {
    "id": "x-1",
    "behavior": "x",
    "split": "test",
    "cluster": "c-1",
    "format": "claim",
    "messages": [{"role": "user", "content": "Snow is white in color."}],
    "pos": " True",
    "neg": " False",
    "label": 1,
    "tags": ["subject:weather"],
    "source": "own",
    "license": "Apache-2.0",
}


@pytest.fixture(scope="module")
def honesty():
    return behavior.load("honesty").items


@pytest.fixture(scope="module")
def claims(honesty):
    return select(honesty, format="claim")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_behavior_has_no_problems(name):
    items = behavior.load(name).items
    assert check(items) == []
    assert {i.behavior for i in items} == {name}
    assert {(i.source, i.license) for i in items} == {("own", "Apache-2.0")}


@pytest.mark.parametrize("name", SHIPPED)
def test_personas_are_matched(name):
    labels = collections.defaultdict(list)
    for persona in select(behavior.load(name).items, split="train", format="persona"):
        assert [m["role"] for m in persona.messages] == ["system"]
        labels[persona.cluster].append(persona.label)
    assert len(labels) >= 5
    assert all(sorted(found) == [0, 1] for found in labels.values())


def test_sentiment_counts():
    free = collections.Counter(
        i.split for i in select(behavior.load("sentiment").items, format="free")
    )
    for split, least in {"train": 60, "val": 40, "test": 120, "ood": 60}.items():
        assert free[split] >= least, split


def test_claims_are_whole_clusters_of_twins_and_negations(claims):
    by_id = {i.id: i for i in claims}
    clusters = collections.defaultdict(list)
    for i in claims:
        clusters[i.cluster].append(i)
        twin = by_id[i.tag("twin")]
        assert by_id[twin.tag("twin")] is i
        assert (twin.cluster, twin.tag("negated")) == (i.cluster, i.tag("negated"))
        assert twin.label == 1 - i.label
        assert (i.pos, i.neg) == ((" True", " False") if i.label else (" False", " True"))
    assert len(clusters) >= 224
    for four in clusters.values():
        kinds = sorted((i.label, i.tag("negated")) for i in four)
        assert kinds == [(0, "0"), (0, "1"), (1, "0"), (1, "1")]


def test_negations_negate_and_twins_differ_in_one_place(claims):
    negation = re.compile(r"\b(not|cannot)\b")
    by_id = {i.id: i for i in claims}
    for i in claims:
        assert bool(negation.search(i.text)) == (i.tag("negated") == "1"), i.text
        own, other = i.text.split(), by_id[i.tag("twin")].text.split()
        while own and other and own[0] == other[0]:
            own, other = own[1:], other[1:]
        while own and other and own[-1] == other[-1]:
            own, other = own[:-1], other[:-1]
        assert 1 <= len(own) <= 4 and len(other) <= 4, i.text


def test_claim_counts_and_balance(claims):
    assert len(claims) >= 896
    assert all(5 <= len(i.text.split()) <= 14 for i in claims)
    seen = [i for i in claims if i.split != "ood"]
    subjects = collections.Counter(i.tag("subject") for i in seen)
    assert len(subjects) >= 14 and min(subjects.values()) >= 16 * 4
    for split in ("train", "tune", "val", "test"):
        own = select(claims, split=split)
        assert {i.tag("subject") for i in own} == set(subjects)
        labels = collections.Counter((i.label, i.tag("negated")) for i in own)
        assert len(set(labels.values())) == 1 and len(labels) == 4
    assert len(select(claims, split="test")) >= 200


def test_ood_subjects_are_nowhere_else(claims):
    own = {i.tag("subject") for i in select(claims, split="ood")}
    assert len(own) >= 2
    assert not own & {i.tag("subject") for i in claims if i.split != "ood"}


def test_length_does_not_tell_true_from_false(claims):
    mean = {0: 0.0, 1: 0.0}
    for i in claims:
        mean[i.label] += 2 * len(i.text) / len(claims)
    assert abs(mean[0] - mean[1]) < 1  # characters


def test_scenarios(honesty):
    own = select(honesty, format="ab")
    splits = collections.Counter(i.split for i in own)
    assert splits["val"] >= 12 and splits["test"] >= 36
    assert all(i.messages[-1]["role"] == "user" and i.tag("domain") for i in own)
    longer = sum((len(i.pos) > len(i.neg)) - (len(i.pos) < len(i.neg)) for i in own)
    assert abs(longer) <= 0.1 * len(own)
    assert all(abs(len(i.pos) - len(i.neg)) <= 8 for i in own)
    for word in ("Yes", "No,"):  # a model that says yes to everything gains nothing
        tells = sum(i.pos.startswith(word) - i.neg.startswith(word) for i in own)
        assert abs(tells) <= 2, word


@pytest.mark.parametrize("kind", tuple(KINDS))
def test_neutral_texts_are_apart(kind):
    splits = ("train", "val", "test") if kind != "requests" else ("test",)
    rows = [r for split in splits for r in load_neutral(kind, split)]
    assert len({r["id"] for r in rows}) == len(rows)
    turns = [r.get("messages", [{"content": r.get("text")}]) for r in rows]
    texts = [" ".join(m["content"] for m in turn) for turn in turns]
    named = [(r["id"], r["split"], text) for r, text in zip(rows, texts, strict=True)]
    assert schema.near_duplicates(named) == []


def test_prose_is_long_enough():
    rows = [r for split in ("train", "val", "test") for r in load_neutral("prose", split)]
    assert sum(len(r["text"].split()) for r in rows) >= 8_000


# The loader.


@pytest.fixture
def write(tmp_path):
    def _write(*rows):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path = tmp_path / "mine.jsonl"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return _write


def test_loads_a_file_of_ones_own(write):
    path = write(ROW, "", {**ROW, "id": "x-2", "label": None, "pos": None, "format": "persona"})
    for given in (path, str(path)):
        first, second = behavior.load(given).items
        assert first.messages == ({"role": "user", "content": "Snow is white in color."},)
        assert (first.text, first.tag("subject")) == ("Snow is white in color.", "weather")
        assert first.tag("twin") == ""
        assert (second.pos, second.label) == ("", None)


def test_a_line_separator_inside_a_text_is_no_new_line(write):
    row = {**ROW, "messages": [{"role": "user", "content": "one\u2028two"}]}
    assert len(read_jsonl(write(json.dumps(row, ensure_ascii=False)))[1]) == 1


def broken(**changes):
    return {k: v for k, v in {**ROW, "id": "x-2", **changes}.items() if v != "drop"}


@pytest.mark.parametrize(
    "second,message",
    [
        ('{"id": "x-2",', r"malformed JSON at column 14: .*Write one object a line"),
        ("[1, 2]", "got list, expected a JSON object"),
        (broken(pos="drop", label="drop"), "missing label, pos; expected id, behavior"),
        (broken(lable=1), r"unknown lable; expected only .*Did you mean 'label'\?"),
        (broken(id=""), "id: got '', expected a string that is not empty"),
        (broken(cluster=3), "cluster: got 3, expected a string"),
        (broken(split="dev"), "split: got 'dev', expected one of train, tune, val, test, ood"),
        (broken(format="yesno"), "format: got 'yesno', expected one of persona, free, claim, ab"),
        (broken(label=True), "label: got True, expected 0, 1 or null"),
        (broken(label="1"), "label: got '1', expected 0, 1 or null"),
        (broken(pos=["True"]), r"pos: got \['True'\], expected a string or null"),
        (broken(tags="subject:x"), "tags: got 'subject:x', expected a list of strings"),
        (broken(messages=[]), r"messages: got \[\], expected a list of"),
        (broken(messages="hi"), "messages: got 'hi', expected a list of"),
        (broken(messages=[{"role": "bot", "content": "hi"}]), r"expected a list of .*system\|user"),
        (broken(messages=[{"role": "user"}]), "expected a list of"),
        (broken(id="x-1"), "id 'x-1' is already on line 1"),
        (broken(source="a\ud83d"), "half of a character"),
    ],
)
def test_wrong_lines_are_named(write, second, message):
    path = write(ROW, second)
    with pytest.raises(ValueError, match=rf"mine\.jsonl, line 2: .*{message}") as error:
        read_jsonl(path)
    assert str(path) in str(error.value)


def test_empty_missing_and_foreign_files(write, tmp_path):
    with pytest.raises(ValueError, match=r"mine\.jsonl: got an empty file"):
        read_jsonl(write("", "  "))
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl: not a file"):
        behavior.load(tmp_path / "gone.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(ROW).encode() + b"\xe9")
    with pytest.raises(ValueError, match=r"latin\.jsonl: .*expected UTF-8"):
        behavior.load(tmp_path / "latin.jsonl")


def test_unknown_names():
    with pytest.raises(ValueError, match=r"'honestly', .*honesty, .*Did you mean 'honesty'\?"):
        behavior.load("honestly")
    with pytest.raises(ValueError, match=r"expected one of .*honesty, .*or a path"):
        behavior.load("zzz")
    with pytest.raises(ValueError, match=r"kind: got 'pros'.*Did you mean 'prose'\?"):
        load_neutral("pros", "test")


def test_select(write):
    items = read_jsonl(write(ROW, broken(split="val"), broken(id="x-3", format="free")))[1]
    assert [i.id for i in select(items)] == ["x-1", "x-2", "x-3"]
    assert [i.id for i in select(items, split="test")] == ["x-1", "x-3"]
    assert [i.id for i in select(items, split="test", format="free")] == ["x-3"]
    with pytest.raises(ValueError, match=r"split: got 'tests'.*Did you mean 'test'\?"):
        select(items, split="tests")
    with pytest.raises(ValueError, match="format: got 'claims'"):
        select(items, format="claims")


# What `check` finds.


def claim(name, text, **changes):
    values = {**ROW, "id": name, "cluster": name, "messages": ({"content": text},), **changes}
    return schema.Item(**values)


GOOD = (
    claim("a", "Snow is white in color."),
    claim("b", "The Moon is made of green cheese.", label=0, pos=" False", neg=" True"),
)


@pytest.mark.parametrize(
    "more,problem",
    [
        ([claim("a", "Dogs bark."), claim("c", "Cats bark.", label=0)], "id 'a': 2 times"),
        ([claim("c", "SNOW is white, in color!")], "c: the same text as a"),
        (
            [claim("c", "Dogs often bark.", cluster="a", split="val")],
            "c: cluster 'a' is in test and val",
        ),
        (
            [claim("c", "The Moon is made of green butter.", split="val")],
            "c (val): nearly b (test), 8-gram Jaccard 0.61",  # 19 of 31
        ),
        (
            [claim("c", "Dogs often bark."), claim("d", "Some birds fly.")],
            "test: 3 true, 1 false claims, expected as many of each",
        ),
        ([claim("c", "Dogs often bark.", neg="")], "c: pos or neg is missing"),
        ([claim("c", "Dogs often bark.", neg=" True")], "c: pos and neg are the same"),
        ([claim("c", "Dogs often bark.", label=None)], "c: a claim without label"),
    ],
)
def test_check_names_problems(more, problem):
    assert check(GOOD) == []
    assert problem in check([*GOOD, *more])


def test_near_duplicates_within_a_split_are_allowed():
    twin = claim("c", "The Moon is made of green butter.")
    assert not any("nearly" in problem for problem in check([*GOOD, twin]))


def test_a_prompt_beyond_the_context_is_named_by_item_and_line(tmp_path):
    tokenizer = hub_models.tokenizer_metadata()
    long = {**ROW, "id": "x-2", "messages": [{"role": "user", "content": "q" * 300}]}
    path = tmp_path / "x.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n\n{json.dumps(long)}\n")
    found, tokenizer = behavior.load(path), gguf_tokenizer(tokenizer)
    found.check_lengths(tokenizer, 300)
    found.check_lengths(tokenizer, None)  # a config that does not say
    with pytest.raises(ValueError, match="line 3: item 'x-2' has 300 tokens, expected at most 299"):
        found.check_lengths(tokenizer, 299)


@pytest.mark.parametrize("line", ["[" * 100_000, '{"id": ' + "9" * 6000 + "}"])
def test_deep_and_long_numbers_are_refused_by_their_line(line, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n{line}\n")
    with pytest.raises(ValueError, match=r"line 2: malformed JSON: .*Write one object a line"):
        read_jsonl(path)
