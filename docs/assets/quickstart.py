"""Draws quickstart.png from the per-item results of a quickstart's study folder.

    python docs/assets/quickstart.py runs/quickstart

Estimates, intervals, colors and markers are those of the report.
"""

import sys
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from reptune_jax.evals.measures import Measure
from reptune_jax.report import study, style

PANELS = {
    "vader:free": "judged sentiment of the answers (VADER)",
    "logodds:free": "log-odds of given answers, nats",
}


def draw(folder: str) -> Figure:
    """Every arm's mean difference to the untuned model, with its interval, as the report has it."""
    read = study.read(folder)
    figure = Figure(figsize=(7.4, 2.9), layout="constrained")
    axes = figure.subplots(1, len(PANELS), sharey=True)
    for ax, (name, label) in zip(axes, PANELS.items(), strict=True):
        measure, names = Measure.parse(name), []
        for y, arm in enumerate(reversed(read.picks("test", skip=["base"]))):
            ci = study.interval(read.delta(arm, study.BASE, measure, "test"))
            color = style.COLORS[arm.arm]
            ax.plot([ci.low, ci.high], [y, y], color=color, lw=1.8)
            ax.plot(ci.estimate, y, style.MARKERS[arm.arm], color=color, ms=6)
            names.append(arm.name)
        ax.axvline(0, color="#555555", lw=0.8)
        ax.set_yticks(range(len(names)), names)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel(f"Δ to base: {label}")
    return figure


if __name__ == "__main__":
    with mpl.rc_context(style.STYLE):
        draw(sys.argv[1]).savefig(Path(__file__).with_suffix(".png"), dpi=150, facecolor="white")
