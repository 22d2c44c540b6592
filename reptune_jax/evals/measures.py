"""What can be measured, as one table: every results row, table, plot and card reads it.

A behavior file names the measures of its behavior as "metric:format"; a metric with a judge scores
generated answers. A measure of one's own is an entry here.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable

from reptune_jax.evals import judges, lexicons, wording


@dataclasses.dataclass(frozen=True)
class Metric:
    """One kind of number. `formats` are those of items whose behavior it measures; () = none."""

    about: str
    label: str
    unit: str = ""
    higher: str = ""  # what more of it means
    formats: tuple[str, ...] = ()
    judge: Callable[[str], float] | None = None  # of a generated answer; higher = more behavior
    asked: bool = False  # of a judge that `eval.judge` names, which is made for the study


METRICS = {
    "vader": Metric(
        "VADER compound of the continuation only, repeated words capped",
        "VADER of generated answers",
        higher="more positive",
        formats=("free",),
        judge=judges.vader,
    ),
    "logodds": Metric(
        "log p(pos) - log p(neg) of the item's contrast; a claim's pos is the right verdict",
        "Log-odds",
        "nats",
        "more of the behavior",
        ("free", "claim", "ab"),
    ),
    "nll": Metric("of a neutral document, summed over its n_tokens", "Log loss", "nats", "worse"),
    "kl": Metric("KL(base || arm), mean over a document", "KL", "nats/token", "further from base"),
    "top1": Metric("share of tokens whose likeliest next is the base's", "Top-1", "", "closer"),
    "own_ce": Metric("of the base's own greedy answer", "Own CE", "nats/token", "further"),
    "cos": Metric("of the residual stream to the vector, at a layer and position", "Mean cosine"),
    "distinct2": Metric("distinct share of a generation's word bigrams", "Distinct-2"),
    "stopped": Metric("whether an answer ends by itself within eval.new_tokens", "Stopped"),
    "rep4": Metric("repeated share of a generation's word 4-grams", "Repeated 4-grams"),
    "judge": Metric("the judge's score of a text labelled 1 (pos) or 0 (neg)", "Judge"),
    "acc": Metric(
        "a suite's right choice is the likeliest; of MC2, the right ones' share", "Accuracy"
    ),
    "acc_norm": Metric(
        "acc by log-probability per character of the choice", "Accuracy, normalized"
    ),
    "aligned": Metric("|cos| of what an attack found with the vector, at a layer", "Alignment"),
    "null": Metric("|cos| that random directions stay under, 999 times in 1,000", "By chance"),
    "energy": Metric("share of a change's squared norm, of one direction or layer", "Share"),
    "crossed": Metric("share of changed weights that moved by over half a step", "Crossed"),
    "shift": Metric("the residual's distance from the base's along the vector", "Shift", "doses"),
    "chance": Metric("acc of who draws lots", "Chance"),
    "assent": Metric(
        "phrases of agreement and flattery against those of dissent, each counted once",
        "Assent in generated answers",
        higher="more agreement",
        formats=("free",),
        judge=lexicons.assent,
    ),
    "helped": Metric(
        "kinds of concrete content against kinds of refusal and evasion, each counted once",
        "Help in generated answers",
        higher="more help",
        formats=("free",),
        judge=lexicons.helped,
    ),
    "twosided": Metric(
        "phrases that weigh less those that decide, over their number; each counts once",
        "Two-sidedness of generated answers",
        higher="more two-sided",
        formats=("free",),
        judge=wording.twosided,
    ),
    "vividness": Metric(
        "share of words that plain English does without; each counts once, non-words do not",
        "Unusual words of generated answers",
        higher="more unusual",
        formats=("free",),
        judge=wording.vividness,
    ),
    "probe": Metric(
        "log-odds that an answer shows the behavior, by a classifier of its labelled answers",
        "Probe of generated answers",
        "nats",
        "more of the behavior",
        ("free",),
        asked=True,
    ),
    "rubric": Metric(
        "expected score of how well the rubric fits an answer, by a chat model",
        "Rubric score of generated answers",
        higher="more of the behavior",
        formats=("free",),
        asked=True,
    ),
}
_FORMATS = {"free": "open prompts", "claim": "claims", "ab": "scenarios"}


@dataclasses.dataclass(frozen=True)
class Measure:
    """A behavior metric on one format of items, never pooled with another format's scale."""

    metric: str
    format: str

    @property
    def judged(self) -> bool:
        """Whether a judge of generated answers gives the number."""
        return METRICS[self.metric].judge is not None or METRICS[self.metric].asked

    @property
    def label(self) -> str:
        """What the number is, for headings and axes."""
        metric = METRICS[self.metric]
        if self.judged:
            return metric.label
        unit = f" ({metric.unit})" if metric.unit else ""
        return f"{metric.label}, {_FORMATS.get(self.format, self.format)}{unit}"

    def __str__(self) -> str:
        return f"{self.metric}:{self.format}"

    @classmethod
    def parse(cls, text: str) -> "Measure":
        """The reverse of `str`.

        Raises:
          ValueError: not a behavior metric, or not one of that format.
        """
        found = {str(measure): measure for measure in known()}
        if text not in found:
            raise ValueError(f"measure: got {text!r}, expected one of {', '.join(found)}.")
        return found[text]


def known() -> list[Measure]:
    """All that a behavior can be measured by."""
    return [Measure(name, form) for name, metric in METRICS.items() for form in metric.formats]


def check(measures: Collection[str], primary: str, formats: Collection[str]) -> None:
    """Raises ValueError where a behavior with items of these formats cannot be measured so."""
    for measure in measures:
        if Measure.parse(measure).format not in formats:
            raise ValueError(
                f"measures: got {measure!r}, expected a measure of the items that are there, which "
                f"are of format {', '.join(sorted(formats))}. Add items, or leave it out."
            )
    if primary and primary not in measures:
        raise ValueError(
            f"study.primary: got {primary!r}, expected '' or one of {', '.join(measures)}, which "
            "the behavior is measured by."
        )


def judged(measures: Iterable[str]) -> str | None:
    """The metric, of a behavior's measures, that by itself judges answers; None if none does."""
    names = (Measure.parse(text).metric for text in measures)
    return next((name for name in names if METRICS[name].judge is not None), None)
