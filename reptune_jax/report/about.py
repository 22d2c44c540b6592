"""What a study is, what was chosen in it, and what cannot be concluded from it."""

import functools
import json
from typing import Any

import numpy as np

from reptune_jax.config import TUNED_ARMS
from reptune_jax.evals import judges
from reptune_jax.evals.measures import METRICS
from reptune_jax.hub.side_files import public_name
from reptune_jax.report import outcomes
from reptune_jax.report import study as studies
from reptune_jax.report.blocks import divergence, interval
from reptune_jax.report.study import Study


def facts(study: Study) -> list[tuple[str, str]]:
    """Header lines: what was run, on what, by which code."""
    rows, vector = study.rows, study.vector
    value = functools.partial(studies.config_value, study.config)
    arms = ", ".join(setting.name for setting in study.picks("test"))
    tuned = rows[rows.arm.isin(TUNED_ARMS)]
    if "model" in vector:  # of an earlier version, which wrote the path
        vector = {**vector, "model": public_name(str(vector["model"]))}
    layers = vector.get("layers") or []
    if len(layers) > 2 and layers == [*range(layers[0], layers[-1] + 1)]:
        layers = [f"{layers[0]} to {layers[-1]}"]
    vector = {**vector, "layers": ", ".join(map(str, layers))}
    read = ("model", "method", "position", "norm", "pairs", "layers", "sha256")
    vector_text = "; ".join(
        f"{k} {_short(vector[k])}" for k in read if vector.get(k) not in (None, "")
    )
    model = public_name(str(value("model") or vector.get("model") or ""))
    untuned = rows.arm == "base"  # an attack's rows may be of weights that it has changed
    digests = rows.model_sha[untuned if untuned.any() else slice(None)]
    found = [
        ("Model", _short(model)),
        ("Model digest", ", ".join(sorted(set(digests) - {""}))),
        ("Vector", vector_text or "none in the study folder"),
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
        swept = [c for c in study.settings(split="val") if (c.arm, c.sign) == ("steer", sign)]
        limit = f", KL budget {budget:.3g} nats/token" if np.isfinite(budget) else ""
        where = f"layer {steer.layer}" if steer.layer >= 0 else "several layers"
        dose, kl = f"{steer.dose:+g}".replace("-", "−"), divergence(study.kl(steer))
        lines.append(
            f"{steer.name}: {where}, dose {dose}; KL on neutral prose {kl} nats/token "
            f"({len(swept)} settings swept on validation{limit})."
        )
    return lines


def limitations(study: Study) -> list[str]:
    """Sentences that follow from the data alone."""
    rows = study.rows
    lines = _judge_lines(study)
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
            + ("; fewer than 120 clusters, so small differences cannot show" * (clusters < 120))
            + "."
        )
    tuned = rows[rows.arm.isin(TUNED_ARMS)]
    seeds = tuned.groupby("arm").seed.nunique()
    if len(seeds) and seeds.min() < 3:
        lines.append(
            f"Tuned arms have as few as {seeds.min()} training seed(s): the intervals then "
            "describe these checkpoints rather than the method."
        )
    elif len(seeds):
        lines.append(f"{seeds.min()} training seeds: resampling so few understates how seeds vary.")
    lines += [
        f"{setting.name}{_at(setting)}: what was not finite is missing, and left out of every mean "
        "and count: "
        + ", ".join(f"{n} of {of} {metric} ({split})" for (metric, split), (n, of) in found.items())
        + "."
        for setting in study.settings()
        if (found := study.missing(setting))
    ]
    for sign in (1, -1):
        steer = study.pick("steer", sign)
        if steer and study.kl(steer) > 1.05 * study.budget(sign):
            lines.append(
                f"{steer.name} costs more KL than dual ({divergence(study.kl(steer))} against "
                f"{divergence(study.budget(sign))} nats/token): not a comparison at equal cost."
            )
    if study.primary_chosen:
        lines.append("The primary measure was chosen with a flag, not by the study.")
    absent = [arm for arm in (*outcomes.RIVALS[1:], "dual") if arm not in set(rows.arm)]
    if absent:
        lines.append(f"Arms not run: {', '.join(absent)}.")
    if not (rows.split == "ood").any():
        lines.append("No out-of-distribution split was scored.")
    if not rows.metric.isin(["nll", "kl"]).any():
        lines.append("Retention was not measured.")
    else:
        lines.append(
            f"The non-inferiority margin of {study.margin:g} nats/token is a declared choice; "
            "retention is measured on the neutral texts of this study only."
        )
    models = sorted(set(rows.model_sha) - {""})
    lines.append(
        f"{max(1, len(models))} model, {rows.behavior.nunique()} behavior: no claim beyond them."
    )
    return lines


def _at(setting: studies.Setting) -> str:
    if setting.layer < 0:
        return ""
    return f" at layer {setting.layer}, dose {setting.dose:+g}".replace("-", "−")


def _judge_lines(study: Study) -> list[str]:
    """What each judge is worth, also one that was too weak to judge anything."""
    rows = study.rows[(study.rows.metric == "judge") & study.rows.label.notna()]
    named = str((study.config.get("config", {}).get("eval") or {}).get("judge", ""))
    judged = {m.metric: m for m in study.measures() if m.judged}
    # In earlier studies there was one judge, which the rows do not name.
    found = rows.template.where(rows.template != "", next(iter(judged), ""))
    lines = []
    for metric in dict.fromkeys([*judged, *found]):
        if metric not in METRICS:
            continue
        own, asked = rows[found == metric], METRICS[metric].asked
        name = f"The judge ({METRICS[metric].label}{f', {_public(named)}' if asked else ''})"
        if own.empty:
            lines.append(f"{name} was not checked against labelled texts in this study.")
            continue
        auroc = judges.judge_auroc(own.value, own.label, own.cluster)
        missing = int(own.value.isna().sum())
        texts = f"{auroc.n} texts" + (f", {missing} without a score" if missing else "")
        weak = ": too weak to be evidence" if auroc.estimate < judges.MIN_AUROC else ""
        unused = "" if metric in judged else ", so it judged nothing"
        lines.append(
            f"{name} separates labelled reference answers with AUROC "
            f"{interval(auroc, signed=False)} ({texts}){weak}{unused}."
        )
    return lines


def _public(named: str) -> str:
    """`eval.judge` without a path of this machine."""
    kind, _, of = named.partition(":")
    return f"{kind}:{public_name(of)}" if of and kind != "openai" else named


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 120 else text[:117] + "…"
