"""Neutrality and creativity: what their data cards promise, computed from the shipped files."""

import collections

import pytest

from reptune_jax.data import behavior
from reptune_jax.data.schema import SPLITS, select
from reptune_jax.evals import measures

LEAST = {"train": 48, "tune": 48, "val": 32, "test": 200, "ood": 40}


def free(name, split=None):
    return select(behavior.load(name).items, split=split, format="free")


@pytest.fixture(scope="module")
def neutrality():
    return free("neutrality")


@pytest.mark.parametrize("name", ("neutrality", "creativity"))
def test_there_are_enough_prompts_and_test_clusters(name):
    items = free(name)
    counts = collections.Counter(i.split for i in items)
    assert all(counts[split] >= least for split, least in LEAST.items()), counts
    assert len({i.cluster for i in items if i.split == "test"}) >= 200
    assert all(len(i.messages) == 1 and i.messages[0]["role"] == "user" for i in items)


@pytest.mark.parametrize("name", ("neutrality", "creativity"))
@pytest.mark.parametrize("split", SPLITS)
def test_pos_and_neg_have_as_many_words(name, split):
    items = free(name, split)
    pos, neg = (sum(len(getattr(i, side).split()) for i in items) for side in ("pos", "neg"))
    assert abs(pos - neg) <= 0.05 * max(pos, neg), (pos / len(items), neg / len(items))


@pytest.mark.parametrize("split", SPLITS)
def test_pos_and_neg_of_neutrality_have_as_many_characters(neutrality, split):
    items = select(neutrality, split=split)
    pos, neg = (sum(len(getattr(i, side)) for i in items) for side in ("pos", "neg"))
    assert abs(pos - neg) <= 0.05 * max(pos, neg)


def test_each_side_is_taken_as_often_as_the_other(neutrality):
    clusters = collections.defaultdict(list)
    for i in neutrality:
        clusters[i.cluster].append(i)
    for twins in clusters.values():
        assert sorted(i.tag("side") for i in twins) == ["a", "b"]  # the swapped question, too
        assert sorted(i.tag("twin") for i in twins) == ["1", "2"]
        assert len({i.tag("stance") for i in twins}) == 1  # both agree with what they were asked
    for split in SPLITS:
        items = select(neutrality, split=split)
        for key in ("side", "stance"):
            assert len(set(collections.Counter(i.tag(key) for i in items).values())) == 1


@pytest.mark.parametrize("n", (64, 120, 206))
def test_the_first_prompts_are_of_as_many_clusters_and_of_both_sides(neutrality, n):
    first = select(neutrality, split="test")[:n]  # eval.prompts
    assert len({i.cluster for i in first}) == n
    for key, values in (("side", "ab"), ("stance", ("for", "against"))):
        assert [sum(i.tag(key) == v for i in first) for v in values] == [n / 2, n / 2]


def test_a_balanced_answer_holds_both_reasons_and_a_stance_one(neutrality):
    """The twins' stances give the two reasons: neutrality is not said, it is shown."""
    twins = collections.defaultdict(list)
    for i in neutrality:
        twins[i.cluster].append(i)
    for a, b in twins.values():
        shared = [
            {w for w in words(a.pos) & words(b.pos) if len(w) > 3} & words(x.neg) for x in (a, b)
        ]
        assert all(shared) and shared[0] != shared[1], a.cluster


def words(text):
    return {word.strip(".,;:").lower() for word in text.split()}


@pytest.mark.parametrize(
    "name,first,second",
    [
        ("neutrality", "twosided:free", "logodds:free"),
        ("creativity", "logodds:free", "vividness:free"),
    ],
)
def test_the_declared_measures_fit_the_items(name, first, second):
    found = behavior.load(name)
    assert found.measures == (first, second)
    for primary in ("", first, second):
        measures.check(found.measures, primary, {i.format for i in found.items} - {"persona"})
