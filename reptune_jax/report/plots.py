"""The figures of the report. A plot returns None when its data are missing."""

import math
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reptune_jax.evals.measures import Measure
from reptune_jax.report import study as studies
from reptune_jax.report.study import BASE, SIGNS, Setting, Study
from reptune_jax.report.style import COLORS, DASHES, MARKERS

_RANK = {arm: rank for rank, arm in enumerate(COLORS)}
_KL_TICKS = (
    0.0001, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3,
    5, 10,
)  # fmt: skip


def forest(study: Study, measure: Measure) -> Figure | None:
    """Effect of every arm with its interval, and a dot for every training seed."""
    arms = [c for c in study.picks("test", skip=["base"]) if not _delta(study, c, measure).empty]
    if not arms:
        return None
    figure, axes = _subplots(1, 1, 7.4, 0.6 + 0.27 * len(arms))
    ax = axes[0]
    ax.axvline(0, color="#555555", lw=0.8)
    for y, setting in enumerate(reversed(arms)):
        rows, color = _delta(study, setting, measure), COLORS[setting.arm]
        ci = studies.interval(rows)
        ax.plot([ci.low, ci.high], [y, y], color=color, lw=1.8, solid_capstyle="butt")
        ax.plot(ci.estimate, y, MARKERS[setting.arm], color=color, ms=6)
        per_seed = rows.groupby("seed").delta.mean()
        if len(per_seed) > 1:
            ax.plot(per_seed, [y - 0.28] * len(per_seed), ".", color=color, ms=3.5, alpha=0.75)
    ax.set_yticks(range(len(arms)), [c.name for c in reversed(arms)])
    ax.set_ylim(-0.7, len(arms) - 0.4)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel(f"Δ vs base: {measure.label}")
    return figure


def pareto(study: Study, measure: Measure) -> Figure | None:
    """Effect against KL to base, prose and chats: sweeps as one line per layer, arms as points."""
    splits = [s for s in ("neutral", "chats") if any(study.settings("kl", s))]
    arms = [c for c in study.picks("test", skip=["base"]) if not _delta(study, c, measure).empty]
    sweep = _sweep(study, measure)
    if not splits or not (arms or sweep):
        return None
    figure, axes = _subplots(1, len(splits), 7.4, 3.7, sharey=True)
    for ax, split in zip(axes, splits, strict=True):
        _sweep_lines(ax, study, measure, sweep, split)
        for setting in arms:
            kl = studies.per_token(study.where(setting, "kl", split))
            effect = studies.interval(_delta(study, setting, measure))
            if not math.isfinite(kl.estimate):
                continue
            color, filled = COLORS[setting.arm], setting.sign > 0
            ax.errorbar(
                kl.estimate, effect.estimate, xerr=_bars(kl), yerr=_bars(effect), color=color,
                marker=MARKERS[setting.arm], ms=6.5, mfc=color if filled else "white", mew=1.3,
                elinewidth=0.8, zorder=3, label=setting.name,
            )  # fmt: skip
        ax.axhline(0, color="#555555", lw=0.8)
        ax.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
        ax.set_xlim(left=0)
        ax.set_xticks(_kl_ticks(ax.get_xlim()[1]))
        ax.xaxis.set_major_formatter("{x:g}")
        kind = "neutral prose" if split == "neutral" else "unrelated chats"
        ax.set_xlabel(f"KL(base ‖ arm) on {kind}, nats/token (√ scale)")
    axes[0].set_ylabel(f"Δ vs base\n{measure.label}")
    _legend_below(figure)
    return figure


