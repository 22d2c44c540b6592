"""Which judges score a study's generated answers, and what each of them is worth.

A judge is worth the AUROC with which it tells labelled answers of the test split apart, which it
has not learned from. One that `eval.judge` names, and that is below `judges.MIN_AUROC`, judges
nothing.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from reptune_jax import distributed, lm
from reptune_jax.console import say
from reptune_jax.data.behavior import Behavior
from reptune_jax.data.schema import Item
from reptune_jax.evals import endpoint, judges, measures, probe, rubric
from reptune_jax.evals.measures import METRICS, Measure
from reptune_jax.evals.probe import Texts
from reptune_jax.evals.stats import Interval
from reptune_jax.folder import Study
from reptune_jax.lm import Model

METRIC_OF = {"probe": "probe", "embed": "probe", "chat": "rubric", "openai": "rubric"}
MOST_MISSING = 0.2  # of the labelled answers
_TRAIN = ("train", "tune")  # no result is of these
_MOST = 200  # items whose answers it is measured by: each of them is asked for


class Judge(NamedTuple):
    """`score` gives a number for each (item, answer), NaN where it has none."""

    metric: str
    score: Callable[[Texts], Sequence[float]]


@dataclasses.dataclass(frozen=True)
class Measured:
    """A judge with its scores of the labelled answers that it is measured by."""

    judge: Judge
    texts: Texts
    labels: list[int]
    scores: Sequence[float]

    @property
    def auroc(self) -> Interval:
        clusters = [item.cluster for item, _ in self.texts]
        return judges.judge_auroc(self.scores, self.labels, clusters)

    @property
    def missing(self) -> float:
        """Share of the labelled answers that it has no score for."""
        return float(np.isnan(self.scores).mean()) if len(self.scores) else 1.0

    @property
    def fit(self) -> bool:
        return self.auroc.estimate >= judges.MIN_AUROC and self.missing <= MOST_MISSING


def parse(text: str) -> tuple[str, str]:
    """(kind, what it is of) of `eval.judge`; ("", "") where only the behavior's own judge is asked.

    Raises:
      ValueError: it is none.
    """
    kind, _, of = text.partition(":")
    if text in ("", "lexicon"):
        return "", ""
    layer = kind != "probe" or not of or of.isdecimal()
    if kind not in METRIC_OF or not layer or (kind == "embed" and not of):
        raise ValueError(
            f"eval.judge: got {text!r}, expected lexicon, probe, probe:LAYER, chat, chat:MODEL, "
            "openai:MODEL@URL or embed:MODEL."
        )
    if kind == "openai":
        endpoint.Place.parse(of)
    return kind, of


def declared(c: ConfigDict, behavior: Behavior) -> tuple[str, ...]:
    """What a behavior is measured by in this study, its judge included; the primary one first."""
    kind, _ = parse(c.eval.judge)
    known = [*behavior.measures, *([f"{METRIC_OF[kind]}:free"] if kind else [])]
    return tuple(dict.fromkeys([c.study.primary, *known] if c.study.primary in known else known))


def check(c: ConfigDict, behavior: Behavior) -> None:
    """Raises ValueError where the judge that the config names cannot judge this behavior."""
    kind, _ = parse(c.eval.judge)
    if kind and behavior.kind != "free":
        raise ValueError(
            f"eval.judge: got {c.eval.judge!r}, expected 'lexicon' for {behavior.name}, a behavior "
            "with claims, which nothing generated is judged in. Set it to 'lexicon'."
        )
    asked = [Measure.parse(m).metric for m in (*behavior.measures, c.study.primary) if m]
    for metric in asked:
        if METRICS[metric].asked and metric != METRIC_OF.get(kind):
            raise ValueError(
                f"eval.judge: got {c.eval.judge!r}, expected one that gives {metric}, by which "
                f"{behavior.name} is measured. Set it, or leave the measure out."
            )
    if kind in ("chat", "openai") and not (c.eval.rubric or behavior.rubric):
        raise ValueError(
            f"eval.rubric: got '', expected what {c.eval.judge.partition(':')[0]} is to look for "
            f"in answers, which the file of {behavior.name} does not say. Set it, or add rubric to "
            "the file's first line."
        )


def own(behavior: Behavior) -> list[Judge]:
    """The judge that the behavior's measures name, if one does."""
    name = measures.judged(behavior.measures)
    judge = METRICS[name].judge if name else None
    if name is None or judge is None:
        return []
    return [Judge(name, lambda texts: [judge(answer) for _, answer in texts])]


