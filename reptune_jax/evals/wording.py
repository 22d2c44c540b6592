"""Offline judges of how an answer is worded: of both sides or of one, in rare or in plain words."""

import functools
import re
from collections.abc import Iterator

from reptune_jax.data import schema

# Phrases that weigh, and phrases that decide; each counts once, however often it is said.
_WEIGH = (
    "on the one hand|on one hand|on (the )?one side",
    "on the other( hand| side)?|on the contrary",
    "however|nevertheless|nonetheless|then again",
    "although|even though|though",
    "while|whereas",
    "yet|still",
    "both",
    "either|neither",
    "depend(s|ing)?|var(y|ies)",
    "some( people| say| argue| find| feel| prefer| think)?",
    "others|opponents|critics|skeptics",
    "supporters|proponents|advocates|defenders",
    "many (people|feel|say|argue|think|believe)|people (weigh|disagree|differ)|different people",
    "may|might|could",
    "perhaps|maybe|possibly|sometimes|often",
    "opinions|views|viewpoints|perspectives|positions|angles",
    "sides|each side|either side|two sides",
    "differ(s|ent)?|disagree|debated|debatable|complex|controversial",
    "pros and cons|advantages?|disadvantages?|benefits?|drawbacks?|merits?|downsides?",
    "at the same time|in turn|equally|likewise",
    "balanced?|fair|weigh|reasonable|trade-?offs?",
    "hard to (say|settle|tell|decide)|no (single|simple|easy|clear|one) answer",
    "would not (pick|choose|say)|you decide|up to (you|each)|leave (it|the choice)",
    "it('s| is) (also )?(true|important)",
)
_DECIDE = (
    "no (question|doubt)|without (a )?doubt|undoubtedly|beyond (any )?(doubt|dispute)",
    "clearly|obvious(ly)?|plainly|plain to|evident(ly)?",
    "definitely|certainly|absolutely|surely|simply|totally|completely",
    "of course|full stop|period|end of story",
    "convinced|certain|firm(ly)?|strong(ly)?",
    "i (believe|say|am sure|insist|will|would never|stand|take)|i'm (sure|certain|convinced)",
    "my (view|opinion|mind)",
    "must",
    "always|never",
    "nothing|nobody|no one|none|anyone|everyone|everybody",
    "wrong|mistaken|foolish|absurd|stupid",
    "right|correct",
    "nonsense|excuses?|rubbish|pointless|ridiculous",
    "settles?|settled|proves?|decisive|the reason is|that is why|so stop",
    "best|worst|better|worse|superior",
    "no (good )?(argument|reason|excuse)|the rest|the opposite|the alternative",
    "deny|admit|defend|reject|refuse",
)
_PLAIN_ENDINGS = (
    ("s", ("",)),
    ("es", ("",)),
    ("ed", ("", "e")),
    ("ing", ("", "e")),
    ("er", ("", "e")),
    ("est", ("", "e")),
    ("ly", ("", "e")),
    ("y", ("",)),
    ("ness", ("",)),
    ("ies", ("y",)),
    ("ied", ("y",)),
    ("ily", ("y",)),
    ("ier", ("y",)),
    ("iest", ("y",)),
)
# Endings of abstract and learned words, which are rarer than plain ones and no more vivid.
_ABSTRACT = re.compile(
    r"(?:tion|sion|ment|ness|ity|itie|[ae]nce|[ae]ncy|ism|ive|ively|ical|ically|ally|ional|i[sz]e"
    r"|i[sz]ing|i[sz]ed|ology|able|ible|ably|ibly|ious|iously|ated|ating|ship|hood|ic|ics)s?$"
)
_FUNCTION_WORDS = """
a about all an and are as at be because been but by can for from had has have he her his i if in
into is it its me my no not of off on one or our out over she so than that the their them then
there they this to too until up was we were what when where which who whom whose will with would
you your
"""
_SHORTEST = 8  # words: a single rare word is not yet a vivid answer
_GRAMMAR = 0.2  # share of function words that English sentences have; lists of words have fewer
_WORD_LIKE = 0.7  # share of a word's letter triples that plain words have too


def twosided(answer: str) -> float:
    """Phrases that weigh against those that decide, in (-1, 1); 0 where there are none."""
    text = " ".join(re.findall(r"[a-z'-]+", answer.lower()))
    weigh, decide = (
        sum(re.search(rf"\b({cue})\b", text) is not None for cue in cues)
        for cues in (_WEIGH, _DECIDE)
    )
    return (weigh - decide) / (weigh + decide + 1)


def vividness(answer: str) -> float:
    """Share of words that plain English does without, in [0, 1]; each of them counts once.

    Letters that make no English word do not count, and an answer with hardly a function word, a
    list of words, counts for less: noise is not vivid.
    """
    words = re.findall(r"[a-z]+", answer.lower())
    rare = {w for w in words if len(w) > 3 and _is_rare(w)}
    binding = set(_FUNCTION_WORDS.split())
    bound = sum(w in binding for w in words) / max(len(words), 1)
    return len(rare) / max(len(words), _SHORTEST) * min(1.0, bound / _GRAMMAR)


@functools.cache
def _plain_words() -> frozenset[str]:
    return frozenset((schema.shipped("words") / "plain.txt").read_text("utf-8").split())


@functools.cache
def _plain_triples() -> frozenset[str]:
    return frozenset(triple for word in _plain_words() for triple in _triples(word))


def _is_plain(word: str) -> bool:
    return word in _plain_words() or any(
        word[: -len(end)] + restored in _plain_words()
        for end, endings in _PLAIN_ENDINGS
        if word.endswith(end)
        for restored in endings
    )


def _is_rare(word: str) -> bool:
    return not (_is_plain(word) or _ABSTRACT.search(word)) and _is_word_like(word)


def _is_word_like(word: str) -> bool:
    found = [triple in _plain_triples() for triple in _triples(word)]
    return sum(found) >= _WORD_LIKE * len(found)


def _triples(word: str) -> Iterator[str]:
    edged = f"<{word}>"
    return (edged[i : i + 3] for i in range(len(edged) - 2))
