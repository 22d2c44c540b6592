"""Judges by words: what they tell apart, and what does not fool them."""

import pytest

from reptune_jax.data import behavior
from reptune_jax.data.schema import select
from reptune_jax.evals import judges, stats, wording

BALANCED = "Some people enjoy the noise, while others need quiet. It depends on who you are."
DECIDED = "Clearly the noise is wrong. It must stop, and nobody can deny it."
VIVID = "The moon is a chipped saucer that a burglar licked and hid beneath the chimney."
WORN = "The moon is a big bright ball that shines up in the dark sky at night."


def test_weighing_is_above_deciding_and_silence_between():
    assert wording.twosided(BALANCED) > 0.5
    assert wording.twosided(DECIDED) < -0.5
    assert wording.twosided("") == wording.twosided("Trains run on rails.") == 0
    assert wording.twosided("However, must.") == 0  # one of each
    assert wording.twosided("However, it varies.") == pytest.approx(2 / 3)


def test_a_repeated_phrase_weighs_nothing_more():
    assert wording.twosided("However, " * 30) == wording.twosided("However,") == 0.5
    assert wording.twosided("must " * 30) == -0.5


def test_rare_words_are_above_plain_ones():
    assert wording.vividness(VIVID) > 0.2 > 0.05 > wording.vividness(WORN)
    assert wording.vividness("") == 0
    # burglar, walrus, chimney of 11 words; plain words stay plain with an ending
    assert wording.vividness("A burglar hid the walrus in a chimney with the cats.") == 3 / 11
    assert wording.vividness("The utilization of a fictional multiplicity is permissible.") == 0
    assert wording.vividness("She walked happily to the bigger houses and the cities.") == 0


@pytest.mark.parametrize(
    "noise",
    [
        "xqzvt bkrrg wwpql zzxcv of the qqjzk and vvbnm kjhgf in qwrtp",
        "walrus chimney burglar trapeze anvil lichen",  # a list
        "walrus " * 30,
        "the walrus of " * 20,
        "!!! ### ??? 12345 🌀🌀🌀",
    ],
)
def test_noise_is_not_vivid(noise):
    assert wording.vividness(noise) < 0.1 < wording.vividness(VIVID)


@pytest.mark.parametrize(
    "name,judge,least",
    [("neutrality", wording.twosided, 0.94), ("creativity", wording.vividness, 0.96)],
)
def test_judges_separate_the_shipped_test_answers(name, judge, least):
    """As docs/behaviors.md says of them."""
    items = select(behavior.load(name).items, split="test", format="free")
    scores = [judge(text) for i in items for text in (i.pos, i.neg)]
    found = stats.auroc(scores, [1, 0] * len(items))
    assert found >= least > judges.MIN_AUROC
