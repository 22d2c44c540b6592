"""From rows to verdicts: what an attack found or took away, at which cost.

No word here says that a model is secure: an attack broke it, or did not within its budget.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from reptune_jax.evals import results, stats
from reptune_jax.evals.attacks.target import SPLIT
from reptune_jax.evals.stats import Interval

BROKEN, HELD, UNDECIDED = "broken", "not broken within budget", "undecided"
NOTHING = "no effect to attack"
UNSPECIFIC = "no better than a random direction"
TRACE = "a trace"  # of a vector: above chance, and nearer to all else than to it
DESTROYED = "beyond the budget of KL"
_HALF = 0.5  # of the effect: with less than that left a model is broken; of a vector, its |cos|
_KINDS = ("project", "ablate", "scale", "round", "prompt", "paraphrase", "relearn")
FREE = ("random", "control", "control-chat")  # what is tried for comparison only
# Of these the lead on the base treated likewise tells, which loses by it too: of the last one of
# log-odds, which are those of other texts.
LIKEWISE = ("round", "paraphrase", "prompt:words")
_ITEM = ["cluster", "item_id", "template", "order"]
_NO = Interval(np.nan, np.nan, np.nan)


class Removed(NamedTuple):
    """How much of its effect an attack took from an arm."""

    arm: str
    sign: int
    how: str
    k: float
    # (tuned - attacked) / (tuned - base): 1 all of it, more: turned round; 1 - kept where the base
    # is treated likewise.
    removed: Interval
    ahead: Interval  # of the same along a random direction; nan where there is none
    kept: Interval  # (attacked - base attacked likewise) / (tuned - base), where the base was
    flips: tuple[float, float]  # of its items that were on the sign's side; the base's
    kl: float  # to the untuned model on prose, nats/token
    items: int
    verdict: str


class Steered(NamedTuple):
    """The dose that brings an arm back to the untuned model."""

    arm: str
    sign: int
    dose: Interval
    random: Interval  # dose of a random direction of the same length
    shift: Interval  # doses that the tuning is worth along the vector
    resists: Interval  # dose - shift
    most: float  # the largest dose that was tried; an interval that reaches it is open
    verdict: str


class Found(NamedTuple):
    """How near to a vector an attacker comes: |cos| at the best layer, mean over seeds."""

    arm: str
    sign: int
    of: str  # "" = the behavior's vector; "own" = the random one that it was tuned toward
    blind: float  # one SVD of all that writes to the residual stream
    within: float  # length of the unit vector's projection on eight singular vectors
    layer: float  # an SVD of the best layer alone
    energy: float  # share of the change's squared norm along the first singular vector
    texts: dict[int, float]  # number of unrelated texts -> mean over sets
    first: dict[int, float]  # the same of their first five tokens
    again: float  # mean over layers, of one read on the tuned model, without the base
    again_base: float  # of one read on the untuned model from as many pairs
    chance: float
    least: int  # texts that are enough; 0: those that were tried are not
    in_weights: str
    in_activations: str


class Copied(NamedTuple):
    """What the base does when steered by what was found of the vector."""

    arm: str
    sign: int
    how: str  # found: by one SVD of the change; texts: by activations; random: for comparison
    share: Interval  # (so steered - base) / (steered by the vector - base)
    kl: float  # to the untuned model on prose, nats/token
    vector_kl: float  # of the vector itself
    verdict: str


@dataclasses.dataclass(frozen=True, eq=False)
class Attacks:
    """The rows of all attacks of a study."""

    rows: pd.DataFrame
    max_kl: float

    @classmethod
    def of(cls, rows: pd.DataFrame, max_kl: float) -> "Attacks":
        return cls(rows[rows.split == SPLIT], max_kl)

    @functools.cached_property
    def arms(self) -> list[tuple[str, int]]:
        """Those attacked, in the order of `results.ARMS`, + before −."""
        found = self.rows[["arm", "sign"]].drop_duplicates().itertuples(index=False)
        pairs = [(str(arm), int(sign)) for arm, sign in found if arm != "base"]
        return sorted(pairs, key=lambda pair: (results.ARMS.index(pair[0]), -pair[1]))

    @functools.cached_property
    def _parts(self) -> dict[tuple[str, int], pd.DataFrame]:
        return {(str(arm), int(s)): own for (arm, s), own in self.rows.groupby(["arm", "sign"])}

    def part(self, arm: str, sign: int) -> pd.DataFrame:
        """The rows of an arm."""
        return self._parts.get((arm, sign), self.rows.iloc[:0])

    def effects(self, arm: str, sign: int) -> "Effects":
        """An arm's values and the base's on the same items; `cells` are (how, k)."""
        own, base = (
            part[part.format != ""].pivot_table(
                index=index, columns=["position", "k"], values="value", aggfunc="first"
            )
            for part, index in (
                (self.part(arm, sign), [*_ITEM, "seed"]),
                (self.part("base", 0), _ITEM),
            )
        )
        given = bool((self.part("base", 0).metric == "logodds").any())
        return Effects(own, base.reindex(own.index.droplevel("seed")), sign, given)

    @functools.cached_property
    def kl(self) -> dict[tuple[Any, ...], float]:
        """(arm, sign, how, k) -> of what an attack left, nats/token."""
        rows = self.rows[self.rows.metric == "kl"]
        found = rows.groupby(["arm", "sign", "position", "k"])
        return {at: float(np.average(own["value"], weights=own.n_tokens)) for at, own in found}


@dataclasses.dataclass(frozen=True, eq=False)
class Effects:
    """Values of an arm's items by (how, k), and the base's of the same rows."""

    own: pd.DataFrame
    base: pd.DataFrame
    sign: int
    given: bool  # whether given answers are scored

    def values(self, how: str, k: float = 0.0, base: bool = False) -> np.ndarray:
        """In the direction of the sign; nan where it was not measured."""
        frame = self.base if base else self.own
        column = frame[how, k] if (how, k) in frame else pd.Series(np.nan, frame.index)
        return self.sign * column.to_numpy(float)

    def gone(self, how: str, k: float = 0.0) -> np.ndarray:
        """What an attack takes of each value; where that is what tells, of the lead on the base."""
        intact, own = self.values("intact"), self.values(how, k)
        if not self.led(how):
            return intact - own
        return intact - self.values("intact", base=True) - (own - self.likewise(how, k))

    def led(self, how: str) -> bool:
        """Whether an attack's verdict is of the lead on the base."""
        return how.startswith(LIKEWISE if self.given else LIKEWISE[:-1])

    def likewise(self, how: str, k: float = 0.0) -> np.ndarray:
        """The base's values under the same attack; of prompts, which it has of both signs."""
        asked = f"{how}:{self.sign:+d}" if how.startswith("prompt:") else how
        return self.values(asked, k, base=True)

    def interval(self, columns: list[np.ndarray], statistic: Any) -> Interval:
        """Of a statistic of the columns' means, over clusters and seeds."""
        index = self.own.index
        if not len(index):
            return _NO
        groups = (index.get_level_values(name) for name in ("cluster", "seed"))
        return stats.bootstrap_of_means(np.stack(columns, axis=1), statistic, *groups)

    def share(self, *parts: np.ndarray) -> Interval:
        """Of the effect: a mean over the effect's; of two, of their difference."""
        gone = parts[0] if len(parts) == 1 else parts[0] - parts[1]
        effect = self.values("intact") - self.values("intact", base=True)
        return self.interval([gone, effect], _ratio)

    @functools.cached_property
    def effect(self) -> Interval:
        """The arm's to the base, toward its sign."""
        delta = self.values("intact") - self.values("intact", base=True)
        return self.interval([delta], lambda m: m[:, 0])


