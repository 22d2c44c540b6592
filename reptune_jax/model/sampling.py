"""How a token is drawn: temperature, top-k, top-p, repetition penalty, in transformers' order.

What is off is None, and no part of the compiled program: a greedy one draws nothing.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

OFF = {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
_MAY: dict[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (lambda x: x >= 0, "0 (greedy) or more"),
    "top_k": (lambda x: x >= 0 and x == int(x), "a whole number of tokens, or 0 for all"),
    "top_p": (lambda x: 0 < x <= 1, "a share above 0 and up to 1"),
    "repetition_penalty": (lambda x: x > 0, "a factor above 0, 1 for none"),
}


@flax.struct.dataclass
class Sampling:
    """Scalars; None: greedy, all tokens, the whole of the distribution, no penalty."""

    temperature: jax.Array | None = None
    top_k: jax.Array | None = None  # tokens at least as likely as the k-th
    top_p: jax.Array | None = None  # the likeliest whose probabilities reach p together
    repetition_penalty: jax.Array | None = None  # of tokens that are in the row already

    @classmethod
    def of(cls, temperature: float = 0.0, **others: float) -> "Sampling":
        """Top-k 0, top-p 1 and a penalty of 1 are none. Greedy at temperature 0.

        Raises:
          ValueError: a number that is none of these.
        """
        for name, value in {"temperature": temperature, **others}.items():
            if not _may(name, value):
                raise ValueError(f"{name}: got {value!r}, expected {_MAY[name][1]}.")
        drawn = {k: v for k, v in others.items() if v != OFF[k]}
        if not temperature:  # whatever else is kept, the likeliest is
            drawn = {k: v for k, v in drawn.items() if k == "repetition_penalty"}
        arrays = {k: jnp.int32(v) if k == "top_k" else jnp.float32(v) for k, v in drawn.items()}
        return cls(jnp.float32(temperature) if temperature else None, **arrays)


def declared(config: Mapping[str, Any]) -> dict[str, float]:
    """What a generation_config.json says of sampling; of a wrong kind: as if it were not there."""
    found = {k: config.get(k) for k in OFF}
    return {k: v for k, v in found.items() if v is not None and _may(k, v)}


def _may(name: str, value: Any) -> bool:
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    return number and math.isfinite(value) and _MAY[name][0](value)


def sampled(own: Mapping[str, float], given: Mapping[str, float | None]) -> dict[str, float]:
    """What is given, and a model's own for what is not."""
    return {**own, **{name: value for name, value in given.items() if value is not None}}


def seen(sampling: Sampling, tokens_BxT: jax.Array, mask_BxT: jax.Array, V: int) -> Any:
    """[B, V]: the tokens of each row that a penalty meets; None without one."""
    if sampling.repetition_penalty is None:
        return None
    rows_Bx1 = jnp.arange(len(tokens_BxT))[:, None]
    return jnp.zeros((len(tokens_BxT), V), bool).at[rows_Bx1, tokens_BxT].max(mask_BxT > 0)


def draw(
    sampling: Sampling, logits_BxV: jax.Array, seen_BxV: jax.Array | None, key: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """(token of each row [B], what is seen with them)."""
    logits_BxV = warp(sampling, logits_BxV, seen_BxV)
    if sampling.temperature is None:
        token_B = jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    else:
        token_B = jax.random.categorical(key, logits_BxV).astype(jnp.int32)
    if seen_BxV is not None:
        seen_BxV = seen_BxV.at[jnp.arange(len(token_B)), token_B].set(True)
    return token_B, seen_BxV


def warp(s: Sampling, logits_BxV: jax.Array, seen_BxV: jax.Array | None) -> jax.Array:
    """Logits of what is drawn from; -inf where a token is out."""
    if s.repetition_penalty is not None and seen_BxV is not None:
        less_BxV = jnp.where(
            logits_BxV < 0, logits_BxV * s.repetition_penalty, logits_BxV / s.repetition_penalty
        )
        logits_BxV = jnp.where(seen_BxV, less_BxV, logits_BxV)
    if s.temperature is not None:
        logits_BxV = logits_BxV / jnp.maximum(s.temperature, 1e-6)
    if s.top_k is None and s.top_p is None:
        return logits_BxV
    down_BxV = -jnp.sort(-logits_BxV, axis=-1)
    least_Bx1 = down_BxV[:, -1:]
    if s.top_k is not None:
        at = jnp.minimum(s.top_k, down_BxV.shape[1]) - 1
        least_Bx1 = jnp.take_along_axis(down_BxV, jnp.broadcast_to(at, least_Bx1.shape), 1)
    if s.top_p is not None:
        kept_BxV = jnp.where(down_BxV >= least_Bx1, down_BxV, -jnp.inf)
        p_BxV = jax.nn.softmax(kept_BxV, axis=-1)
        before_BxV = jnp.cumsum(p_BxV, axis=-1) - p_BxV  # of all that are likelier
        of_p_BxV = jnp.where(before_BxV < s.top_p, kept_BxV, jnp.inf)
        least_Bx1 = jnp.min(jnp.where(kept_BxV > -jnp.inf, of_p_BxV, jnp.inf), -1, keepdims=True)
    return jnp.where(logits_BxV >= least_Bx1, logits_BxV, -jnp.inf)
