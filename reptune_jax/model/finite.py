"""Numbers that are not finite: whose they are, and what to do about it."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np


def require(
    finite_I: Sequence[bool] | np.ndarray,
    what: str,
    model: str,
    dtype: Any,
    steered: bool = False,
) -> None:
    """Raises ValueError where one of `what` (answers, scores, pairs) was computed from inf or NaN.

    Such a model says nothing, or the first token of its vocabulary, and scores NaN.
    """
    if all(finite_I):
        return
    bad = [i for i, ok in enumerate(finite_I) if not ok]
    advice = ["smaller doses"] if steered else []
    name = jnp.dtype(dtype).name
    if name == "float16":  # its largest number is 65,504, and the first token is often longer
        advice.insert(0, 'dtype="bfloat16" or "float32" in `load`')
    elif not steered:
        advice.append("whole weights: load the model as it was published")
    raise ValueError(
        f"{model}: got numbers that are not finite, in {name}, in {len(bad)} of {len(finite_I)} "
        f"{what} (number {', '.join(map(str, bad[:8]))}{', …' if len(bad) > 8 else ''}, from 0), "
        f"expected finite ones. Use {', or '.join(advice)}."
    )