def named(c: ConfigDict, study: Study, base: Model, behavior: Behavior) -> Measured | None:
    """The judge of `eval.judge`, with its worth, which is said; None where it names none.

    Raises:
      ValueError: it cannot be made; or is too weak, and declared to be what a study is decided by.
    """
    kind, _ = parse(c.eval.judge)
    if not kind:
        return None
    judge = Judge(METRIC_OF[kind], _scorer(c, study, base, behavior))
    found = measure(judge, behavior, c.eval.judge)
    if not found.fit and Measure.parse(declared(c, behavior)[0]).metric == judge.metric:
        raise ValueError(
            f"study.primary: got {judge.metric}:free of eval.judge {c.eval.judge!r}, whose AUROC "
            f"on labelled answers is {found.auroc.estimate:.2f}, expected at least "
            f"{judges.MIN_AUROC} and a score of most of them. Declare another measure, or name "
            "another judge."
        )
    return found


def _scorer(
    c: ConfigDict, study: Study, base: Model, behavior: Behavior
) -> Callable[[Texts], Sequence[float]]:
    (kind, of), batch = parse(c.eval.judge), max(c.eval.batch // 2, 1)
    if METRIC_OF[kind] == "probe":
        layer = int(of) if of and kind == "probe" else base.arch.N // 2
        if layer >= base.arch.N:
            raise ValueError(
                f"eval.judge: got 'probe:{layer}', expected a layer below {base.arch.N}, counted "
                "from 0. 'probe' takes the middle one."
            )
        read = probe.residuals(base, layer, batch) if kind == "probe" else probe.embeddings(of)
        return probe.train(read, *labelled(behavior, *_TRAIN))
    description, scale = c.eval.rubric or behavior.rubric, tuple(c.eval.scale)
    if kind == "chat":
        model = lm.load(of, c.dtype or None, base.mesh) if of else base
        if model.tokenizer is None:
            raise ValueError(f"eval.judge {of}: has no tokenizer, expected a chat model.")
        return rubric.local(model, description, scale, batch)
    asked = endpoint.Endpoint(endpoint.Place.parse(of), description, scale, study.asked)
    return lambda texts: distributed.of_first(lambda: asked.score(texts), len(texts))  # type: ignore[return-value]


def measure(judge: Judge, behavior: Behavior, name: str) -> Measured:
    """The judge with its worth, which is said."""
    texts, labels = labelled(behavior, "test", most=_MOST)
    found = Measured(judge, texts, labels, [float(s) for s in judge.score(texts)])
    auroc, missing = found.auroc, f", {found.missing:.0%} missing" if found.missing else ""
    if not texts:
        worth = "has no labelled answers of split test to be measured by, so it judges nothing"
    else:
        worth = f"AUROC {auroc.estimate:.3f} [{auroc.low:.3f}, {auroc.high:.3f}] on {len(texts)} "
        worth += f"labelled answers{missing}" + ("" if found.fit else ": too weak, judges nothing")
    say(f"judge {name}: {worth}")
    return found


def labelled(
    behavior: Behavior, *splits: str, most: int = 0
) -> tuple[list[tuple[Item, str]], list[int]]:
    """(answers, 1 with the behavior or 0 against it) of these splits, of the first `most` items."""
    items = [i for split in splits for i in behavior.select(split, "free") if i.pos and i.neg]
    items = items[: most or None]
    return [(i, text) for i in items for text in (i.pos, i.neg)], [1, 0] * len(items)
