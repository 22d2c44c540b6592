"""Attacks on what tuning did: verdicts, and the numbers behind them, as tables and a figure."""

import functools
import math
from typing import TYPE_CHECKING, Any

from reptune_jax import config as configs
from reptune_jax.evals.attacks import controls, verdicts, words
from reptune_jax.evals.attacks.verdicts import Attacks, Found, Removed
from reptune_jax.evals.attacks.words import Said
from reptune_jax.report import captions
from reptune_jax.report.blocks import Block, Plot, Table, divergence, interval, number, percent
from reptune_jax.report.study import Setting, Study
from reptune_jax.report.style import COLORS, DASHES, MARKERS

if TYPE_CHECKING:  # importing matplotlib takes a second, and `convert` draws nothing
    from matplotlib.figure import Figure

_CI = "[95 % CI]"


def said(study: Study) -> list[Said]:
    """Every verdict of a study's attacks; none where it was not attacked."""
    return words.said(_attacks(study))


def blocks(study: Study) -> list[Block]:
    """Verdicts first, then what they rest on; nothing where nothing was attacked."""
    attacks = _attacks(study)
    if not attacks.arms:
        return []
    edits = verdicts.removed(attacks)
    built = [_verdicts(study, attacks), _found(attacks), _plot(attacks)]
    built.append(_copied(attacks))
    built += [_edits(edits), _steered(attacks), _rounded(edits, attacks), _prompts(edits)]
    built += [_paraphrased(edits), _relearned(edits), _beside(attacks)]
    return [block for block in built if block]


@functools.lru_cache(maxsize=2)
def _attacks(study: Study) -> Attacks:
    stored = study.config.get("config", {}).get("attack", {})
    default = configs.default().attack.max_kl
    return Attacks.of(study.rows, float(stored.get("max_kl", default)))


def _name(arm: str, sign: int) -> str:
    return Setting(arm, sign).name


def _table(title: str, caption: str, header: list[str], rows: list[list[str]]) -> Table | None:
    return Table(title, caption, header, rows) if rows else None


def _verdicts(study: Study, attacks: Attacks) -> Table | None:
    rows = [[_name(s.arm, s.sign), s.attack, s.verdict, s.took or "–"] for s in said(study)]
    header = ["Arm", "Attack", "Verdict", "What it took, or how far it came"]
    caption = captions.ATTACKS.format(max_kl=attacks.max_kl)
    return _table("What broke", caption, header, rows)


def _found(attacks: Attacks) -> Table | None:
    found = verdicts.found(attacks)
    sizes = sorted({n for f in found for n in f.texts})
    rows = [
        [
            _name(f.arm, f.sign) + (", own vector" if f.of else ""),
            number(f.blind, 2),
            number(f.within, 2),
            number(f.layer, 2),
            number(1 / f.energy if f.energy else math.nan, 1),
            *(number(f.texts.get(n), 2) for n in sizes),
            number(f.first.get(max(sizes, default=0)), 2),
            f"{number(f.again, 2)} ({number(f.again_base, 2)})",
            number(f.chance, 2),
        ]
        for f in found
    ]
    header = ["Arm", "One SVD", "Eight vectors", "Best layer", "Stable rank"]
    header += [f"{n} text{'s' if n > 1 else ''}" for n in sizes]
    header += ["First tokens", "Read again (base)", "Chance"]
    return _table("Is the vector found", captions.FOUND, header, rows)


def _plot(attacks: Attacks) -> Plot | None:
    found = [f for f in verdicts.found(attacks) if len(f.texts) > 1]
    draw, title = functools.partial(_curves, found), "Texts that it takes to find the vector"
    return Plot("attack_texts", title, captions.TEXTS, draw) if found else None


def _curves(found: list[Found]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.4, 2.9), layout="constrained")
    ax = figure.subplots()
    for f in found:
        name = _name(f.arm, f.sign) + (", own vector" if f.of else "")
        line: Any = {"color": COLORS[f.arm], "marker": MARKERS[f.arm], "ms": 4, "label": name}
        ax.plot([*f.texts], [*f.texts.values()], ls=":" if f.of else DASHES[f.sign], **line)
    ax.axhline(found[0].chance, color="#555555", lw=0.8, ls="--")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_xticks(sorted({n for f in found for n in f.texts}))
    ax.set_ylim(0, 1.02)
    ax.set_xlabel("unrelated texts")
    ax.set_ylabel("|cos| with the vector")
    figure.legend(loc="outside right upper")
    return figure


def _copied(attacks: Attacks) -> Table | None:
    rows = [
        [
            _name(x.arm, x.sign),
            x.how,
            interval(x.share, 2, False),
            f"{divergence(x.kl)} ({divergence(x.vector_kl)})",
            "–" if x.how == "random" else x.verdict,
        ]
        for x in verdicts.copied(attacks)
    ]
    header = ["Arm", "Direction", f"Share of the vector's effect {_CI}", "KL, prose (the vector's)"]
    return _table("Does what is found do the same", captions.COPIED, [*header, "Verdict"], rows)


