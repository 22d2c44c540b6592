"""The tables of the report: numbers as data frames, then as text for HTML and Markdown."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import pandas as pd

from reptune_jax.evals import stats
from reptune_jax.evals.stats import Interval
from reptune_jax.report import captions
from reptune_jax.report import study as studies
from reptune_jax.report.study import BASE, Condition, Measure, Study

RIVALS = ("base", "token", "steer", "random")
MARGIN = 0.02  # nats per token, the default non-inferiority margin
_CI = "[95 % CI]"


@dataclasses.dataclass(frozen=True)
class Table:
    """Text, ready to be laid out."""

    title: str
    caption: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""  # said instead of the rows when there are none


def headline_frame(study: Study, measure: Measure, splits: Iterable[str] = ("test", "ood")) -> Any:
    """One row per arm, sign and split: mean, paired delta to base, d_z, negative-response rate."""
    rows = []
    for split in splits:
        for condition in study.picks(split):
            own = study.measured(condition, measure, split)
            if own.empty:
                continue
            paired = study.delta(condition, BASE, measure, split)
            items = studies.per_item(paired)
            row = {
                "condition": condition,
                "split": split,
                "mean": studies.interval(own, "value"),
                "n": own.item_id.nunique(),
                "clusters": own.cluster.nunique(),
                "seeds": own.seed.nunique(),
                "missing": int(own.value.isna().sum()),
            }
            if condition != BASE:
                row["delta"] = studies.interval(paired)
                row["dz"] = stats.cohen_dz(items)
                row["against"] = stats.negative_response_rate(items, condition.sign)
            rows.append(row)
    columns = [
        "condition", "split", "mean", "delta", "dz", "against", "n", "clusters", "seeds", "missing",
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def family_frame(study: Study, measure: Measure, split: str = "test") -> Any:
    """Family A: dual against each rival, both signs; advantage = sign x (dual - rival), Holm."""
    rows = []
    for sign in (1, -1):
        dual = study.pick("dual", sign, split)
        for rival in RIVALS if dual else ():
            other = study.pick(rival, sign, split)
            paired = study.delta(dual, other, measure, split) if dual and other else pd.DataFrame()
            if paired.empty:
                continue
            paired["delta"] *= sign
            items = studies.per_item(paired)
            rows.append(
                {
                    "sign": sign,
                    "dual": dual,
                    "rival": other,
                    "advantage": studies.interval(paired),
                    "dz": stats.cohen_dz(items),
                    "p": stats.sign_flip_p(paired.delta, paired.cluster),
                    "n": len(items),
                }
            )
    frame = pd.DataFrame(rows, columns=["sign", "dual", "rival", "advantage", "dz", "p", "n"])
    frame["p_holm"] = stats.holm(frame.p) if len(frame) else []
    frame["verdict"] = [verdict(a, p) for a, p in zip(frame.advantage, frame.p_holm, strict=True)]
    return frame


def verdict(advantage: Interval, p_adjusted: float, level: float = 0.05) -> str:
    """A difference is claimed only if the test and the interval both say so."""
    if p_adjusted < level and advantage.excludes(0):
        return "dual ahead" if advantage.estimate > 0 else "dual behind"
    return "no difference shown"


def retention_frame(study: Study, margin: float = MARGIN) -> Any:
    """What else changed, per arm: log loss, KL, top-1 agreement, own completions."""
    rows = []
    for condition in study.picks("test", skip=["base"]) or study.picks("neutral", skip=["base"]):
        nll = studies.pair(*(study.where(c, "nll", "neutral") for c in (condition, BASE)))
        per_byte = nll[nll.n_bytes > 0]
        own = studies.pair(*(study.where(c, "own_ce") for c in (condition, BASE)))
        prose = study.where(condition, "kl", "neutral")
        nats = studies.interval(nll.assign(delta=nll.delta / nll.n_tokens), "delta", "n_tokens")
        bpb = per_byte.assign(delta=per_byte.delta / per_byte.n_bytes / math.log(2))
        row = {
            "condition": condition,
            "bpb": studies.interval(bpb, "delta", "n_bytes"),
            "nats": nats,
            "verdict": stats.non_inferiority(nats, margin) if len(nll) else "",
            "kl": studies.per_token(prose),
            "kl_chats": studies.per_token(study.where(condition, "kl", "chats")),
            "top1": studies.per_token(study.where(condition, "top1", "neutral")),
            "own_ce": studies.per_token(own, "delta"),
            "documents": nll.item_id.nunique() or prose.item_id.nunique(),
        }
        row["own_verdict"] = stats.non_inferiority(row["own_ce"], margin) if len(own) else ""
        if any(isinstance(x, Interval) and math.isfinite(x.estimate) for x in row.values()):
            rows.append(row)
    columns = [
        "condition", "bpb", "nats", "verdict", "kl", "kl_chats", "top1", "own_ce", "own_verdict",
        "documents",
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def guards_frame(study: Study, split: str = "test") -> Any:
    """Are the generated answers still text: distinct bigrams, repeated 4-grams, length."""
    rows = []
    for condition in study.picks(split):
        found = {m: study.where(condition, m, split) for m in ("distinct2", "rep4", "vader")}
        if found["distinct2"].empty and found["rep4"].empty:
            continue
        row: dict[str, Any] = {
            m: studies.interval(found[m], "value") for m in ("distinct2", "rep4")
        }
        texts = (found["distinct2"] if found["vader"].empty else found["vader"]).text
        words = texts.str.split().str.len()
        row |= {"condition": condition, "empty": (words == 0).mean(), "words": words.mean()}
        rows.append(row)
    return pd.DataFrame(rows, columns=["condition", "distinct2", "rep4", "empty", "words"])


def headline_table(study: Study, measure: Measure) -> Table:
    """The behavior effect of every arm on test, with the out-of-distribution split beside it."""
    frame = headline_frame(study, measure)
    ood = {r.condition: r for r in frame[frame.split == "ood"].itertuples()}
    rows = [
        [
            r.condition.name,
            number(r.mean.estimate),
            interval(r.delta),
            number(r.dz, 2, signed=True),
            percent(r.against),
            f"{r.n} ({r.clusters})",
            str(r.seeds),
            interval(ood[r.condition].delta) if r.condition in ood else "–",
            number(ood[r.condition].dz, 2, signed=True) if r.condition in ood else "–",
        ]
        for r in frame[frame.split == "test"].itertuples()
    ]
    header = [
        "Arm", "Mean", f"Δ vs base {_CI}", "d_z", "Against", "Items (clusters)", "Seeds",
        f"Δ, ood {_CI}", "d_z, ood",
    ]  # fmt: skip
    role = "primary measure" if measure == study.primary else "secondary measure"
    note = "No test-split rows of this measure yet."
    return Table(f"{measure.label} ({role})", captions.HEADLINE, header, rows, note)


def family_table(study: Study, measure: Measure) -> Table:
    """Family A as text."""
    frame = family_frame(study, measure)
    rows = [
        [
            f"{r.dual.name} vs {r.rival.name}",
            interval(r.advantage),
            number(r.dz, 2, signed=True),
            p_value(r.p),
            p_value(r.p_holm),
            str(r.n),
            r.verdict,
        ]
        for r in frame.itertuples()
    ]
    header = ["Comparison", f"Advantage {_CI}", "d_z", "p", "p (Holm)", "Items", "Verdict"]
    done = {r.rival.arm for r in frame.itertuples()}
    absent = [rival for rival in RIVALS if rival not in done]
    text = captions.FAMILY if measure == study.primary else captions.EXPLORATORY
    caption = text.format(tests=len(frame)) + _budget_note(study)
    caption += f" Not run: {', '.join(absent)}." if absent else ""
    title = f"Dual against its rivals: {measure.label}"
    return Table(title, caption, header, rows, "The dual arm has no test rows yet.")


def _budget_note(study: Study) -> str:
    """What online steering costs beside dual: is the comparison fair?"""
    costs = []
    for sign in (1, -1):
        for arm in ("dual", "steer"):
            condition = study.pick(arm, sign)
            if condition is not None and math.isfinite(kl := study.kl(condition)):
                costs.append(f"{condition.name}: {number(kl)}")
    return f" KL on neutral prose, nats/token ({', '.join(costs)})." if costs else ""


def retention_table(study: Study, margin: float = MARGIN) -> Table:
    """Retention as text."""
    frame = retention_frame(study, margin)
    rows = [
        [
            r.condition.name,
            interval(r.bpb, 4),
            interval(r.nats),
            r.verdict or "–",
            interval(r.own_ce),
            r.own_verdict or "–",
            interval(r.kl, signed=False),
            interval(r.kl_chats, signed=False),
            percent(r.top1.estimate),
        ]
        for r in frame.itertuples()
    ]
    columns = "Arm|Δ bits/byte|Δ nats/token|Verdict|Δ own CE|Verdict|KL, prose|KL, chats|Top-1"
    documents = int(frame.documents.max()) if len(frame) else 0
    caption = captions.RETENTION.format(margin=margin, documents=documents)
    return Table("Retention", caption, columns.split("|"), rows, "No retention rows yet.")


def guards_table(study: Study) -> Table:
    """Generation guards as text."""
    rows = [
        [r.condition.name, number(r.distinct2.estimate), number(r.rep4.estimate), percent(r.empty)]
        + [number(r.words, 1)]
        for r in guards_frame(study).itertuples()
    ]
    header = ["Arm", "Distinct-2", "Repeated 4-grams", "Empty", "Words"]
    return Table("Generation guards", captions.GUARDS, header, rows, "No generation guards yet.")


def markdown(table: Table) -> str:
    """GitHub Markdown of a table: title, rows, caption."""
    lines = [f"**{table.title}**", ""]
    if not table.rows:
        return "\n".join([*lines, table.note, ""])
    lines += [
        "| " + " | ".join(table.header) + " |",
        "|:--" + "|--:" * (len(table.header) - 1) + "|",
    ]
    lines += ["| " + " | ".join(row) + " |" for row in table.rows]
    return "\n".join([*lines, "", f"<sub>{table.caption}</sub>", ""])


def headline_markdown(study: Study) -> str:
    """The headline table of every measure."""
    return _each(study, headline_table)


def family_markdown(study: Study) -> str:
    """Family A on the primary measure."""
    return markdown(family_table(study, study.primary)) if study.primary else ""


def retention_markdown(study: Study, margin: float = MARGIN) -> str:
    """The retention table."""
    return markdown(retention_table(study, margin))


def _each(study: Study, build: Callable[[Study, Measure], Table]) -> str:
    return "\n".join(markdown(build(study, measure)) for measure in study.measures())


def number(x: float | None, digits: int = 3, signed: bool = False) -> str:
    """Fixed decimals with a real minus sign; an en dash for what is missing."""
    if x is None or not math.isfinite(x):
        return "–"
    text = f"{x:{'+' if signed else ''}.{digits}f}"
    return text.replace("-", "−")


def interval(x: Interval | None, digits: int = 3, signed: bool = True) -> str:
    """Estimate [low, high]."""
    if not isinstance(x, Interval) or not math.isfinite(x.estimate):
        return "–"
    low, high = (number(v, digits, signed) for v in (x.low, x.high))
    return f"{number(x.estimate, digits, signed)} [{low}, {high}]"


def percent(x: float | None) -> str:
    """A share as a percentage."""
    return "–" if x is None or not math.isfinite(x) else f"{100 * x:.1f} %"


def p_value(p: float) -> str:
    """Three decimals, or "< .001"."""
    return "–" if math.isnan(p) else ("< .001" if p < 0.001 else f"{p:.3f}")


def condition_note(condition: Condition) -> str:
    """Where and how strongly a steered condition steers."""
    dose = f"{condition.dose:+g}".replace("-", "−")
    where = f"layer {condition.layer}" if condition.layer >= 0 else "several layers"
    return f"{condition.name}: {where}, dose {dose}"
