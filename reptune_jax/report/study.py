"""A study folder in memory: results, training curves, provenance, and how arms are paired."""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from reptune_jax import folder as folders
from reptune_jax.config import TUNED_ARMS
from reptune_jax.data import behavior as behaviors
from reptune_jax.data.schema import Item
from reptune_jax.evals import measures, results, stats
from reptune_jax.evals.measures import Measure
from reptune_jax.evals.stats import Interval
from reptune_jax.reading import reading
from reptune_jax.vectors.steering_vector import SteeringVector
from reptune_jax.watch import log

SIGNS = {1: "+", -1: "−", 0: ""}
_KEY = ["item_id", "template", "format", "order"]


@dataclasses.dataclass(frozen=True, order=True)
class Setting:
    """What is compared: an arm, its sign and, if it has one, dose or scale and layer.

    Training seeds lie within.
    """

    arm: str
    sign: int = 0
    k: float = 0.0
    layer: int = -1

    @property
    def name(self) -> str:
        """E.g. "dual +", "steer −", "token + × 1.3" of a tuned arm that is scaled."""
        scale = f" × {self.k:g}" if self.k and self.arm in TUNED_ARMS else ""
        return f"{self.arm} {SIGNS[self.sign]}{scale}".strip()

    @property
    def dose(self) -> float:
        """The dose with the sign it was added with."""
        return self.k if self.k < 0 else self.k * (self.sign or 1)


BASE = Setting("base")
MARGIN = 0.02  # nats per token, the default non-inferiority margin
Cell = tuple[Setting, str, str, str]  # setting, metric, split, format


