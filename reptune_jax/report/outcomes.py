"""Did it work: one word for every arm, and the first lines of the report.

An arm is praised only if it moved the way it was asked to, is still able to answer, and, where it
was tuned toward the vector, did better than the same run with a random direction.
"""

import functools
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from reptune_jax.evals import stats
from reptune_jax.evals.measures import METRICS, Measure
from reptune_jax.evals.stats import Interval
from reptune_jax.report import captions, claims
from reptune_jax.report import study as studies
from reptune_jax.report.blocks import Table, divergence, interval, number, percent
from reptune_jax.report.study import BASE, Setting, Study

# Of dual, in the declared comparisons.
RIVALS: tuple[str, ...] = ("base", "prompt", "steer", "token", "random", "weights", "preventative")
RIVALS += ("contrast", "match", "displace")
# The same run with a random direction.
CONTROLS = {"dual": "random", "vector": "random", "displace": "misplace"}

MOVED = "moved as asked"
NO_BETTER = "not shown better than random"
NO_EFFECT = "no effect shown"
WRONG_WAY = "moved the wrong way"
COLLAPSED = "collapsed"
NOT_MEASURED = "not measured"

_ONE_ANSWER = 0.98  # of all questions of one form and order
_FLAT = 0.05  # nats: log-odds so near 0 say nothing
_COVERED = 0.5  # of probability on the answers that were asked for
_GONE = 0.2  # share of answers that are empty, repeat themselves more than the base's, are missing


class Outcome(NamedTuple):
    """What became of an arm: its word, and the numbers that say so."""

    word: str
    why: str


@functools.lru_cache(maxsize=4)
def outcomes(study: Study, split: str = "test") -> dict[Setting, Outcome]:
    """Of every arm but the base and `out`, which is asked to move nowhere."""
    arms = study.picks(split, skip=("base", "out")) if study.primary else []
    return {setting: _outcome(study, setting, split) for setting in arms}


def _outcome(study: Study, setting: Setting, split: str) -> Outcome:
    measure = study.primary
    assert measure is not None
    if broken := collapse(study, setting, split):
        return Outcome(COLLAPSED, "; ".join(broken))
    paired = study.delta(setting, BASE, measure, split)
    if paired.delta.notna().sum() == 0:
        return Outcome(NOT_MEASURED, f"no rows of {measure.label} on {split}")
    found = studies.interval(paired)
    why = f"{interval(found)} against base"
    if not found.excludes(0):
        return Outcome(NO_EFFECT, why)
    if found.estimate * setting.sign < 0:
        return Outcome(WRONG_WAY, why)
    if measure.format == "claim" and not (able := _auroc(study, setting, split)).excludes(0.5):
        at_chance = f"tells true from false no better than chance, AUROC {interval(able, 2, False)}"
        return Outcome(NO_EFFECT, f"{why}; {at_chance}")
    control = CONTROLS.get(setting.arm)
    random = control and study.pick(control, setting.sign, split)
    if not random:
        return Outcome(MOVED, why)
    paired = study.delta(setting, random, measure, split)
    lead = studies.interval(paired.assign(delta=paired.delta * setting.sign))
    why += f", {interval(lead)} further than {random.name}"
    ahead = lead.excludes(0) and lead.estimate > 0
    return Outcome(MOVED if ahead else NO_BETTER, why)


def _auroc(study: Study, setting: Setting, split: str) -> Interval:
    """Of its verdicts: a shift of thousandths of a nat that all items share is no behavior."""
    rows = claims.truth_coded(study.measured(setting, Measure("logodds", "claim"), split))
    return stats.bootstrap_auroc(rows.margin, rows.label, rows.cluster, rows.seed)


