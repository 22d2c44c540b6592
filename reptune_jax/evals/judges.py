"""Offline judges of a generated continuation, a check of the judge, guards against gaming it."""

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from numpy.typing import ArrayLike
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from reptune_jax.evals import stats
from reptune_jax.evals.results import Row

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


def judge_rows(
    items: Iterable[Mapping[str, Any]],
    score: Callable[[str], float] = vader,
    **common: Any,
) -> list[Row]:
    """Rows (metric "judge") of the judge's scores of each item's `pos` (1) and `neg` (0) text.

    `common` holds run_id, behavior and whatever else the rows share; the report makes an AUROC of
    them.
    """
    shared: dict[str, Any] = {"arm": "base", "sign": 0, "seed": 0} | common
    return [
        Row(
            **shared,
            split=item["split"],
            item_id=item["id"],
            cluster=item["cluster"],
            format=item["format"],
            metric="judge",
            value=score(item[side]),
            label=label,
            text=item[side],
        )
        for item in items
        for side, label in (("pos", 1.0), ("neg", 0.0))
    ]


def distinct_n(text: str, n: int = 2) -> float:
    """Distinct share of the word n-grams; 1.0 when the text is shorter than n words."""
    grams = _ngrams(text, n)
    return len(set(grams)) / len(grams) if grams else 1.0


def repetition_rate(text: str, n: int = 4) -> float:
    """Share of word n-grams that repeat an earlier one; 0.0 when there is none."""
    return 1.0 - distinct_n(text, n)


def empty_rate(texts: Iterable[str]) -> float:
    """Share of texts without a single word."""
    flags = [not re.search(r"\w", text) for text in texts]
    return sum(flags) / len(flags) if flags else 0.0


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
