"""One self-contained page from a study: tables, inline figures, unpicked texts, limitations."""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import numpy as np
import pandas as pd

from reptune_jax.evals import judges
from reptune_jax.report import captions, plots, tables, verdicts
from reptune_jax.report import study as studies
from reptune_jax.report.study import BASE, Condition, Study

GENERATIONS = 10
FAILURES = 5  # per sign
_GOOD = {"dual ahead", "non-inferior"}
_BAD = {"dual behind", "inferior"}
_OPEN = {"no difference shown", "inconclusive"}
_NO_ARM = "No arm besides base has test rows."
# file name -> plot, title, caption, what is said when its data are missing
_BY_MEASURE: dict[str, tuple[Callable[..., Any], str, str, str]] = {
    "forest": (plots.forest, "Effect by arm", captions.FOREST, _NO_ARM),
    "pareto": (plots.pareto, "Effect against side effects", captions.PARETO, "Needs KL rows."),
    "dose": (plots.dose_response, "Dose response", captions.DOSE, "Needs a steering sweep."),
    "histogram": (plots.histogram, "Per-item change", captions.HISTOGRAM, _NO_ARM),
}
_BY_STUDY: dict[str, tuple[Callable[..., Any], str, str, str]] = {
    "curves": (
        plots.curves,
        "Training curves",
        captions.CURVES,
        "No metrics.jsonl found: nothing was tuned in this study yet.",
    ),
    "cosine": (
        plots.heatmaps,
        "Cosine to the vector, before and after",
        captions.COSINE,
        "No cosine rows yet.",
    ),
}


@dataclasses.dataclass(frozen=True)
class Plot:
    """A drawn figure."""

    title: str
    caption: str
    uri: str
    note: str = ""


def write(study: Study, margin: float = tables.MARGIN) -> Path:
    """Writes report/index.html and report/plots/*.png in the study folder; returns the page."""
    folder = study.folder / "report"
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    page = folder / "index.html"
    scratch = page.with_suffix(".tmp")
    scratch.write_text(render(study, margin, folder / "plots"), encoding="utf-8")
    os.replace(scratch, page)
    return page


