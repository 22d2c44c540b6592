"""A study folder in memory: results, training curves, provenance, and how arms are paired."""

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors import safe_open

from reptune_jax.evals import results, stats
from reptune_jax.evals.stats import Interval

BEHAVIORS = Path(__file__).parent.parent / "data" / "behaviors"
SIGNS = {1: "+", -1: "−", 0: ""}
_RUN = re.compile(r"(?P<arm>[a-z]+)(?P<sign>[+-])_s(?P<seed>\d+)")
_KEY = ["item_id", "template", "format", "order"]
_MEASURES = (("vader", "free"), ("logodds", "free"), ("logodds", "claim"), ("logodds", "ab"))
_PRIMARY = (("logodds", "claim"), ("logodds", "free"), ("logodds", "ab"), ("vader", "free"))


@dataclasses.dataclass(frozen=True, order=True)
class Condition:
    """What is compared: an arm, its sign and, for steering, dose and layer; seeds lie within."""

    arm: str
    sign: int = 0
    k: float = 0.0
    layer: int = -1

    @property
    def name(self) -> str:
        """E.g. "dual +", "steer −"."""
        return f"{self.arm} {SIGNS[self.sign]}".strip()

    @property
    def dose(self) -> float:
        """The dose with the sign it was added with."""
        return self.k if self.k < 0 else self.k * (self.sign or 1)


BASE = Condition("base")


@dataclasses.dataclass(frozen=True)
class Measure:
    """A behavior metric on one format of items, never pooled with another format's scale."""

    metric: str
    format: str

    @property
    def label(self) -> str:
        """What the number is, for headings and axes."""
        if self.metric == "vader":
            return "VADER of generated answers"
        kind = {"free": "open prompts", "claim": "claims", "ab": "scenarios"}
        return f"Log-odds, {kind.get(self.format, self.format)} (nats)"


Cell = tuple[Condition, str, str, str]  # condition, metric, split, format


@dataclasses.dataclass(frozen=True, eq=False)
class Study:
    """Everything the report reads."""

    folder: Path
    rows: pd.DataFrame
    curves: pd.DataFrame  # metrics.jsonl of every run, with run, arm, sign, seed
    config: dict[str, Any]
    vector: dict[str, Any]
    prompts: dict[str, str]  # item_id -> the user's last message
    negated: frozenset[str]  # item_ids of claims with a "not"
    primary: Measure | None
    primary_chosen: bool = False  # by the caller, instead of by the default order
    kl_budget: float | None = None

    @functools.cached_property
    def cells(self) -> dict[Cell, pd.DataFrame]:
        """The rows of each (condition, metric, split, format); looking one up costs nothing."""
        rows = self.rows[~self.rows.metric.isin(["cos", "judge"])]
        cells: dict[Cell, pd.DataFrame] = {}
        keys = ["arm", "sign", "k", "layer", "metric", "split", "format"]
        for (arm, sign, k, layer, *rest), found in rows.groupby(keys, sort=False):
            condition = BASE if arm == "base" else Condition(arm, int(sign), k, int(layer))
            cells[condition, *rest] = found
        return cells

    def where(self, condition: Condition, metric: str, split: str = "") -> pd.DataFrame:
        """The rows of one condition and metric, of one split or of all."""
        found = [
            rows
            for (c, m, s, _), rows in self.cells.items()
            if c == condition and m == metric and split in ("", s)
        ]
        return found[0] if len(found) == 1 else pd.concat([self.rows.iloc[:0], *found])

    def measured(self, condition: Condition, measure: Measure, split: str) -> pd.DataFrame:
        """The rows of one condition and behavior measure."""
        key = (condition, measure.metric, split, measure.format)
        return self.cells.get(key, self.rows.iloc[:0])

    def conditions(self, metric: str = "", split: str = "", form: str = "") -> list[Condition]:
        """All conditions with such rows, in the order of `results.ARMS`, + before −, then dose."""
        arms = {
            c
            for c, m, s, f in self.cells
            if metric in ("", m) and split in ("", s) and form in ("", f)
        }
        return sorted(arms, key=lambda c: (results.ARMS.index(c.arm), -c.sign, c.layer, c.k))

    def measures(self) -> list[Measure]:
        """The behavior measures present, the primary one first."""
        present = {(m, f) for _, m, s, f in self.cells if s in ("val", "test", "ood")}
        known = [Measure(*pair) for pair in _MEASURES if pair in present]
        return sorted(known, key=lambda m: m != self.primary)

    def kl(self, condition: Condition, split: str = "neutral") -> float:
        """KL(base || condition) in nats per token; nan if not measured, 0 for base."""
        rows = self.where(condition, "kl", split)
        if condition == BASE or rows.empty:
            return 0.0 if condition == BASE else math.nan
        weights = rows.n_tokens if (rows.n_tokens > 0).all() else None
        return float(np.average(rows.value, weights=weights))

    def pick(self, arm: str, sign: int, split: str = "test") -> Condition | None:
        """The condition that stands for an arm: its only one, else the val-best within a budget.

        The budget is the dual arm's own KL on neutral prose (equal side effects), or `kl_budget`.
        A dose between swept ones has no validation rows; then it is the one that comes closest to
        the budget from below.
        """
        if arm == "base":
            return BASE
        options = [c for c in self.conditions(split=split) if (c.arm, c.sign) == (arm, sign)]
        if len(options) <= 1 or self.primary is None:
            return options[0] if options else None
        budget = self.budget(sign)
        # A twentieth over: a dose interpolated to equal KL never meets it exactly.
        within = [c for c in options if not self.kl(c) > 1.05 * budget]
        within = within or [min(options, key=self.kl)]
        gains = {c: sign * self.delta(c, BASE, self.primary, "val").delta.mean() for c in within}
        if all(map(math.isfinite, gains.values())):
            return max(within, key=lambda c: gains[c])
        return max(within, key=lambda c: np.nan_to_num(self.kl(c)))

    def picks(self, split: str = "test", skip: Iterable[str] = ()) -> list[Condition]:
        """One condition for each arm and sign that was run on `split`."""
        names = dict.fromkeys((c.arm, c.sign) for c in self.conditions(split=split))
        picked = [self.pick(arm, sign, split) for arm, sign in names if arm not in skip]
        return [c for c in picked if c is not None]

    def budget(self, sign: int) -> float:
        """The KL on neutral prose (nats/token) that a swept arm may cost to be compared."""
        if self.kl_budget is not None:
            return self.kl_budget
        dual = self.kl(Condition("dual", sign))
        return dual if math.isfinite(dual) else math.inf

    def delta(self, a: Condition, b: Condition, measure: Measure, split: str) -> pd.DataFrame:
        """Paired differences a - b per item, template, order and seed, in the column `delta`."""
        return pair(self.measured(a, measure, split), self.measured(b, measure, split))


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


