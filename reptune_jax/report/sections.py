"""The report as a list of sections, which the page and the Markdown both walk.

A new table or figure is built in a section here; what is shown, and in which order, is said nowhere
else. A section without blocks is left out.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from reptune_jax.evals.measures import Measure
from reptune_jax.report import (
    about,
    capability,
    captions,
    claims,
    kinds,
    outcomes,
    plots,
    security,
    specificity,
    tables,
    texts,
)
from reptune_jax.report.blocks import Block, Cards, Lines, Plot
from reptune_jax.report.study import Study


class Section(NamedTuple):
    """A heading, the anchor it is linked by, and what stands below it."""

    id: str
    link: str  # in the page's navigation
    title: str
    build: Callable[[Study], list[Block]]


def _effect(study: Study) -> list[Block]:
    blocks: list[Block] = [tables.headline_table(study, m) for m in study.measures()]
    forests = [_plot(study, "forest", measure) for measure in study.measures()]
    if not blocks:
        return [Lines(["No behavior measure in the results yet."], note=True)]
    by_kind = kinds.table(study, study.primary) if study.primary else None
    return [blocks[0], forests[0], *([by_kind] if by_kind else []), *blocks[1:], *forests[1:]]


def _family(study: Study) -> list[Block]:
    if study.primary is None:
        return [Lines(["No primary measure in the results yet."], note=True)]
    blocks: list[Block] = [tables.family_table(study, measure) for measure in study.measures()]
    equal = [tables.equal_kl_table(study, measure) for measure in study.measures()]
    return blocks + [table for table in equal if table]


def _claims(study: Study) -> list[Block]:
    formats = {measure.format for measure in study.measures()}
    blocks: list[Block] = []
    if "claim" in formats:
        blocks += [claims.claims_table(study), claims.claims_apart_table(study)]
    return blocks + ([claims.scenarios_table(study)] if "ab" in formats else [])


def _retention(study: Study) -> list[Block]:
    return [tables.retention_table(study), tables.guards_table(study)]


def _tradeoff(study: Study) -> list[Block]:
    kinds = ["pareto", "dose", "histogram"]
    if any(setting.k and setting.layer < 0 for setting in study.settings(split="val")):
        kinds.insert(2, "dial")
    return [_plot(study, kind, measure) for kind in kinds for measure in study.measures()]


def _training(study: Study) -> list[Block]:
    return [_plot(study, "curves"), _plot(study, "cosine")]


def _texts(study: Study) -> list[Block]:
    score = f"; the number is the judge's score ({study.judged.label})" if study.judged else ""
    return [
        Cards(
            "Test items drawn at random, not picked",
            captions.GENERATIONS.format(score=score),
            texts.generations(study),
            "No generated texts yet.",
        ),
        Cards(
            "Failures: items that moved furthest the wrong way",
            captions.FAILURES,
            texts.failures(study),
            "No steered or tuned arm has test rows yet.",
        ),
    ]


SECTIONS = (
    Section("outcome", "Outcome", "Did it work", lambda s: [outcomes.table(s)]),
    Section("effect", "Effect", "Effect on the behavior", _effect),
    Section("family", "Comparisons", "Declared comparisons", _family),
    Section("claims", "Claims", "Discrimination and bias", _claims),
    Section("retention", "Retention", "What else changed", _retention),
    Section("capability", "Capability", "Capability", capability.blocks),
    Section("specificity", "Specificity", "Other behaviors", specificity.blocks),
    Section("security", "Security", "Security", security.blocks),
    Section("tradeoff", "Trade-off", "Trade-off, dose and spread", _tradeoff),
    Section("training", "Training", "Training and manipulation check", _training),
    Section("texts", "Texts", "Generated texts", _texts),
    Section("limits", "Limitations", "Limitations", lambda s: [Lines(about.limitations(s))]),
)

_NO_ARM = "No arm besides base has test rows."
_NO_RUN = "Nothing was tuned in this study yet."
# plot, title, caption, what is said when its data are missing
_PLOTS: dict[str, tuple[Callable[..., Any], str, str, str]] = {
    "forest": (plots.forest, "Effect by arm", captions.FOREST, _NO_ARM),
    "pareto": (plots.pareto, "Effect against side effects", captions.PARETO, "Needs KL rows."),
    "dose": (plots.dose_response, "Dose response", captions.DOSE, "Needs a steering sweep."),
    "dial": (plots.dial, "Tuned weights as a dial", captions.DIAL, "Needs a dial sweep."),
    "histogram": (plots.histogram, "Per-item change", captions.HISTOGRAM, _NO_ARM),
    "curves": (plots.curves, "Training curves", captions.CURVES, _NO_RUN),
    "cosine": (plots.heatmaps, "Cosine to the vector", captions.COSINE, "No cosine rows yet."),
}


def _plot(study: Study, kind: str, measure: Measure | None = None) -> Plot:
    plot, title, caption, note = _PLOTS[kind]
    if measure is None:
        return Plot(kind, title, caption, partial(plot, study), note)
    name, title = f"{kind}_{measure.metric}_{measure.format}", f"{title}: {measure.label}"
    return Plot(name, title, caption, partial(plot, study, measure), note)
