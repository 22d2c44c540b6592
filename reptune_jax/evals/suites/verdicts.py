"""What a condition kept of the untuned model's accuracy: one word for each suite and arm."""

from collections.abc import Sequence

import pandas as pd

from reptune_jax.evals import stats
from reptune_jax.evals.stats import Interval
from reptune_jax.evals.suites.readers import NORMED

RETAINED, INFERIOR, UNDECIDED = "retained", "inferior", "undecided"
UNINFORMATIVE = "uninformative"
_WORDS = {"non-inferior": RETAINED, "inferior": INFERIOR, "inconclusive": UNDECIDED}
_SETTING = ["arm", "sign", "k", "layer"]
_Z2 = 1.96**2


def frame(rows: pd.DataFrame, margin: float) -> pd.DataFrame:
    """One line for each test and setting of a study's rows, base first.

    Columns: test, metric, arm, sign, k, layer; acc (Interval), chance; change (Interval of the
    paired difference to base; None for base); verdict; items, missing.
    """
    own = rows[rows.split == "suites"]
    found = []
    for test in dict.fromkeys(own.template):
        metric = "acc_norm" if test in NORMED else "acc"
        of = own[own.template == test]
        values, chances = of[of.metric == metric], of[of.metric == "chance"]
        base = values[values.arm == "base"].set_index("item_id").value
        chance = chances.groupby("item_id").value.first()
        above = base.dropna() - chance.reindex(base.dropna().index)
        informs = bool(len(above)) and difference(above, above.index).low > 0
        for (arm, sign, k, layer), part in values.groupby(_SETTING, sort=False):
            change, verdict = None, "" if informs or not len(base) else UNINFORMATIVE
            missing = int(part.value.isna().sum())
            if arm != "base" and len(base):
                delta = part.value - part.item_id.map(base)
                change = difference(delta, part.item_id, part.seed)
                verdict = verdict or _verdict(change, margin, missing)
            acc = stats.bootstrap_mean(part.value, part.item_id, part.seed)
            found.append(
                [test, metric, arm, int(sign), k, int(layer), acc]
                + [chance.reindex(part.item_id.unique()).mean(), change, verdict]
                + [part.item_id.nunique(), missing]
            )
    columns = ["test", "metric", *_SETTING, "acc", "chance", "change", "verdict"]
    return pd.DataFrame(found, columns=[*columns, "items", "missing"])


def difference(
    deltas: Sequence[float] | pd.Series, items: Sequence[str], seeds: Sequence[int] | None = None
) -> Interval:
    """Mean of per-item differences within [-1, 1], with an interval that n items allow.

    The bootstrap's, but no narrower than the score interval of n pairs that all agree, which is
    z^2 / (n + z^2) to both sides (Tango 1998): where no item differs a bootstrap knows no doubt,
    and ten items would show as much as ten thousand.
    """
    found = stats.bootstrap_mean(deltas, items, seeds)
    least = _Z2 / (found.n_clusters + _Z2)
    low, high = min(found.low, found.estimate - least), max(found.high, found.estimate + least)
    return Interval(found.estimate, low, high, found.n, found.n_clusters, found.n_seeds)


def _verdict(change: Interval, margin: float, missing: int) -> str:
    loss = Interval(-change.estimate, -change.high, -change.low)
    word = _WORDS[stats.non_inferiority(loss, margin)]
    # What is not known is not kept: the mean is one over other items than the base's.
    return UNDECIDED if missing and word == RETAINED else word
