"""A sweep as text and as a picture: effect by layer and dose, and whom it moves the wrong way."""

import io
from collections.abc import Sequence

import numpy as np

from reptune_jax.evals.stats import bootstrap_mean
from reptune_jax.report.style import STYLE
from reptune_jax.vectors.sweep import Sweep


def change_LxKxI(swept: Sweep, value_LxKxI: np.ndarray | None = None) -> np.ndarray:
    """Log-odds (or another value) less those at dose 0; less their mean where 0 was not swept."""
    value = swept.logodds_LxKxI if value_LxKxI is None else value_LxKxI
    if 0.0 not in swept.doses:
        return value - value.mean(axis=1, keepdims=True)
    return value - value[:, [swept.doses.index(0.0)]]


def steepest(swept: Sweep) -> int:
    """Place in `layers` of the largest mean slope."""
    return int(np.argmax(swept.slope_LxI.mean(1)))


def table(swept: Sweep, clusters: Sequence[str]) -> list[str]:
    """A line a layer: slope with its interval over clusters, whom it moves wrongly, and how much
    less likely both answers together become: where that is a lot, something else is said."""
    ends = min(swept.doses), max(swept.doses)
    at_ends = [swept.doses.index(dose) for dose in ends]
    change_LxK = change_LxKxI(swept).mean(-1)
    either_LxK = change_LxKxI(swept, np.logaddexp.reduce(swept.logp_LxKxIx2, -1)).mean(-1)
    head = "layer", "nats for a dose of 1", "wrong way", f"change at {ends[0]:g}, {ends[1]:g}"
    lines = [(*head, "of log p(either answer)")]
    for at, layer in enumerate(swept.layers):
        slope = bootstrap_mean(swept.slope_LxI[at], clusters)
        mark = " *" if at == steepest(swept) else ""
        lines.append(
            (
                f"{layer}{mark}",
                f"{slope.estimate:+.3f} [{slope.low:+.3f}, {slope.high:+.3f}]",
                f"{swept.wrong_L[at]:.0%}",
                ", ".join(f"{change_LxK[at, k]:+.2f}" for k in at_ends),
                ", ".join(f"{either_LxK[at, k]:+.2f}" for k in at_ends),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]


def picture(swept: Sweep, clusters: Sequence[str], title: str) -> bytes:
    """A PNG: the mean change of log-odds by layer and dose; at the steepest layer its band over
    doses; and there the slopes of the prompts, with the share below zero."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    change, at, out = change_LxKxI(swept), steepest(swept), io.BytesIO()
    order = np.argsort(swept.doses)
    doses = [swept.doses[k] for k in order]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.4), layout="constrained")
        by_layer, by_dose, by_prompt = figure.subplots(1, 3)
        mean_LxK = change[:, order].mean(-1)
        limit = max(float(np.abs(mean_LxK).max()), 1e-9)
        image = by_layer.imshow(
            mean_LxK, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", origin="lower"
        )
        by_layer.set_xticks(range(len(doses)), [f"{dose:g}" for dose in doses])
        step = -(-len(swept.layers) // 12)
        shown = range(0, len(swept.layers), step)
        by_layer.set_yticks(shown, [str(swept.layers[l]) for l in shown])
        by_layer.grid(False)
        by_layer.set(xlabel="dose", ylabel="layer (block output)", title="mean of the prompts")
        figure.suptitle(title, x=0.01, ha="left", fontsize=9)
        figure.colorbar(image, label="mean change of log-odds, nats")
        bands = [bootstrap_mean(change[at, k], clusters) for k in order]
        lows, highs = [b.low for b in bands], [b.high for b in bands]
        by_dose.fill_between(doses, lows, highs, color="#D55E00", alpha=0.2, lw=0)
        by_dose.plot(doses, [b.estimate for b in bands], "o-", color="#D55E00", ms=3.5)
        by_dose.axhline(0, color="#555555", lw=0.8)
        about = f"layer {swept.layers[at]}, 95 % over prompts"
        by_dose.set(xlabel="dose", ylabel="change of log-odds, nats", title=about)
        by_prompt.hist(swept.slope_LxI[at], 20, color="#0072B2", alpha=0.6)
        by_prompt.axvline(0, color="#555555", lw=0.8)
        wrong = f"layer {swept.layers[at]}: {swept.wrong_L[at]:.0%} move the wrong way"
        by_prompt.set(xlabel="nats for a dose of 1", ylabel="prompts", title=wrong)
        figure.savefig(out, format="png", dpi=160, facecolor="white")
    return out.getvalue()
