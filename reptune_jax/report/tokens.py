"""A text whose tokens are colored by a number at every layer: a page of its own, or a picture."""

import html
import io
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

_STYLE = """body{font:14px/1.7 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}
p{white-space:pre-wrap;overflow-wrap:anywhere;margin:.2rem 0}b{color:#555;font-weight:500}
small{color:#777}span{border-radius:2px}"""


def page(pieces: Sequence[str], value_NxT: np.ndarray, layers: Sequence[int], title: str) -> str:
    """HTML with nothing outside it: the text once a layer, red above zero and blue below.

    A layer's strongest color is its largest number, the first token's left out, which is often far
    away whatever the text says; numbers are shown where the mouse rests.
    """
    head = html.escape(title)
    lines = [
        "<!doctype html>",
        f'<html lang="en"><meta charset="utf-8"><title>{head}</title><style>{_STYLE}</style>',
        f"<h1>{head}</h1>",
    ]
    for l, limit in zip(layers, limits(value_NxT[list(layers)]), strict=True):
        spans = "".join(
            f'<span style="background:{_color(x / limit)}" title="{x:+.3f}">{html.escape(piece)}'
            "</span>"
            for piece, x in zip(pieces, value_NxT[l], strict=True)
        )
        lines.append(f"<p><b>layer {l}</b> <small>±{limit:.3g}</small>\n{spans}</p>")
    return "\n".join([*lines, "</html>\n"])


def picture(
    pieces: Sequence[str], value_NxT: np.ndarray, layers: Sequence[int], title: str
) -> bytes:
    """A PNG: layers upwards, tokens to the right; colors as in `page`."""
    shown_LxT = value_NxT[list(layers)]
    share_LxT = np.clip(shown_LxT / limits(shown_LxT)[:, None], -1, 1)
    size = (max(6, 2 + 0.22 * len(pieces)), 1.6 + 0.18 * len(layers))
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    ax = figure.subplots()
    image = ax.imshow(share_LxT, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", origin="lower")
    ax.set_yticks(range(len(layers)), map(str, layers))
    ax.set_xticks(range(len(pieces)), [repr(p)[1:-1] for p in pieces], rotation=90)
    ax.tick_params(labelsize=7)
    ax.set_ylabel("layer (block output)")
    ax.set_title(title, loc="left", fontsize=8)
    figure.colorbar(image, label="share of the layer's largest")
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def limits(value_LxT: np.ndarray) -> np.ndarray:
    """[L]: the largest size in each layer, the first token's left out where there are others."""
    return np.maximum(np.abs(value_LxT[:, min(1, value_LxT.shape[1] - 1) :]).max(1), 1e-9)


def _color(share: float) -> str:
    """Of a number from -1 to 1, or beyond."""
    strength = min(abs(share), 1.0)
    return f"rgba({'214,69,65' if share > 0 else '65,131,215'},{0.75 * strength:.3f})"