@functools.lru_cache(maxsize=2)
def removed(attacks: Attacks) -> list[Removed]:
    """Every edit, rounding and prompt that was tried, on every arm."""
    found = []
    for arm, sign in attacks.arms:
        effects = attacks.effects(arm, sign)
        for how, k in effects.own.columns:
            if how.partition(":")[0] in _KINDS:
                found.append(_removed(attacks, effects, arm, how, k))
    return found


def _removed(attacks: Attacks, effects: Effects, arm: str, how: str, k: float) -> Removed:
    sign, (kind, _, what) = effects.sign, how.partition(":")
    intact, own = effects.values("intact"), effects.values(how, k)
    base = effects.values("intact", base=True)
    base_own = effects.likewise(how, k)
    gone, kept = effects.share(effects.gone(how, k)), effects.share(own - base_own)
    control = effects.values(f"{kind}:random", k)
    ahead = effects.share(control - own) if what not in ("random", "") else _NO
    kl, before = (attacks.kl.get((arm, sign, *at), np.nan) for at in ((how, k), ("intact", 0.0)))
    if not (effects.effect.low > 0):
        verdict = NOTHING
    elif effects.led(how):  # a reduction that the base has too is not the tuning's
        verdict = BROKEN if kept.high < _HALF else HELD if kept.low > _HALF else UNDECIDED
    elif kl > max(attacks.max_kl, before):
        verdict = DESTROYED
    elif gone.low > _HALF:
        unspecific = np.isfinite(ahead.estimate) and not ahead.low > 0
        verdict = UNSPECIFIC if unspecific else BROKEN
    else:
        verdict = HELD if gone.high < _HALF else UNDECIDED
    flips = _flips(intact, own), _flips(base, base_own)
    items = int(np.isfinite(own).sum())
    return Removed(arm, sign, how, k, gone, ahead, kept, flips, kl, items, verdict)