def collapse(study: Study, setting: Setting, split: str = "test") -> list[str]:
    """What this arm can no longer do that the untuned model can; empty where it still can.

    Seed by seed: one that collapsed does not hide behind others that did not.
    """
    claim, choice = Measure("logodds", "claim"), Measure("logodds", "ab")
    base = [study.measured(BASE, measure, split) for measure in (claim, choice)]
    own = [study.measured(setting, measure, split) for measure in (claim, choice)]
    texts, repeats = study.answers(setting, split), study.where(setting, "rep4", split)
    seeds = sorted(set().union(*(rows.seed for rows in (*own, texts, repeats))))
    by_seed = {}
    for seed in seeds:
        claim_rows, choice_rows, seed_texts, seed_repeats = (
            rows[rows.seed == seed] for rows in (*own, texts, repeats)
        )
        lost = _claims_lost(claim_rows, base[0]) + _choices_lost(choice_rows, base[1])
        lost += _texts_lost(seed_texts, study.answers(BASE, split))
        lost += _loops(seed_repeats, study.where(BASE, "rep4", split))
        if lost:
            by_seed[seed] = lost
    found = [text for lost in list(by_seed.values())[:1] for text in dict.fromkeys(lost)]
    if found and len(seeds) > 1:
        found[0] = f"{len(by_seed)} of {len(seeds)} seeds: {found[0]}"
    for (metric, at), (gone, of) in study.missing(setting).items():
        if at == split and gone > _GONE * of and not METRICS[metric].asked:
            found.append(f"{gone} of {of} values of {metric} are not finite")
    return found


def _claims_lost(own: Any, base: Any) -> list[str]:
    own, base = claims.truth_coded(own), claims.truth_coded(base)
    if own.empty or base.empty:
        return []
    found = _said_lost(own, base, own.says_true, base.says_true)
    now, before = (
        stats.bootstrap_auroc(rows.margin, rows.label, rows.cluster, rows.seed)
        for rows in (own, base)
    )
    if before.low > 0.5 and not now.excludes(0.5):
        lost = f"AUROC {interval(now, 2, False)}, {number(before.estimate, 2)} untuned"
        found.append(f"tells true from false no longer: {lost}")
    return found


def _choices_lost(own: Any, base: Any) -> list[str]:
    own, base = own[own.value.notna()], base[base.value.notna()]
    if own.empty or base.empty:
        return []
    return _said_lost(own, base, *((rows.value > 0).astype(float) for rows in (own, base)))


def _said_lost(own: Any, base: Any, said: Any, said_before: Any) -> list[str]:
    """Of answers to choices: whether they still differ, mean anything, and are what is said."""
    found = []
    if _one_answer(own, said) and not _one_answer(base, said_before):
        found.append(f"gives one answer to at least {_ONE_ANSWER:.0%} of each form's questions")
    size, before = (float(np.median(np.abs(rows.value))) for rows in (own, base))
    if size < _FLAT < before:
        found.append(f"log-odds are {number(size)} nats (median size), {number(before)} untuned")
    covered, before = own["mass"].mean(), base["mass"].mean()
    if covered < _COVERED <= before:
        found.append(f"{percent(covered)} of probability on the answers, {percent(before)} untuned")
    return found


def _one_answer(rows: Any, said: Any) -> bool:
    """Whether each form and order of the question gets the same answer nearly always.

    By order, so that always the first letter counts, whichever answer it stands for.
    """
    share = said.groupby([rows.template, rows.order]).mean()
    return bool(((share >= _ONE_ANSWER) | (share <= 1 - _ONE_ANSWER)).all())


def _texts_lost(own: Any, base: Any) -> list[str]:
    if own.empty or base.empty:
        return []
    now, before = ((rows.text.str.strip() == "").mean() for rows in (own, base))
    if now <= before + _GONE:
        return []
    return [f"{percent(now)} of the answers are empty, {percent(before)} untuned"]


def _loops(own: Any, base: Any) -> list[str]:
    now, before = own.value.mean(), base.value.mean()
    if not now > before + _GONE:  # nan: not measured
        return []
    return [f"{percent(now)} of 4-token runs repeat, {percent(before)} untuned"]


