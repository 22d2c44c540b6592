"""The picture that an evaluation leaves in TensorBoard: mean cosine by layer and place."""

import io

import numpy as np

_LIMITS = (0.1, 0.2, 0.5, 1.0)  # few, so that most evaluations of a run share one scale


def draw(cosine_NxP: np.ndarray, title: str) -> bytes:
    """A PNG, layers upwards, places to the right, red toward the vector and blue away from it."""
    from matplotlib.figure import Figure  # a second, and a start of `train` need not wait for it

    highest = float(np.abs(cosine_NxP).max(initial=0.0))
    limit = next((x for x in _LIMITS if highest <= x), 1.0)
    figure = Figure(figsize=(7.0, 4.0), dpi=100, layout="constrained")
    ax = figure.subplots()
    image = ax.imshow(
        cosine_NxP, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", origin="lower"
    )
    ax.set(xlabel="chosen token of the row, from 0", ylabel="layer (block output)", title=title)
    ax.locator_params(integer=True)
    figure.colorbar(image, label="mean cosine")
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()
