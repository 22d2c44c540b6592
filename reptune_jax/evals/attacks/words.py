"""What became of every attack, in a line each: for the terminal, the report, a model card."""

import math
from typing import NamedTuple

from reptune_jax.evals.attacks.verdicts import (
    BROKEN,
    FREE,
    HELD,
    NOTHING,
    UNDECIDED,
    Attacks,
    Copied,
    Found,
    Removed,
    Steered,
    copied,
    found,
    removed,
    steered,
)
from reptune_jax.evals.stats import Interval

WITH_BASE = "with the base's weights"


class Said(NamedTuple):
    """One attack on one arm: the word, and what it took or how far it came."""

    arm: str
    sign: int
    attack: str
    verdict: str
    took: str

    def __str__(self) -> str:
        took = f", {self.took}" if self.took else ""
        name = f"{self.arm} {'+' if self.sign > 0 else '−'}"
        return f"{name}, {self.attack}: {self.verdict}{took}"


def said(attacks: Attacks) -> list[Said]:
    """Of every arm, in the order of the threats: finding the vector, then undoing it."""
    out = []
    edits, doses, near = removed(attacks), steered(attacks), found(attacks)
    used = [x for x in copied(attacks) if x.how not in FREE]
    for one in attacks.arms:
        own = [r for r in edits if (r.arm, r.sign) == one]
        told = [t for f in near if (f.arm, f.sign) == one for t in _found(f)]
        told += [_copied(x) for x in used if (x.arm, x.sign) == one]
        told += _taken(f"edits of its weights, {WITH_BASE}", _of(own, "project"), attacks)
        told += _taken("edits of its weights alone", _of(own, "ablate"), attacks)
        told += [_steered(d) for d in doses if (d.arm, d.sign) == one]
        told += _taken("prompts", _of(own, "prompt"), attacks)
        told += _reworded(_of(own, "paraphrase"))
        told += [_rounded(r) for r in _of(own, "round")]
        told += _taken("training toward the opposite", _of(own, "relearn"), attacks)
        out += [Said(*one, *t) for t in told]
    return out


def kind(r: Removed) -> tuple[str, str]:
    """("project", "vector") of "project:vector"."""
    before, _, after = r.how.partition(":")
    return before, after


def _of(tried: list[Removed], name: str) -> list[Removed]:
    return [r for r in tried if kind(r)[0] == name and kind(r)[1] not in FREE]


def _found(f: Found) -> list[tuple[str, str, str]]:
    whose = "the random vector of its own" if f.of else "the vector"
    out = []
    if f.in_weights:
        took = f"one SVD: cosine {f.blind:.2f}, by chance up to {f.chance:.2f}"
        out.append((f"finding {whose} {WITH_BASE}", f.in_weights, took))
    if f.in_activations:
        n = f.least or max(f.texts)
        took = f"{n} unrelated text{'s' if n > 1 else ''}: cosine {f.texts[n]:.2f}"
        out.append((f"finding {whose} by activations and the base's", f.in_activations, took))
    return out


def _copied(x: Copied) -> tuple[str, str, str]:
    whence = "the change" if x.how == "found" else "activations"
    took = "" if x.verdict == NOTHING else f"{share(x.share)} of what the vector does"
    return f"steering the base with what {whence} gave away", x.verdict, took


def _taken(what: str, tried: list[Removed], attacks: Attacks) -> list[tuple[str, str, str]]:
    if not tried:
        return []
    if all(r.verdict == NOTHING for r in tried):
        return [(what, NOTHING, "")]
    broke = [r for r in tried if r.verdict == BROKEN]
    if broke:
        steps = (r.k if kind(r)[0] == "relearn" else 0 for r in broke)
        order = zip(steps, (r.kl if math.isfinite(r.kl) else 0 for r in broke), broke, strict=True)
        best = min(order, key=lambda one: (*one[:2], -one[2].removed.estimate))[2]
        cost = f" at KL {best.kl:.3f}" if math.isfinite(best.kl) else ""
        by = f"{best.how}, {best.k:g} steps" if kind(best)[0] == "relearn" else best.how
        return [(what, BROKEN, f"{share(best.removed)} of the effect gone by {by}{cost}")]
    most = max(tried, key=lambda r: r.removed.estimate)
    word = HELD if all(r.verdict == HELD for r in tried) else most.verdict
    at = f" at KL {most.kl:.3f}" if math.isfinite(most.kl) else ""
    gone = f"{len(tried)} tried, KL up to {attacks.max_kl:g}: at most {share(most.removed)} of the "
    return [(what, word, f"{gone}effect gone, by {most.how}{at}")]


def _steered(d: Steered) -> tuple[str, str, str]:
    if d.verdict == NOTHING:
        return "steering back", NOTHING, ""
    if d.verdict == HELD:
        return "steering back", HELD, f"doses up to {d.most:g}"
    took = f"dose {d.dose.estimate:.2f}; the change itself is worth {d.shift.estimate:.2f}"
    return "steering back", d.verdict, took


def _reworded(tried: list[Removed]) -> list[tuple[str, str, str]]:
    """Of all forms the one that leaves least."""
    if not tried:
        return []
    broke = [r for r in tried if r.verdict == BROKEN]
    least = min(broke or tried, key=lambda r: r.kept.estimate)
    word = least.verdict
    if word == HELD and any(r.verdict != HELD for r in tried):
        word = UNDECIDED
    kept = (
        f"{len(tried)} forms, {share(least.kept)} of the effect kept in the worst, {kind(least)[1]}"
    )
    return [("other words for the question", word, "" if word == NOTHING else kept)]


def _rounded(r: Removed) -> tuple[str, str, str]:
    kept = "" if r.verdict == NOTHING else f"keeps {share(r.kept)} of the effect"
    return f"rounding to {kind(r)[1]}", r.verdict, kept


def share(x: Interval) -> str:
    """A ratio as a percentage with its interval."""
    return f"{x.estimate:.0%} [{x.low:.0%}, {x.high:.0%}]".replace("-", "−")
