"""Offline judges of a generated continuation, a check of the judge, guards against gaming it."""

import functools
import re
from collections import Counter
from typing import Any

from numpy.typing import ArrayLike
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from reptune_jax.evals import stats

MIN_AUROC = 0.8  # below this a judge's numbers are not evidence


@functools.cache
def _analyzer() -> Any:
    return SentimentIntensityAnalyzer()


def vader(continuation: str, cap: int = 2) -> float:
    """VADER compound in [-1, 1] of the continuation alone (never with its prompt).

    A word of the sentiment lexicon counts at most `cap` times, so that "great great great" gains
    nothing; other words stay, since dropping a "not" would turn the meaning round.
    """
    return float(_analyzer().polarity_scores(cap_repeats(continuation, cap))["compound"])


def cap_repeats(text: str, cap: int = 2) -> str:
    """The text without the occurrences of each sentiment word after its first `cap`."""
    lexicon = _analyzer().lexicon
    seen: Counter[str] = Counter()
    kept = []
    for word in text.split():
        kind = word.strip(".,;:!?\"'()[]*_").lower()
        if kind in lexicon:
            seen[kind] += 1
            if seen[kind] > cap:
                continue
        kept.append(word)
    return " ".join(kept)


def judge_auroc(
    scores: ArrayLike, labels: ArrayLike, clusters: ArrayLike | None = None
) -> stats.Interval:
    """How well a judge's scores separate texts labelled 1 from 0; below `MIN_AUROC` not at all."""
    size = len(list(labels))  # type: ignore[arg-type]
    return stats.bootstrap_auroc(scores, labels, range(size) if clusters is None else clusters)


def distinct_n(text: str, n: int = 2) -> float:
    """Distinct share of the word n-grams; 1.0 when the text is shorter than n words."""
    words = re.findall(r"\w+", text.lower())
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def repetition_rate(text: str, n: int = 4) -> float:
    """Share of word n-grams that repeat an earlier one; 0.0 when there is none."""
    return 1.0 - distinct_n(text, n)
