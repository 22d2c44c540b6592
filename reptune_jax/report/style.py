"""How figures look: colors and markers of the arms, one style, and drawing into a page."""

import base64
import io
from pathlib import Path
from typing import Any

from reptune_jax import ending
from reptune_jax.report.blocks import Plot

# Okabe-Ito, safe for color-blind readers; arms also differ by marker, and signs by line style.
COLORS = {
    "base": "#000000", "prompt": "#E69F00", "steer": "#56B4E9", "bake": "#0072B2",
    "token": "#009E73", "vector": "#CC79A7", "dual": "#D55E00", "random": "#8C8C8C",
    "weights": "#7B4FA3", "contrast": "#882255", "preventative": "#B8860B", "match": "#332288",
    "displace": "#AA4499", "misplace": "#BBBBBB", "out": "#6F5B3E",
}  # fmt: skip
MARKERS = {
    "base": "o", "prompt": "s", "steer": "o", "bake": "P", "token": "D", "vector": "v", "dual": "^",
    "random": "X", "weights": "p", "contrast": "d", "preventative": "<", "match": ">",
    "displace": "*", "misplace": "x", "out": "h",
}  # fmt: skip
DASHES: Any = {1: "-", -1: (0, (4, 2)), 0: "-"}  # by sign
STYLE: Any = {
    "font.family": "DejaVu Sans", "font.size": 8.5, "axes.titlesize": 9,
    "axes.titleweight": "normal", "axes.titlelocation": "left", "axes.labelsize": 8.5,
    "axes.linewidth": 0.6, "axes.edgecolor": "#555555", "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "#E6E6E6", "grid.linewidth": 0.6, "xtick.major.width": 0.6,
    "ytick.major.width": 0.6, "xtick.color": "#555555", "ytick.color": "#555555",
    "xtick.labelcolor": "#222222", "ytick.labelcolor": "#222222", "lines.linewidth": 1.4,
    "legend.frameon": False, "legend.fontsize": 8, "figure.constrained_layout.use": True,
    "svg.hashsalt": "reptune",
}  # fmt: skip


def draw(plot: Plot, png: Path | None) -> str:
    """The plot as an SVG data URI, and as a PNG file; "" when its data are missing."""
    import matplotlib as mpl  # a second, which programs that only say things do not wait for

    with mpl.rc_context(STYLE):
        figure = plot.draw()
        if figure is None:
            return ""
        if png is not None:
            with ending.whole(png) as scratch:
                figure.savefig(scratch, format="png", dpi=160, facecolor="white")
            figure.set_layout_engine("none")  # laid out already, and slow
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