@dataclasses.dataclass(frozen=True, eq=False)
class Study:
    """Everything the report reads."""

    folder: folders.Study
    rows: pd.DataFrame
    curves: pd.DataFrame  # metrics.jsonl of every run, with run, arm, sign, seed
    config: dict[str, Any]
    vector: dict[str, Any]
    prompts: dict[str, str]  # item_id -> the user's last message
    negated: frozenset[str]  # item_ids of claims with a "not"
    primary: Measure | None
    primary_chosen: bool = False  # by the caller, against what the study declared
    kl_budget: float | None = None
    margin: float = MARGIN
    tags: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # item_id -> "key:…"

    @functools.cached_property
    def cells(self) -> dict[Cell, pd.DataFrame]:
        """The rows of each (setting, metric, split, format); looking one up costs nothing."""
        rows = self.rows[~self.rows.metric.isin(["cos", "judge"])]
        cells: dict[Cell, pd.DataFrame] = {}
        keys = ["arm", "sign", "k", "layer", "metric", "split", "format"]
        for (arm, sign, k, layer, *rest), found in rows.groupby(keys, sort=False):
            setting = BASE if arm == "base" else Setting(arm, int(sign), k, int(layer))
            cells[setting, *rest] = found
        return cells

    def where(self, setting: Setting, metric: str, split: str = "") -> pd.DataFrame:
        """The rows of one setting and metric, of one split or of all."""
        found = [
            rows
            for (c, m, s, _), rows in self.cells.items()
            if c == setting and m == metric and split in ("", s)
        ]
        return found[0] if len(found) == 1 else pd.concat([self.rows.iloc[:0], *found])

    def answers(self, setting: Setting, split: str) -> pd.DataFrame:
        """Generated answers with the judge's score as `value`; NaN where there is no judge.

        Without those that are missing.
        """
        if self.judged and len(rows := self.measured(setting, self.judged, split)):
            return rows[rows.value.notna()]
        rows = self.where(setting, "distinct2", split)  # texts are there
        return rows[rows.value.notna()].assign(value=math.nan)

    @property
    def judged(self) -> Measure | None:
        """The measure that judges generated answers, if the study has one."""
        return next((m for m in self.measures() if m.judged), None)

    def measured(self, setting: Setting, measure: Measure, split: str) -> pd.DataFrame:
        """The rows of one setting and behavior measure."""
        key = (setting, measure.metric, split, measure.format)
        return self.cells.get(key, self.rows.iloc[:0])

    def settings(self, metric: str = "", split: str = "", form: str = "") -> list[Setting]:
        """All settings with such rows, in the order of `results.ARMS`, + before −, then dose."""
        asked = (metric, split, form)
        fits = [
            c for c, *of in self.cells if all(a in ("", b) for a, b in zip(asked, of, strict=True))
        ]
        return sorted(set(fits), key=lambda c: (results.ARMS.index(c.arm), -c.sign, c.layer, c.k))

    def measures(self) -> list[Measure]:
        """The behavior measures present: the primary one first, then what a judge gives."""
        present = {f"{m}:{f}" for _, m, s, f in self.cells if s in ("val", "test", "ood")}
        found = [measure for measure in measures.known() if str(measure) in present]
        return sorted(found, key=lambda m: (m != self.primary, not m.judged))

    def kl(self, setting: Setting, split: str = "neutral") -> float:
        """KL(base || setting) in nats per token; nan if not measured, 0 for base."""
        rows = self.where(setting, "kl", split)
        if setting == BASE or rows.empty:
            return 0.0 if setting == BASE else math.nan
        weights = rows.n_tokens if (rows.n_tokens > 0).all() else None
        return float(np.average(rows.value, weights=weights))

    def pick(self, arm: str, sign: int, split: str = "test") -> Setting | None:
        """The setting that stands for an arm: its only one, else the val-best within a budget.

        The budget is the dual arm's own KL on neutral prose (equal side effects), or `kl_budget`.
        A dose between swept ones has no validation rows; then it is the one that comes closest to
        the budget from below. One with missing values is taken only where there is no other: what
        is not known is not cheap, and a mean over the rest is one over other items.
        """
        if arm == "base":
            return BASE
        options = [c for c in self.settings(split=split) if (c.arm, c.sign) == (arm, sign)]
        # Of tuned arms the run as it was trained; how far it is scaled is another question.
        options = [c for c in options if arm not in TUNED_ARMS or not c.k]
        if len(options) <= 1 or self.primary is None:
            return options[0] if options else None
        options = [c for c in options if not self.missing(c)] or options
        budget, known = self.budget(sign), [c for c in options if math.isfinite(self.kl(c))]
        # A twentieth over: a dose interpolated to equal KL never meets it exactly.
        within = [c for c in known if self.kl(c) <= 1.05 * budget]
        within = within or ([min(known, key=self.kl)] if known else options)
        gains = {c: sign * self.delta(c, BASE, self.primary, "val").delta.mean() for c in within}
        if all(map(math.isfinite, gains.values())):
            return max(within, key=lambda c: gains[c])
        return max(within, key=lambda c: np.nan_to_num(self.kl(c)))

    def at_equal_kl(self, arm: str, sign: int, split: str = "test") -> Setting | None:
        """The scale of a tuned arm that `evals.dial` tested, if it did; else as `pick`."""
        scaled = [c for c in self.settings(split=split) if (c.arm, c.sign) == (arm, sign) and c.k]
        return scaled[0] if scaled and arm in TUNED_ARMS else self.pick(arm, sign, split)

    def missing(self, setting: Setting) -> dict[tuple[str, str], tuple[int, int]]:
        """(metric, split) -> how many values are missing, of how many; only where some are."""
        counts: dict[tuple[str, str], tuple[int, int]] = {}
        for (c, metric, split, _), rows in self.cells.items():
            if c == setting and (bad := int(rows.value.isna().sum())):
                before = counts.get((metric, split), (0, 0))
                counts[metric, split] = before[0] + bad, before[1] + len(rows)
        return counts

    def picks(self, split: str = "test", skip: Iterable[str] = ()) -> list[Setting]:
        """One setting for each arm and sign that was run on `split`."""
        names = dict.fromkeys((c.arm, c.sign) for c in self.settings(split=split))
        picked = [self.pick(arm, sign, split) for arm, sign in names if arm not in skip]
        return [c for c in picked if c is not None]

    def budget(self, sign: int) -> float:
        """The KL on neutral prose (nats/token) that a swept arm may cost to be compared."""
        if self.kl_budget is not None:
            return self.kl_budget
        dual = self.kl(Setting("dual", sign))
        return dual if math.isfinite(dual) else math.inf

    def delta(self, a: Setting, b: Setting, measure: Measure, split: str) -> pd.DataFrame:
        """Paired differences a - b per item, template, order and seed, in the column `delta`.

        Kept, since most tables and figures ask for the same ones: not to be changed.
        """
        key = a, b, measure, split
        if key not in self._deltas:
            both = self.measured(a, measure, split), self.measured(b, measure, split)
            self._deltas[key] = pair(*both)
        return self._deltas[key]

    @functools.cached_property
    def _deltas(self) -> dict[tuple[Setting, Setting, Measure, str], pd.DataFrame]:
        return {}