def _flips(before: np.ndarray, after: np.ndarray) -> float:
    """Share of what was on the sign's side that no longer is."""
    there = (before > 0) & np.isfinite(after)
    return float((after[there] <= 0).mean()) if there.any() else np.nan


@functools.lru_cache(maxsize=2)
def steered(attacks: Attacks) -> list[Steered]:
    """What it takes to steer every arm back."""
    each = (_steered(attacks, arm, sign) for arm, sign in attacks.arms)
    return [one for one in each if one]


def _steered(attacks: Attacks, arm: str, sign: int) -> Steered | None:
    effects, rows = attacks.effects(arm, sign), attacks.part(arm, sign)
    doses = sorted({-sign * k for how, k in effects.own.columns if how == "counter:vector"})
    if not doses:
        return None
    grid, index = np.array([0.0, *doses]), effects.own.index
    shift = rows[rows.metric == "shift"].groupby(["item_id", "seed"])["value"].first() * sign
    at = [index.get_level_values(name) for name in ("item_id", "seed")]
    a_I = shift.reindex(pd.MultiIndex.from_arrays(at)).to_numpy(float)
    base, intact = effects.values("intact", base=True), effects.values("intact")
    own, random = (
        [base, intact, *(effects.values(f"counter:{name}", -sign * d) for d in doses)]
        for name in ("vector", "random")
    )

    def dose(m: np.ndarray) -> np.ndarray:
        return crossing(m[:, 1 : 1 + len(grid)], m[:, 0], grid)

    worth, most = effects.interval([a_I], lambda m: m[:, 0]), float(grid[-1])
    if not (effects.effect.low > 0):
        return Steered(arm, sign, _NO, _NO, worth, _NO, most, NOTHING)
    needed, against = effects.interval(own, dose), effects.interval(random, dose)
    resists = effects.interval([*own, a_I], lambda m: dose(m) - m[:, -1])
    verdict = BROKEN if needed.high < most else HELD if needed.low >= most else UNDECIDED
    return Steered(arm, sign, needed, against, worth, resists, most, verdict)


def crossing(curve_RxK: np.ndarray, level_R: np.ndarray, doses_K: np.ndarray) -> np.ndarray:
    """The smallest dose at which each curve is down to its level, [R]; the largest if none is.

    Linear between doses.
    """
    below_RxK = curve_RxK <= level_R[:, None]
    last_R = np.where(below_RxK.any(1), below_RxK.argmax(1), len(doses_K) - 1)
    rows, before_R = np.arange(len(curve_RxK)), np.maximum(last_R - 1, 0)
    high_R, low_R = curve_RxK[rows, before_R], curve_RxK[rows, last_R]
    fall_R = high_R - low_R
    share_R = np.where(fall_R > 0, (high_R - level_R) / np.where(fall_R > 0, fall_R, 1), 1.0)
    dose_R = doses_K[before_R] + np.clip(share_R, 0, 1) * (doses_K[last_R] - doses_K[before_R])
    return np.where(below_RxK.any(1), dose_R, doses_K[-1])


