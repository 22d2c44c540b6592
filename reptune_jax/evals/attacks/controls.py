"""Does what was tuned toward the vector give way more than what was tuned toward a random one?

The `random` arm has the labels, the losses and the layers of `dual`: what it loses under an attack
too is no matter of the vector.
"""

import functools
from typing import NamedTuple

import numpy as np
import pandas as pd

from reptune_jax.evals import stats
from reptune_jax.evals.attacks.verdicts import FREE, NOTHING, Attacks, Effects
from reptune_jax.evals.stats import Interval

CONTROL = "random"
MORE, LESS, ALIKE = "gives way more", "gives way less", "no difference shown"
KINDS = ("project", "ablate", "prompt", "paraphrase", "round", "relearn")


class Beside(NamedTuple):
    """What attacks of one kind take from an arm and from the random one, of either's effect."""

    arm: str
    sign: int
    kind: str
    tried: int  # that both were put under; their mean is compared
    own: Interval
    random: Interval
    more: Interval  # own - random, of the same items and seeds
    verdict: str


@functools.lru_cache(maxsize=2)
def beside(attacks: Attacks) -> list[Beside]:
    """Every arm beside the random one; nothing where that was not attacked."""
    out = []
    for arm, sign in attacks.arms:
        if arm == CONTROL or (CONTROL, sign) not in attacks.arms:
            continue
        own, random = (attacks.effects(name, sign) for name in (arm, CONTROL))
        both = [at for at in own.own.columns if at in random.own.columns]
        for kind in KINDS:
            tried = [at for at in both if _is_of(at[0], kind)]
            if tried:
                out.append(_beside(arm, kind, tried, own, random))
    return out


def _is_of(how: str, kind: str) -> bool:
    before, _, after = how.partition(":")
    return before == kind and after not in FREE


def _beside(
    arm: str, kind: str, tried: list[tuple[str, float]], own: Effects, random: Effects
) -> Beside:
    index = own.own.index
    columns = [c for effects in (own, random) for c in _taken(effects, tried, index)]
    shares = (
        lambda m: m[:, 0] / _some(m[:, 1]),
        lambda m: m[:, 2] / _some(m[:, 3]),
        lambda m: m[:, 0] / _some(m[:, 1]) - m[:, 2] / _some(m[:, 3]),
    )
    groups = [index.get_level_values(name) for name in ("cluster", "seed")]
    values = np.stack(columns, axis=1)
    gone, gone_random, more = (stats.bootstrap_of_means(values, s, *groups) for s in shares)
    verdict = ALIKE
    if not (own.effect.low > 0 and random.effect.low > 0):
        verdict = NOTHING
    elif more.excludes(0):
        verdict = MORE if more.estimate > 0 else LESS
    return Beside(arm, own.sign, kind, len(tried), gone, gone_random, more, verdict)


def _taken(
    effects: Effects, tried: list[tuple[str, float]], index: pd.MultiIndex
) -> list[np.ndarray]:
    """What the attacks take on average, and the effect, of the rows of `index`."""
    effect = effects.values("intact") - effects.values("intact", base=True)
    gone = np.mean([effects.gone(*at) for at in tried], axis=0)
    each = (pd.Series(column, effects.own.index) for column in (gone, effect))
    return [column.reindex(index).to_numpy(float) for column in each]


def _some(means_R: np.ndarray) -> np.ndarray:
    return np.where(means_R, means_R, np.nan)