def dose_response(study: Study, measure: Measure) -> Figure | None:
    """Mean measure against the signed steering dose, a line and a band per layer."""
    split, sweep = _sweep_split(study, measure), _sweep(study, measure)
    if len(sweep) < 2:
        return None
    figure, axes = _subplots(1, 1, 7.4, 3.3)
    ax = axes[0]
    base = studies.interval(study.measured(BASE, measure, split), "value")
    layers = sorted({c.layer for c in sweep})
    for color, layer in zip(_shades(len(layers)), layers, strict=True):
        at = {0.0: base} if math.isfinite(base.estimate) else {}
        for setting in (c for c in sweep if c.layer == layer):
            rows = study.measured(setting, measure, split)
            at[setting.dose] = studies.interval(rows, "value")
        points = sorted(at.items(), key=lambda point: point[0])
        doses, cis = zip(*points, strict=True)
        ax.fill_between(
            doses, [c.low for c in cis], [c.high for c in cis], color=color, alpha=0.15, lw=0
        )
        ax.plot(doses, [c.estimate for c in cis], "o-", color=color, ms=3.5, label=_layer(layer))
    for sign in (1, -1):
        dual = study.pick("dual", sign, split)
        rows = study.measured(dual, measure, split) if dual else pd.DataFrame()
        if len(rows):
            name = f"dual {SIGNS[sign]}"
            ax.axhline(rows.value.mean(), color=COLORS["dual"], ls=DASHES[sign], lw=1.2, label=name)
    ax.set_xlabel("signed dose of the vector")
    ax.set_ylabel(f"mean {measure.label}\n({split} split)")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def dial(study: Study, measure: Measure) -> Figure | None:
    """Mean measure against the signed scale of tuned weights, a line and a band per arm."""
    split = "val"
    found = study.settings(measure.metric, split, measure.format)
    swept = [c for c in found if c.k and c.layer < 0]
    if len(swept) < 2:
        return None
    figure, axes = _subplots(1, 1, 7.4, 3.3)
    base = studies.interval(study.measured(BASE, measure, split), "value")
    for arm in dict.fromkeys(c.arm for c in swept):
        at = {0.0: base} if math.isfinite(base.estimate) else {}
        for setting in (c for c in swept if c.arm == arm):
            at[setting.dose] = studies.interval(study.measured(setting, measure, split), "value")
        scales, cis = zip(*sorted(at.items()), strict=True)
        lows, highs = zip(*((ci.low, ci.high) for ci in cis), strict=True)
        axes[0].fill_between(scales, lows, highs, color=COLORS[arm], alpha=0.15, lw=0)
        means = [ci.estimate for ci in cis]
        axes[0].plot(scales, means, marker=MARKERS[arm], color=COLORS[arm], ms=4, label=arm)
    axes[0].set_xlabel("times the change of the weights, with the sign of the run")
    axes[0].set_ylabel(f"mean {measure.label}\n({split} split)")
    axes[0].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def curves(study: Study) -> Figure | None:
    """Losses, cosine and KL of every run against the step."""
    names = {
        "loss": "loss", "token_loss": "token loss (nats)", "cosine_loss": "cosine loss",
        "kl": "KL retention (nats/token)", "cosine/mean": "mean cosine to the vector",
        "val/token_loss": "validation token loss (nats)", "val/cosine": "validation cosine",
        "grad_norm": "gradient norm",
    }  # fmt: skip
    shown = [n for n in names if n in study.curves and study.curves[n].notna().any()]
    if not shown:
        return None
    columns = min(3, len(shown))
    lines = math.ceil(len(shown) / columns)
    figure, axes = _subplots(lines, columns, 7.6, 0.5 + 1.75 * lines)
    for ax, name in zip(axes, shown, strict=False):
        runs = study.curves.groupby(["arm", "sign", "run"])
        ranked = sorted(runs, key=lambda r: (_RANK.get(r[0][0], len(_RANK)), -r[0][1], r[0][2]))
        for (arm, sign, _run), rows in ranked:
            rows = rows.dropna(subset=[name])
            color, label = COLORS.get(arm, "#444444"), f"{arm} {SIGNS[sign]}".strip()
            ax.plot(
                rows.step, rows[name], color=color, ls=DASHES[sign], lw=1.1, alpha=0.85, label=label
            )
        ax.set_title(names[name])
    for ax in axes[len(shown) :]:
        ax.set_visible(False)
    for ax in axes[max(0, len(shown) - columns) : len(shown)]:
        ax.set_xlabel("step")
    _legend_below(figure)
    return figure


def heatmaps(study: Study) -> Figure | None:
    """Mean cosine to the vector by layer and position, base on top, one diverging scale about 0."""
    rows = study.rows[study.rows.metric == "cos"]
    if rows.empty:
        return None
    positions, layers = sorted(rows.position.unique(), key=_position), sorted(rows.layer.unique())
    grids = {
        group: found.pivot_table(index="position", columns="layer", values="value")
        .reindex(index=positions, columns=layers)
        .to_numpy()
        for group, found in rows.groupby(["arm", "sign"])
    }
    limit = max(0.05, *(float(np.nanmax(np.abs(grid))) for grid in grids.values()))
    arms = sorted({arm for arm, _ in grids}, key=list(COLORS).index)
    height = 0.5 + len(arms) * (0.42 + 0.17 * len(positions))
    figure, axes = _subplots(len(arms), 2, 7.6, height, sharex=True, sharey=True)
    for ax, (arm, right) in zip(axes, ((a, r) for a in arms for r in (0, 1)), strict=True):
        sign = 0 if arm == "base" else (-1 if right else 1)
        if (arm, sign) not in grids or (arm == "base" and right):
            ax.set_visible(False)
            continue
        span = (-0.5, len(layers) - 0.5, len(positions) - 0.5, -0.5)
        image = ax.imshow(
            grids[arm, sign], cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", extent=span
        )
        ax.set_title(f"{arm} {SIGNS[sign]}".strip(), fontsize=8.5)
        ax.set_yticks(range(len(positions)), positions)
        every = max(1, math.ceil(len(layers) / 10))
        ax.set_xticks(range(0, len(layers), every), layers[::every])
        ax.grid(visible=False)
        ax.tick_params(labelleft=not right)
    for ax in axes[-2:]:
        ax.set_xlabel("layer (block output)")
    figure.colorbar(image, ax=axes, shrink=0.9, aspect=30, pad=0.01, label="mean cosine")
    return figure


