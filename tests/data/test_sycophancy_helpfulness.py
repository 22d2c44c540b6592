"""Sycophancy and helpfulness: what their data cards promise, computed from the shipped files."""

import collections
import runpy
import statistics

import pytest

from reptune_jax import study
from reptune_jax.command_line import find_config
from reptune_jax.data import behavior, schema
from reptune_jax.evals.stats import auroc

NAMES = ("sycophancy", "helpfulness")
COUNTS = {  # (prompts, clusters) of each split
    "sycophancy": {
        "train": (52, 26), "tune": (80, 40), "val": (32, 16), "test": (404, 202), "ood": (42, 21),
    },
    "helpfulness": {
        "train": (52, 52), "tune": (76, 76), "val": (32, 32), "test": (202, 202), "ood": (41, 41),
    },
}  # fmt: skip


def free(name, split):
    return behavior.load(name).select(split, "free")


@pytest.mark.parametrize("name", NAMES)
def test_counts(name):
    found = {}
    for split in schema.SPLITS:
        items = free(name, split)
        found[split] = (len(items), len({i.cluster for i in items}))
    assert found == COUNTS[name]


@pytest.mark.parametrize("split", schema.SPLITS)
@pytest.mark.parametrize("name", NAMES)
def test_length_does_not_tell_pos_from_neg(name, split):
    items = free(name, split)
    for size in (len, lambda text: len(text.split())):
        pos, neg = [size(i.pos) for i in items], [size(i.neg) for i in items]
        assert statistics.mean(pos) == pytest.approx(statistics.mean(neg), rel=0.05)
    lengths = [len(i.pos) for i in items] + [len(i.neg) for i in items]
    assert abs(auroc(lengths, [1] * len(items) + [0] * len(items)) - 0.5) < 0.05


@pytest.mark.parametrize("split", schema.SPLITS)
def test_twins_assert_opposites_and_exchange_their_reasons(split):
    clusters = collections.defaultdict(dict)
    for i in free("sycophancy", split):
        clusters[i.cluster][i.tag("side")] = i
    right = 0
    for both in clusters.values():
        x, other = both["x"], both["not-x"]
        assert x.tag("ask") == other.tag("ask")
        # The reason of one's agreement is that of the other's dissent: no stance is always pos.
        for agrees, dissents in ((x.pos, other.neg), (other.pos, x.neg)):
            assert agrees.split()[-3:] == dissents.split()[-3:]
        opinions = x.tag("opinion"), other.tag("opinion")
        assert opinions in (("right", "wrong"), ("taste", "taste"), ("work", "work"))
        right += opinions[0] == "right"
    assert right == {"ood": 0}.get(split, len(clusters) // 2 - 2 * (split == "test"))


@pytest.mark.parametrize("split", schema.SPLITS)
def test_yes_and_no_agree_equally_often(split):
    items = free("sycophancy", split)
    starts = {side: collections.Counter() for side in ("pos", "neg")}
    for i in items:
        words = {side: getattr(i, side).split()[0].strip(",") for side in starts}
        expected = {"yes": ("Yes", "No"), "no": ("No", "Yes")}.get(i.tag("ask"))
        if expected:
            assert (words["pos"], words["neg"]) == expected
        else:
            assert not {"Yes", "No"} & set(words.values())
        for side, word in words.items():
            starts[side][word] += 1
    assert starts["pos"]["Yes"] == starts["neg"]["No"] >= len(items) * 0.3
    assert abs(starts["pos"]["Yes"] - starts["pos"]["No"]) <= 2


@pytest.mark.parametrize("name", NAMES)
def test_no_prompt_and_no_pair_of_answers_stands_twice(name):
    items = behavior.load(name).select(format="free")
    prompts = collections.Counter(i.text for i in items)
    assert max(prompts.values()) == 1
    pairs = collections.Counter((i.pos, i.neg) for i in items)
    assert max(pairs.values()) == 1


@pytest.mark.parametrize(
    ("name", "primary", "message"),
    [
        ("sycophancy", "logodds:free", "model: 'no/such-model'"),  # the first thing that is wrong
        ("sycophancy", "assent:free", "model: 'no/such-model'"),
        ("helpfulness", "helped:free", "model: 'no/such-model'"),
        ("helpfulness", "vader:free", "study.primary: got 'vader:free'.*logodds:free, helped:free"),
    ],
)
def test_the_config_of_sentiment_takes_them(tmp_path, name, primary, message):
    c = runpy.run_path(find_config("sentiment"))["get_config"]()
    c.model, c.behavior, c.study.primary = "no/such-model", name, primary
    with pytest.raises(ValueError, match=message):
        study.run(c, tmp_path / "study")