def pair(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    """Rows of a matched with b's by item, template, format and order; `delta` = a - b.

    Seeds are matched when both have the same ones; otherwise b is averaged over its seeds.
    """
    keys = list(_KEY)
    if set(a.seed) == set(b.seed):
        keys.append("seed")
    right = b.groupby(keys, as_index=False)["value"].mean()
    both = a.merge(right, on=keys, suffixes=("", "_b"))
    both["delta"] = both["value"] - both["value_b"]
    return both


def per_item(paired: pd.DataFrame) -> pd.Series:
    """Mean difference of each item over its templates, orders and seeds."""
    return paired.dropna(subset="delta").groupby("item_id")["delta"].mean()


def interval(rows: pd.DataFrame, column: str = "delta", weights: str | None = None) -> Interval:
    """Two-level (seed, cluster) bootstrap of the mean of a column."""
    if rows.empty:
        return Interval(math.nan, math.nan, math.nan, n_seeds=0)
    weight = None if weights is None else rows[weights]
    return stats.bootstrap_mean(rows[column], rows.cluster, rows.seed, weight)


def per_token(rows: pd.DataFrame, column: str = "value") -> Interval:
    """Mean of a per-token quantity over documents, each weighing its number of tokens if known."""
    known = len(rows) and (rows.n_tokens > 0).all()
    return interval(rows, column, "n_tokens" if known else None)


def read(
    folder: str | Path,
    primary: str | None = None,
    kl_budget: float | None = None,
    margin: float = MARGIN,
) -> Study:
    """Reads a study folder.

    `primary` is "metric:format", e.g. "logodds:free"; by default what the study's config declares.
    """
    study = folders.Study(Path(folder))
    rows = results.read_study(study.path)
    config = folders.read_record(study) if study.config.exists() else {}
    declared = (config.get("config", {}).get("study") or {}).get("primary", "")
    items = _items(config, sorted(set(rows.behavior)))
    return Study(
        folder=study,
        rows=rows,
        curves=_curves(study),
        config=config,
        vector=_vector(study.vector),
        prompts={i.id: t["content"] for i in items for t in i.messages if t["role"] == "user"},
        negated=frozenset(item.id for item in items if item.tag("negated") == "1"),
        primary=_primary(rows, primary or declared),
        primary_chosen=bool(primary) and primary != declared,
        kl_budget=kl_budget,
        margin=margin,
        tags={item.id: item.tags for item in items},
    )


def _primary(rows: pd.DataFrame, named: str) -> Measure | None:
    """The measure of this name; without one claims, then other log-odds, then what is judged."""
    stored = set(rows.metric + ":" + rows.format)
    present = {str(measure): measure for measure in measures.known() if str(measure) in stored}
    if named in present:
        return present[named]
    if named:
        raise ValueError(f"primary: got {named!r}, expected one of: {', '.join(present)}.")
    return min(present.values(), key=lambda m: (m.judged, m.format != "claim"), default=None)


def config_value(config: Any, name: str) -> Any:
    """The first value under this key anywhere in a nested config, or None."""
    if not isinstance(config, dict):
        return None
    if name in config and not isinstance(config[name], dict):
        return config[name]
    found = (config_value(value, name) for value in config.values())
    return next((value for value in found if value is not None), None)


def config_sha(config: dict[str, Any]) -> str:
    """Digest of the resolved values."""
    text = json.dumps(config.get("config", config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12] if config else ""


def _vector(path: Path) -> dict[str, Any]:
    """What is known of the study's vector, its layers, and the digest of its file."""
    if not path.exists():
        return {}
    vector = SteeringVector.load(path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return vector.meta | {"layers": list(vector.layers), "sha256": sha256}


def _items(config: dict[str, Any], names: list[str]) -> list[Item]:
    """Of the study's own behavior file, else of the shipped behaviors; none where it is gone."""
    for name in (config_value(config, "behavior"), *names):
        try:
            return list(behaviors.load(name).items)
        except (ValueError, FileNotFoundError, TypeError):
            continue
    return []


def _curves(study: folders.Study) -> pd.DataFrame:
    parts = []
    for run in study.metrics():
        lines = list(log.read(run.metrics))
        name = folders.RunName.parse(run.path.name) or folders.RunName(run.path.name, 0, 0)
        if lines:
            # A resumed run logs some steps again: the later value is the one that counts.
            with reading(run.metrics, "Every line is an object of numbers."):
                logged = pd.DataFrame(lines).astype(float)
                steps = logged.astype({"step": int}).groupby("step", as_index=False).last()
            parts.append(steps.assign(run=run.path.name, **name._asdict()))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