def read(folder: str | Path, primary: str | None = None, kl_budget: float | None = None) -> Study:
    """Reads a study folder; `primary` is "metric:format", e.g. "logodds:free"."""
    folder = Path(folder)
    rows = results.read_study(folder)
    config = _json(folder / "config.json")
    present = set(rows[["metric", "format"]].drop_duplicates().itertuples(index=False, name=None))
    chosen = next((Measure(*pair) for pair in _PRIMARY if pair in present), None)
    if primary:
        metric, _, kind = primary.partition(":")
        chosen = Measure(metric, kind)
        if (metric, kind) not in present:
            known = ", ".join(sorted(f"{m}:{f}" for m, f in present & set(_PRIMARY)))
            raise ValueError(f"primary: got {primary!r}, expected one of: {known}.")
    items = _items(sorted(set(rows.behavior)))
    return Study(
        folder=folder,
        rows=rows,
        curves=_curves(folder),
        config=config,
        vector=_vector(folder / "vector.safetensors"),
        prompts={item["id"]: _prompt(item) for item in items},
        negated=frozenset(item["id"] for item in items if "negated:1" in item["tags"]),
        primary=chosen,
        primary_chosen=bool(primary),
        kl_budget=kl_budget,
    )


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


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _vector(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    with safe_open(path, framework="numpy") as f:
        about = dict(f.metadata() or {})
    meta = json.loads(about.pop("meta", "{}"))
    return meta | about | {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()[:12]}


def _items(behaviors: list[str]) -> list[dict[str, Any]]:
    """Rows of the shipped ones among these behaviors."""
    paths = [BEHAVIORS / f"{name}.jsonl" for name in behaviors]
    return [
        json.loads(line)
        for path in paths
        if path.exists()
        for line in path.read_text().splitlines()
    ]


def _prompt(item: dict[str, Any]) -> str:
    turns = [m["content"] for m in item["messages"] if m["role"] == "user"]
    return turns[-1] if turns else ""


def _curves(folder: Path) -> pd.DataFrame:
    parts = []
    for path in sorted(folder.glob("**/metrics.jsonl")):
        lines = [row for row in map(_loads, path.read_text().splitlines()) if row is not None]
        run = path.parent.name
        named = _RUN.fullmatch(run)
        sign = 0 if named is None else (1 if named["sign"] == "+" else -1)
        arm, seed = (named["arm"], int(named["seed"])) if named else (run, 0)
        if lines:
            # A resumed run logs some steps again: the later value is the one that counts.
            steps = pd.DataFrame(lines).groupby("step", as_index=False).last()
            parts.append(steps.assign(run=run, arm=arm, sign=sign, seed=seed))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _loads(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None  # the last line of a run that is still writing