@functools.lru_cache(maxsize=2)
def copied(attacks: Attacks) -> list[Copied]:
    """Every arm's, as far as the vector itself moves the base; of a singular vector's two sides the
    better one."""
    out = []
    for arm, sign in attacks.arms:
        effects = attacks.effects(arm, sign)
        base = effects.values("intact", base=True)
        by = {
            how.partition(":")[2]: effects.values(how, k) - base
            for how, k in effects.own.columns
            if how.startswith("function:")
        }
        if "vector" not in by:
            continue
        vector = by.pop("vector")
        moves = effects.interval([vector], _mean).low > 0
        shares = {how: effects.interval([own, vector], _ratio) for how, own in by.items()}
        sides = [how for how in ("found+", "found-") if how in shares]
        if sides:
            best = max(sides, key=lambda how: shares[how].estimate)
            shares = {"found": shares[best]} | {h: s for h, s in shares.items() if h not in sides}
        for how, share in shares.items():
            at = "function:" + (best if how == "found" else how)
            verdict = _half(share) if moves else NOTHING
            if verdict == BROKEN and "random" in by:  # which may do as much
                lead = effects.interval([effects.values(at) - base - by["random"]], _mean)
                verdict = BROKEN if lead.low > 0 else UNSPECIFIC
            kl, own_kl = (
                attacks.kl.get((arm, sign, one, 0.0), np.nan) for one in (at, "function:vector")
            )
            out.append(Copied(arm, sign, how, share, kl, own_kl, verdict))
    return out


def _ratio(means_Rx2: np.ndarray) -> np.ndarray:
    return means_Rx2[:, 0] / np.where(means_Rx2[:, 1], means_Rx2[:, 1], np.nan)


def _mean(means_Rx1: np.ndarray) -> np.ndarray:
    return means_Rx1[:, 0]


def _half(share: Interval) -> str:
    """Whether at least half of it is shown to be there."""
    return BROKEN if share.low > _HALF else HELD if share.high < _HALF else UNDECIDED


@functools.lru_cache(maxsize=2)
def found(attacks: Attacks) -> list[Found]:
    """How near an attacker comes to the vector, of every arm; of a random one also its own."""
    out = []
    for arm, sign in attacks.arms:
        rows = attacks.part(arm, sign)
        numbers = rows[rows.metric.isin(["aligned", "energy", "null"])]
        own = numbers.position.str.endswith(":own")
        if numbers.empty:
            continue
        out.append(_found(attacks, numbers[~own], arm, sign, ""))
        if own.any():
            both = numbers[own | (numbers.metric != "aligned")]
            out.append(_found(attacks, both, arm, sign, "own"))
    return out


def _found(attacks: Attacks, rows: pd.DataFrame, arm: str, sign: int, of: str) -> Found:
    aligned = rows[rows.metric == "aligned"]
    place = aligned.position.str.removesuffix(":own")

    def best(how: str, k: float) -> pd.Series:
        """Of each seed, at its best layer."""
        return aligned[(place == how) & (aligned.k == k)].groupby("seed")["value"].max()

    chance = float(rows[rows.metric == "null"]["value"].max())
    energy = rows[(rows.position == "weights:blind") & (rows.metric == "energy")]["value"].mean()
    texts = {p: _by_texts(aligned[place == f"activations:{p}"]) for p in ("all", "first5")}
    blind = best("weights:blind", 1.0)
    base = attacks.part("base", 0)
    base = base[(base.position == "again") & (base.metric == "aligned")]
    in_weights = "" if blind.isna().all() else _nearness(blind, chance)
    words = {n: _nearness(each, chance) for n, each in texts["all"].items()}
    in_texts = next((word for word in (BROKEN, TRACE, HELD) if word in words.values()), "")
    enough = [n for n, word in words.items() if word == in_texts != HELD]
    means = {p: {n: float(each.mean()) for n, each in of_n.items()} for p, of_n in texts.items()}
    return Found(
        arm, sign, of, blind.mean(), best("weights:blind", 8.0).mean(),
        best("weights:layer", 1.0).mean(), energy, means["all"], means["first5"],
        aligned[place == "again"]["value"].mean(), base["value"].mean(), chance,
        min(enough, default=0), in_weights, in_texts,
    )  # fmt: skip


def _nearness(cos: pd.Series, chance: float) -> str:
    """Of what every seed's found direction is to the vector."""
    return BROKEN if (cos > max(_HALF, chance)).all() else TRACE if (cos > chance).all() else HELD


def _by_texts(rows: pd.DataFrame) -> dict[int, pd.Series]:
    """Number of texts -> each seed's mean over sets, at the layer that is best with the most."""
    if rows.empty:
        return {}
    mean = rows.groupby(["seed", "k", "layer"])["value"].mean()
    most = mean.xs(rows.k.max(), level="k").unstack("layer").idxmax(axis=1)
    return {
        int(n): pd.Series({seed: mean[seed, n, layer] for seed, layer in most.items()})
        for n in sorted(rows.k.unique())
    }