def family_frame(
    study: Study, measure: Measure, split: str = "test", equal_kl: bool = False
) -> Any:
    """Family A: dual against each rival, both signs; advantage = sign x (dual - rival), Holm.

    With `equal_kl` only rivals that were scaled to dual's KL.
    """
    rows, pick = [], study.at_equal_kl if equal_kl else study.pick
    for sign in (1, -1):
        dual = study.pick("dual", sign, split)
        for rival in RIVALS if dual else ():
            other = pick(rival, sign, split)
            if equal_kl and other == study.pick(rival, sign, split):
                continue
            paired = study.delta(dual, other, measure, split) if dual and other else pd.DataFrame()
            if paired.empty:
                continue
            paired = paired.assign(delta=paired.delta * sign)
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
    known = outcomes(study, split)
    frame["verdict"] = [
        verdict(r.advantage, r.p_holm, known[r.dual].word, _word(known, r.rival))
        for r in frame.itertuples()
    ]
    return frame


def verdict(
    advantage: Interval, p_adjusted: float, dual: str, rival: str, level: float = 0.05
) -> str:
    """A difference is claimed only if the test and the interval both say so.

    `dual` and `rival` are the words of their outcomes: an arm that is broken, or that did not move
    as asked, is not ahead of anything.
    """
    if COLLAPSED in (dual, rival):
        who = "both" if dual == rival else "dual" if dual == COLLAPSED else "rival"
        return f"{who} collapsed"
    if not (p_adjusted < level and advantage.excludes(0)):
        return "no difference shown"
    if advantage.estimate < 0:
        return "dual behind"
    return "dual ahead" if dual in (MOVED, NO_BETTER) else f"dual: {dual}"


def _word(known: dict[Setting, Outcome], setting: Setting) -> str:
    return known[setting].word if setting in known else ""


def headline(study: Study) -> list[str]:
    """Did it work, against what, at what cost, on how much evidence: a sentence for each sign."""
    return ["; ".join(parts) + "." for parts in answers(study)]


def answers(study: Study) -> list[list[str]]:
    """The same, each part for itself."""
    if study.primary is None:
        return [["Nothing was measured yet"]]
    known = outcomes(study)
    shown = next((a for a in ("dual", "vector", "token", "steer") if _of(known, a)), "")
    return [_answers(study, setting, known[setting]) for setting in _of(known, shown)] or [
        ["No arm besides base has test rows yet"]
    ]


def line(study: Study, setting: Setting) -> str:
    """An arm's outcome, for a model card."""
    found = outcomes(study).get(setting, Outcome(NOT_MEASURED, "no test rows"))
    return f"{found.word} ({found.why})"


def table(study: Study) -> Table:
    """Every arm's outcome as text."""
    rows = [
        [setting.name, found.word, divergence(study.kl(setting)), found.why]
        for setting, found in outcomes(study).items()
    ]
    header = ["Arm", "Outcome", "KL, prose", "Why"]
    return Table("Outcome of every arm", captions.OUTCOMES, header, rows, "No arm has test rows.")


def _of(known: dict[Setting, Outcome], arm: str) -> list[Setting]:
    return [setting for setting in known if setting.arm == arm]


def _answers(study: Study, setting: Setting, found: Outcome) -> list[str]:
    measure = study.primary
    assert measure is not None
    parts = [f"{setting.name}: {found.word}", f"by {measure.label}: {found.why}"]
    if setting.arm == "dual":
        against = [
            f"{r.rival.name}: {r.verdict}"
            for r in family_frame(study, measure).itertuples()
            if r.dual == setting and r.rival != BASE
        ]
        parts.append(f"against {', '.join(against) or 'no rival'}")
    kl = study.kl(setting)
    parts.append(
        f"cost: KL {divergence(kl)} nats/token on prose" if kl == kl else "cost not measured"
    )
    rows = study.measured(setting, measure, "test")
    items, clusters, seeds = rows.item_id.nunique(), rows.cluster.nunique(), rows.seed.nunique()
    parts.append(f"evidence: {items} test items in {clusters} clusters, training seeds: {seeds}")
    return parts