def render(study: Study, margin: float = tables.MARGIN, plot_dir: Path | None = None) -> str:
    """The page as text."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"cell": _cell, "head": _head}
    return environment.get_template("template.html").render(_context(study, margin, plot_dir))


def _context(study: Study, margin: float, plot_dir: Path | None) -> dict[str, Any]:
    measures, primary = study.measures(), study.primary
    formats = {m.format for m in measures}
    return {
        "behavior": ", ".join(sorted(set(study.rows.behavior))),
        "facts": facts(study),
        "selection": selection(study),
        "headline": [tables.headline_table(study, m) for m in measures],
        "families": [tables.family_table(study, m) for m in measures if primary],
        "claims": [verdicts.claims_table(study), verdicts.claims_apart_table(study)]
        if "claim" in formats
        else [],
        "scenarios": verdicts.scenarios_table(study) if "ab" in formats else None,
        "retention": [tables.retention_table(study, margin), tables.guards_table(study)],
        "plots": _plots(study, plot_dir),
        "generations": generations(study),
        "failures": failures(study),
        "limitations": limitations(study, margin),
    }


def _plots(study: Study, plot_dir: Path | None) -> dict[str, list[Plot]]:
    def figure(
        name: str, plot: Callable[..., Any], title: str, caption: str, note: str, *args: Any
    ) -> Plot:
        png = None if plot_dir is None else plot_dir / f"{name}.png"
        return Plot(title, caption, plots.draw(plot, study, *args, png=png), note)

    groups: dict[str, list[Plot]] = {kind: [] for kind in ("forest", "pareto", "dose", "histogram")}
    for measure in study.measures():
        for kind, (plot, title, caption, note) in _BY_MEASURE.items():
            name = f"{kind}_{measure.metric}_{measure.format}"
            title = f"{title}: {measure.label}"
            groups[kind].append(figure(name, plot, title, caption, note, measure))
    groups["training"] = [figure(name, *about) for name, about in _BY_STUDY.items()]
    return groups


def facts(study: Study) -> list[tuple[str, str]]:
    """Header lines: what was run, on what, by which code."""
    rows, vector = study.rows, study.vector
    value = functools.partial(studies.config_value, study.config)
    arms = ", ".join(dict.fromkeys(c.name for c in study.conditions()))
    tuned = rows[rows.arm.isin(["token", "vector", "dual", "random", "out"])]
    read = ("model", "method", "position", "norm", "pairs", "layers", "sha256")
    vector_text = "; ".join(
        f"{k} {_short(vector[k])}" for k in read if vector.get(k) not in (None, "")
    )
    found = [
        ("Model", _short(value("model") or vector.get("model") or "")),
        ("Model digest", ", ".join(sorted(set(rows.model_sha) - {""}))),
        ("Vector", vector_text or "no vector.safetensors in the study folder"),
        ("Arms", arms),
        ("Training seeds", ", ".join(map(str, sorted(tuned.seed.unique()))) or "nothing tuned yet"),
        ("Code", f"commit {value('commit')}" if value("commit") else ""),
        ("Config digest", studies.config_sha(study.config)),
        ("Device", str(value("device") or "")),
        ("Dtype", str(value("dtype") or "")),
        ("Results", f"{len(rows):,} rows, {rows.item_id.nunique():,} items"),
    ]
    return [(name, text) for name, text in found if text]


def selection(study: Study) -> list[str]:
    """What was chosen, on which split, by which rule."""
    lines = []
    for sign in (1, -1):
        steer = study.pick("steer", sign)
        if steer is None:
            continue
        budget = study.budget(sign)
        swept = [c for c in study.conditions(split="val") if (c.arm, c.sign) == ("steer", sign)]
        limit = f", KL budget {budget:.3g} nats/token" if np.isfinite(budget) else ""
        kl = tables.number(study.kl(steer))
        lines.append(
            f"{tables.condition_note(steer)}; KL on neutral prose {kl} nats/token "
            f"({len(swept)} settings swept on validation{limit})."
        )
    chosen = study.config.get("selected") or studies.config_value(study.config, "selected")
    return lines + ([f"From the config: {_short(chosen)}."] if chosen else [])


def generations(study: Study) -> list[dict[str, Any]]:
    """Answers of all arms to `GENERATIONS` test items drawn with a fixed seed, never picked."""
    arms = study.picks("test")
    texts = {c: _texts(study, c) for c in arms}
    texts = {c: t for c, t in texts.items() if not t.empty}
    if not texts:
        return []
    shared = sorted(set.intersection(*(set(t.index) for t in texts.values())))
    count = min(GENERATIONS, len(shared))
    drawn = np.random.default_rng(0).choice(len(shared), count, replace=False)
    return [_card(study, shared[i], texts) for i in sorted(drawn)]


def failures(study: Study) -> list[dict[str, Any]]:
    """The items on which dual (else the first arm with rows) moved furthest against its sign."""
    cards: list[dict[str, Any]] = []
    for sign in (1, -1):
        options = [study.pick(arm, sign) for arm in ("dual", "token", "steer", "prompt")]
        condition = next((c for c in options if c is not None), None)
        if condition is None or study.primary is None:
            continue
        paired = study.delta(condition, BASE, study.primary, "test")
        worst = (sign * studies.per_item(paired)).nsmallest(FAILURES)
        texts = {c: _texts(study, c) for c in (BASE, condition)}
        for item, moved in worst.items():
            card = _card(study, str(item), texts)
            cards.append(
                card | {"arm": condition.name, "moved": tables.number(sign * moved, 3, True)}
            )
    return cards


def _card(study: Study, item: str, texts: dict[Condition, pd.DataFrame]) -> dict[str, Any]:
    answers = [
        {"arm": c.name, "color": plots.COLORS[c.arm], "text": row.text,
         "value": tables.number(row.value, 2, True)}
        for c, found in texts.items()
        for row in found[found.index == item].itertuples()
    ]  # fmt: skip
    return {"item": item, "prompt": study.prompts.get(item, ""), "answers": answers}


def _texts(study: Study, condition: Condition) -> pd.DataFrame:
    """Generated test answers of a condition's first seed, by item."""
    rows = study.where(condition, "vader", "test")
    if rows.empty:  # a behavior without a judge keeps its texts with the guards
        rows = study.where(condition, "distinct2", "test").assign(value=np.nan)
    rows = rows[rows.seed == rows.seed.min()].drop_duplicates("item_id")
    return rows.set_index("item_id")[["text", "value"]]


