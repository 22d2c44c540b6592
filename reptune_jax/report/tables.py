"""The tables of the report: numbers as data frames, then as text for HTML and Markdown."""

import math
from collections.abc import Iterable
from typing import Any

import pandas as pd

from reptune_jax.evals import stats
from reptune_jax.evals.measures import METRICS, Measure
from reptune_jax.evals.stats import Interval
from reptune_jax.report import captions, outcomes
from reptune_jax.report import study as studies
from reptune_jax.report.blocks import Table, divergence, interval, number, p_value, percent
from reptune_jax.report.study import BASE, Study

_CI = "[95 % CI]"
_GUARDS = ("distinct2", "rep4", "stopped")


def headline_frame(study: Study, measure: Measure, splits: Iterable[str] = ("test", "ood")) -> Any:
    """One row per arm, sign and split: mean, paired delta to base, d_z, negative-response rate."""
    rows = []
    for split in splits:
        for setting in study.picks(split):
            own = study.measured(setting, measure, split)
            if own.empty:
                continue
            paired = study.delta(setting, BASE, measure, split)
            items, whole = studies.per_item(paired), own[own.value.notna()]
            row = {"setting": setting, "split": split, "mean": studies.interval(own, "value")}
            row |= {"n": whole.item_id.nunique(), "clusters": whole.cluster.nunique()}
            row |= {"seeds": whole.seed.nunique(), "missing": int(own.value.isna().sum())}
            if setting != BASE:
                row["delta"] = studies.interval(paired)
                row["dz"] = stats.cohen_dz(items)
                row["against"] = stats.negative_response_rate(items, setting.sign)
            rows.append(row)
    columns = [
        "setting", "split", "mean", "delta", "dz", "against", "n", "clusters", "seeds", "missing",
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def retention_frame(study: Study) -> Any:
    """What else changed, per arm: log loss, KL, top-1 agreement, own completions."""
    rows = []
    for setting in study.picks("test", skip=["base"]) or study.picks("neutral", skip=["base"]):
        nll = studies.pair(*(study.where(c, "nll", "neutral") for c in (setting, BASE)))
        per_byte = nll[nll.n_bytes > 0]
        own = studies.pair(*(study.where(c, "own_ce") for c in (setting, BASE)))
        prose = study.where(setting, "kl", "neutral")
        nats = studies.interval(nll.assign(delta=nll.delta / nll.n_tokens), "delta", "n_tokens")
        bpb = per_byte.assign(delta=per_byte.delta / per_byte.n_bytes / math.log(2))
        row = {
            "setting": setting,
            "bpb": studies.interval(bpb, "delta", "n_bytes"),
            "nats": nats,
            "verdict": stats.non_inferiority(nats, study.margin) if len(nll) else "",
            "kl": studies.per_token(prose),
            "kl_chats": studies.per_token(study.where(setting, "kl", "chats")),
            "top1": studies.per_token(study.where(setting, "top1", "neutral")),
            "own_ce": studies.per_token(own, "delta"),
            "documents": nll[nll.delta.notna()].item_id.nunique()
            or prose[prose.value.notna()].item_id.nunique(),
        }
        row["own_verdict"] = stats.non_inferiority(row["own_ce"], study.margin) if len(own) else ""
        if any(isinstance(x, Interval) and math.isfinite(x.estimate) for x in row.values()):
            rows.append(row)
    columns = [
        "setting", "bpb", "nats", "verdict", "kl", "kl_chats", "top1", "own_ce", "own_verdict",
        "documents",
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def guards_frame(study: Study, split: str = "test") -> Any:
    """Are the generated answers still text: distinct bigrams, repeated 4-grams, ends, length."""
    rows = []
    for setting in study.picks(split):
        found = {m: study.where(setting, m, split) for m in _GUARDS}
        if all(rows.empty for rows in found.values()):
            continue
        row: dict[str, Any] = {m: studies.interval(rows, "value") for m, rows in found.items()}
        words = study.answers(setting, split).text.str.split().str.len()
        row |= {"setting": setting, "empty": (words == 0).mean(), "words": words.mean()}
        rows.append(row)
    return pd.DataFrame(rows, columns=["setting", *_GUARDS, "empty", "words"])


def headline_table(study: Study, measure: Measure) -> Table:
    """The behavior effect of every arm on test, with the out-of-distribution split beside it."""
    frame = headline_frame(study, measure)
    ood = {r.setting: r for r in frame[frame.split == "ood"].itertuples()}
    rows = [
        [
            r.setting.name,
            number(r.mean.estimate),
            interval(r.delta),
            number(r.dz, 2, signed=True),
            percent(r.against),
            f"{r.n} ({r.clusters})" + (f", {r.missing} missing" if r.missing else ""),
            str(r.seeds),
            interval(ood[r.setting].delta) if r.setting in ood else "–",
            number(ood[r.setting].dz, 2, signed=True) if r.setting in ood else "–",
        ]
        for r in frame[frame.split == "test"].itertuples()
    ]
    header = [
        "Arm", "Mean", f"Δ vs base {_CI}", "d_z", "Against", "Items (clusters)", "Seeds",
        f"Δ, ood {_CI}", "d_z, ood",
    ]  # fmt: skip
    role = "primary measure" if measure == study.primary else "secondary measure"
    note = "No test-split rows of this measure yet."
    higher = METRICS[measure.metric].higher
    caption = captions.HEADLINE + (f" Higher is {higher}." if higher else "")
    return Table(f"{measure.label} ({role})", caption, header, rows, note)


def family_table(study: Study, measure: Measure) -> Table:
    """Family A as text."""
    frame = outcomes.family_frame(study, measure)
    rows = [
        [f"{r.dual.name} vs {r.rival.name}", interval(r.advantage), number(r.dz, 2, signed=True)]
        + [p_value(r.p), p_value(r.p_holm), str(r.n), r.verdict]
        for r in frame.itertuples()
    ]
    header = ["Comparison", f"Advantage {_CI}", "d_z", "p", "p (Holm)", "Items", "Verdict"]
    done = {r.rival.arm for r in frame.itertuples()}
    absent = [rival for rival in outcomes.RIVALS if rival not in done]
    text = captions.FAMILY if measure == study.primary else captions.EXPLORATORY
    caption = text.format(tests=len(frame)) + _budget_note(study)
    caption += f" Not run: {', '.join(absent)}." if absent else ""
    title = f"Dual against its rivals: {measure.label}"
    return Table(title, caption, header, rows, "The dual arm has no test rows yet.")


def equal_kl_table(study: Study, measure: Measure) -> Table | None:
    """Dual against the tuned arms that were scaled to its KL as text; None where none was."""
    frame = outcomes.family_frame(study, measure, equal_kl=True)
    rows = [
        [
            f"{r.dual.name} vs {r.rival.name}",
            divergence(study.kl(r.dual)),
            divergence(study.kl(r.rival)),
        ]
        + [interval(r.advantage), number(r.dz, 2, signed=True)]
        + [p_value(r.p), p_value(r.p_holm), str(r.n), r.verdict]
        for r in frame.itertuples()
    ]
    header = [
        "Comparison", "KL, dual", "KL, rival", f"Advantage {_CI}", "d_z", "p", "p (Holm)", "Items",
        "Verdict",
    ]  # fmt: skip
    title = f"At equal KL: {measure.label}"
    caption = captions.EQUAL_KL.format(tests=len(frame))
    return Table(title, caption, header, rows) if rows else None


def _budget_note(study: Study) -> str:
    """What online steering costs beside dual: is the comparison fair?"""
    costs = []
    for sign in (1, -1):
        for arm in ("dual", "steer"):
            setting = study.pick(arm, sign)
            if setting is not None and math.isfinite(kl := study.kl(setting)):
                costs.append(f"{setting.name}: {divergence(kl)}")
    return f" KL on neutral prose, nats/token ({', '.join(costs)})." if costs else ""


def retention_table(study: Study) -> Table:
    """Retention as text."""
    frame = retention_frame(study)
    rows = [
        [
            r.setting.name,
            interval(r.bpb, 4),
            interval(r.nats),
            r.verdict or "–",
            interval(r.own_ce),
            r.own_verdict or "–",
            divergence(r.kl),
            divergence(r.kl_chats),
            percent(r.top1.estimate),
        ]
        for r in frame.itertuples()
    ]
    columns = "Arm|Δ bits/byte|Δ nats/token|Verdict|Δ own CE|Verdict|KL, prose|KL, chats|Top-1"
    documents = int(frame.documents.max()) if len(frame) else 0
    caption = captions.RETENTION.format(margin=study.margin, documents=documents)
    return Table("Retention", caption, columns.split("|"), rows, "No retention rows yet.")


def guards_table(study: Study) -> Table:
    """Generation guards as text."""
    rows = [
        [r.setting.name, number(r.distinct2.estimate), number(r.rep4.estimate)]
        + [percent(r.stopped.estimate), percent(r.empty), number(r.words, 1)]
        for r in guards_frame(study).itertuples()
    ]
    header = ["Arm", "Distinct-2", "Repeated 4-grams", "Stopped", "Empty", "Words"]
    return Table("Generation guards", captions.GUARDS, header, rows, "No generation guards yet.")