def _edits(edits: list[Removed]) -> Table | None:
    rows = [
        [
            _name(r.arm, r.sign),
            r.how + (f" × {r.k:g}".replace("-", "−") if r.how == "scale" else ""),
            interval(r.removed, 2),
            interval(r.ahead, 2),
            divergence(r.kl),
            str(r.items),
            r.verdict,
        ]
        for r in edits
        if words.kind(r)[0] in ("project", "ablate", "scale")
    ]
    header = ["Arm", "Edit", f"Effect removed {_CI}", f"… than along a random direction {_CI}"]
    header += ["KL, prose", "Values", "Verdict"]
    return _table("Is the behavior taken out of the weights", captions.EDITS, header, rows)


def _relearned(edits: list[Removed]) -> Table | None:
    tried = [r for r in edits if words.kind(r)[0] == "relearn"]
    arms = list(dict.fromkeys((r.arm, r.sign) for r in tried))
    tried.sort(key=lambda r: (arms.index((r.arm, r.sign)), words.kind(r), r.k))
    rows = [
        [
            _name(r.arm, r.sign),
            words.kind(r)[1],
            f"{r.k:g}",
            interval(r.removed, 2),
            divergence(r.kl),
            r.verdict,
        ]
        for r in tried
    ]
    header = ["Arm", "Learning rate", "Steps", f"Effect removed {_CI}", "KL, prose", "Verdict"]
    return _table("Is it trained away", captions.RELEARNED, header, rows)


def _steered(attacks: Attacks) -> Table | None:
    rows = [
        [
            _name(d.arm, d.sign),
            interval(d.dose, 2, False),
            interval(d.shift, 2),
            interval(d.resists, 2),
            interval(d.random, 2, False),
            d.verdict,
        ]
        for d in verdicts.steered(attacks)
    ]
    header = ["Arm", f"Dose that undoes it {_CI}", f"Its own shift {_CI}", f"Resistance {_CI}"]
    header += [f"Dose of a random direction {_CI}", "Verdict"]
    return _table("Is it steered back", captions.STEERED, header, rows)


def _rounded(edits: list[Removed], attacks: Attacks) -> Table | None:
    crossed = attacks.rows[attacks.rows.metric == "crossed"]
    of = crossed.groupby(["arm", "sign", "position"])["value"].mean()
    rows = [
        [
            _name(r.arm, r.sign),
            words.kind(r)[1],
            interval(r.kept, 2, False),
            percent(of.get((r.arm, r.sign, r.how), math.nan)),
            divergence(r.kl),
            r.verdict,
        ]
        for r in edits
        if words.kind(r)[0] == "round"
    ]
    header = ["Arm", "Rounded to", f"Effect kept {_CI}", "Weights moved by over half a step"]
    return _table(
        "Does it survive rounding", captions.ROUNDED, [*header, "KL, prose", "Verdict"], rows
    )


def _prompts(edits: list[Removed]) -> Table | None:
    rows = [
        [
            _name(r.arm, r.sign),
            words.kind(r)[1],
            interval(r.removed, 2),
            interval(r.kept, 2),
            percent(r.flips[0]),
            percent(r.flips[1]),
            r.verdict,
        ]
        for r in edits
        if words.kind(r)[0] == "prompt"
    ]
    header = ["Arm", "Prompt", f"Effect removed {_CI}", f"Lead on the base kept {_CI}"]
    header += ["Items flipped", "Of the base's", "Verdict"]
    return _table("Is it talked away", captions.PROMPTS, header, rows)


def _paraphrased(edits: list[Removed]) -> Table | None:
    rows = [
        [
            _name(r.arm, r.sign),
            words.kind(r)[1],
            interval(r.kept, 2, False),
            percent(r.flips[0]),
            percent(r.flips[1]),
            r.verdict,
        ]
        for r in edits
        if words.kind(r)[0] == "paraphrase"
    ]
    header = ["Arm", "Form", f"Effect kept {_CI}", "Items flipped", "Of the base's", "Verdict"]
    return _table("Is it kept in other words", captions.PARAPHRASED, header, rows)


_KINDS = {
    "project": "edits, with the base", "ablate": "edits", "prompt": "prompts",
    "paraphrase": "other words", "round": "rounding", "relearn": "training",
}  # fmt: skip


def _beside(attacks: Attacks) -> Table | None:
    rows = [
        [
            _name(b.arm, b.sign),
            f"{_KINDS[b.kind]} ({b.tried})",
            interval(b.own, 2),
            interval(b.random, 2),
            interval(b.more, 2),
            b.verdict,
        ]
        for b in controls.beside(attacks)
    ]
    header = ["Arm", "Attacks (tried)", f"Of its effect {_CI}", f"Of the random arm's {_CI}"]
    header += [f"Difference {_CI}", "Verdict"]
    return _table("Beside the random arm", captions.BESIDE, header, rows)