def histogram(study: Study, measure: Measure) -> Figure | None:
    """Per-item Δ of every arm, both signs, with the share that moved the wrong way."""
    picked = study.picks("test", skip=["base"])
    items = {
        c: studies.per_item(_delta(study, c, measure))
        for c in picked
        if not _delta(study, c, measure).empty
    }
    arms = list(dict.fromkeys(c.arm for c in items))
    if not arms:
        return None
    edges = np.histogram_bin_edges(np.concatenate([*items.values()]), bins=30)
    columns = min(3, len(arms))
    lines = math.ceil(len(arms) / columns)
    figure, axes = _subplots(lines, columns, 7.6, 0.4 + 1.6 * lines, sharex=True)
    for ax, arm in zip(axes, arms, strict=False):
        for setting, deltas in items.items():
            if setting.arm == arm:
                color = "#0072B2" if setting.sign > 0 else "#D55E00"
                wrong = (setting.sign * deltas < 0).mean()
                label = f"{SIGNS[setting.sign]}  {100 * wrong:.0f} % against"
                ax.hist(deltas, edges, color=color, alpha=0.28, lw=0)
                ax.hist(deltas, edges, histtype="step", color=color, lw=1.1, label=label)
        ax.axvline(0, color="#555555", lw=0.8)
        ax.set_title(arm)
        ax.set_ylim(top=1.45 * ax.get_ylim()[1])
        ax.legend(loc="upper left", fontsize=7, handlelength=1.2)
    for ax in axes[len(arms) :]:
        ax.set_visible(False)
    for ax in axes[max(0, len(arms) - columns) : len(arms)]:
        ax.set_xlabel("per-item Δ vs base")
        ax.tick_params(labelbottom=True)
    return figure


def _subplots(
    lines: int, columns: int, width: float, height: float, **kw: Any
) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(lines, columns, squeeze=False, **kw).ravel()


def _delta(study: Study, setting: Setting, measure: Measure) -> pd.DataFrame:
    return study.delta(setting, BASE, measure, "test")


def _bars(ci: Any) -> list[list[float]]:
    return [[max(0.0, ci.estimate - ci.low)], [max(0.0, ci.high - ci.estimate)]]


def _sweep_split(study: Study, measure: Measure) -> str:
    """The split that holds most of the sweep: validation, unless test was swept too."""
    count = {s: len(_steered(study, measure, s)) for s in ("val", "test")}
    return max(count, key=lambda split: count[split])


def _sweep(study: Study, measure: Measure) -> list[Setting]:
    return _steered(study, measure, _sweep_split(study, measure))


def _steered(study: Study, measure: Measure, split: str) -> list[Setting]:
    found = study.settings(measure.metric, split, measure.format)
    return [c for c in found if c.arm == "steer"]


def _sweep_lines(
    ax: Axes, study: Study, measure: Measure, sweep: list[Setting], split: str
) -> None:
    layers, swept = sorted({c.layer for c in sweep}), _sweep_split(study, measure)
    for color, layer in zip(_shades(len(layers)), layers, strict=True):
        for sign in (1, -1):
            at = [c for c in sweep if c.layer == layer and c.dose * sign > 0]
            points = [(0.0, 0.0)] + [
                (study.kl(c, split), study.delta(c, BASE, measure, swept).delta.mean()) for c in at
            ]
            points = sorted(p for p in points if all(map(math.isfinite, p)))
            if len(points) > 1:
                label = f"steering sweep, {_layer(layer)}" if sign > 0 else None
                ax.plot(
                    *zip(*points, strict=True), ".-", color=color, lw=1, ms=4, zorder=1, label=label
                )


def _shades(n: int) -> list[Any]:
    """Blues from light to dark, for layers from low to high."""
    return [mpl.colormaps["YlGnBu"](x) for x in np.linspace(0.4, 0.95, n)]


def _layer(layer: int) -> str:
    return f"layer {layer}" if layer >= 0 else "several layers"


def _position(name: str) -> tuple[int, float, str]:
    try:
        return 0, float(name), name
    except ValueError:
        return 1, 0.0, name


def _kl_ticks(limit: float) -> list[float]:
    """Round values that do not crowd each other on a square-root axis."""
    ticks = [0.0]
    for tick in _KL_TICKS:
        if tick <= limit and np.sqrt(tick) - np.sqrt(ticks[-1]) > 0.12 * np.sqrt(limit):
            ticks.append(tick)
    return ticks


def _legend_below(figure: Figure) -> None:
    """One for all panels: an arm may be measured on one of two texts only."""
    unique: dict[str, Any] = {}
    for ax in figure.axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            unique.setdefault(label, handle)
    if unique:
        figure.legend(
            unique.values(), unique.keys(), loc="outside lower center", ncols=min(5, len(unique))
        )