def limitations(study: Study, margin: float) -> list[str]:
    """Sentences that follow from the data alone."""
    rows = study.rows
    lines = [_judge_line(study)] if (rows.metric == "vader").any() else []
    for measure in study.measures():
        test = rows[
            (rows.metric == measure.metric)
            & (rows.format == measure.format)
            & (rows.split == "test")
        ]
        clusters, missing = test.cluster.nunique(), int(test.value.isna().sum())
        lines.append(
            f"{measure.label}: {test.item_id.nunique()} test items in {clusters} clusters"
            + (f", {missing} values missing" if missing else ", none missing")
            + (
                "; fewer than 120 clusters, so small differences cannot show."
                if clusters < 120
                else "."
            )
        )
    tuned = rows[rows.arm.isin(["token", "vector", "dual", "random", "out"])]
    seeds = tuned.groupby("arm").seed.nunique()
    if len(seeds) and seeds.min() < 3:
        lines.append(
            f"Tuned arms have as few as {seeds.min()} training seed(s): the intervals then "
            "describe these checkpoints rather than the method."
        )
    elif len(seeds):
        lines.append(f"{seeds.min()} training seeds: resampling so few understates how seeds vary.")
    for sign in (1, -1):
        steer = study.pick("steer", sign)
        if steer and study.kl(steer) > 1.05 * study.budget(sign):
            lines.append(
                f"{steer.name} costs more KL than dual ({tables.number(study.kl(steer))} against "
                f"{tables.number(study.budget(sign))} nats/token): not a comparison at equal cost."
            )
    if study.primary_chosen:
        lines.append("The primary measure was chosen with a flag, not by the default order.")
    absent = [arm for arm in ("prompt", *tables.RIVALS[1:], "dual") if arm not in set(rows.arm)]
    if absent:
        lines.append(f"Arms not run: {', '.join(absent)}.")
    if not (rows.split == "ood").any():
        lines.append("No out-of-distribution split was scored.")
    if not rows.metric.isin(["nll", "kl"]).any():
        lines.append("Retention was not measured.")
    else:
        lines.append(
            f"The non-inferiority margin of {margin:g} nats/token is a declared choice; "
            "retention is measured on the neutral texts of this study only."
        )
    models = sorted(set(rows.model_sha) - {""})
    lines.append(
        f"{max(1, len(models))} model, {rows.behavior.nunique()} behavior: no claim beyond them."
    )
    return lines


def _judge_line(study: Study) -> str:
    rows = study.rows[(study.rows.metric == "judge") & study.rows.label.notna()]
    if rows.empty:
        return "The VADER judge was not checked against labelled texts in this study."
    auroc = judges.judge_auroc(rows.value, rows.label, rows.cluster)
    weak = auroc.estimate < judges.MIN_AUROC
    return (
        "The VADER judge separates labelled reference answers with AUROC "
        f"{tables.interval(auroc, signed=False)} ({auroc.n} texts)"
        + (": too weak to be evidence." if weak else ".")
    )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 120 else text[:117] + "…"


def _head(text: str) -> markupsafe.Markup:
    return markupsafe.Markup(str(markupsafe.escape(text)).replace("d_z", "d<sub>z</sub>"))


def _cell(text: str) -> markupsafe.Markup:
    """A table cell: intervals dimmed, verdict words coloured."""
    for words, kind in ((_GOOD, "good"), (_BAD, "bad"), (_OPEN, "open")):
        if text in words:
            return markupsafe.Markup('<span class="{}">{}</span>').format(kind, text)
    match = re.fullmatch(r"(.+?) (\[.+\])", text)
    if match is None:
        return markupsafe.escape(text)
    return markupsafe.Markup('{} <span class="ci">{}</span>').format(*match.groups())
