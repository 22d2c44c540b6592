"""What is trained and what is frozen.

The one-segment tree of a loaded model is cut into `below | tuned | above`, so that the backward
pass stops at the lowest trained layer; of the tuned segment only the chosen weights become trained
leaves (float32 masters), everything else stays frozen in its own dtype.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from reptune_jax.model import lora
from reptune_jax.model.transformer import Segments

Flat = dict[str, jax.Array]  # path -> array


def segments(N: int, layers: Sequence[int]) -> Segments:
    """(name, length) of the parts below, in and above `layers` = (first, stop); no empty ones.

    Raises:
      ValueError: the range leaves the model.
    """
    first, stop = layers
    if not 0 <= first < stop <= N:
        raise ValueError(f"train.layers: got ({first}, {stop}), expected 0 <= first < stop <= {N}.")
    cuts = (("below", first), ("tuned", stop - first), ("above", N - stop))
    return tuple((name, length) for name, length in cuts if length)


def split(
    params: Mapping[str, Any], layers: Sequence[int], modules: Sequence[str]
) -> tuple[Flat, dict[str, Any]]:
    """(trained leaves by path, float32; the frozen rest in segments).

    Raises:
      ValueError: a pattern in `modules` that matches no weight.
    """
    first, stop = layers
    N = jax.tree.leaves(params["blocks"])[0].shape[0]
    cuts = {"below": slice(0, first), "tuned": slice(first, stop), "above": slice(stop, N)}
    frozen = {key: value for key, value in params.items() if key != "blocks"}
    for name, _ in segments(N, layers):
        frozen[name] = jax.tree.map(lambda a, c=cuts[name]: a[c], params["blocks"])
    flat = traverse_util.flatten_dict(frozen.pop("tuned"), sep="/")
    chosen = _choose(sorted(flat), modules)
    # A copy even where dtype and range are the same: a step donates it, the base model must stay.
    trained = {path: jnp.array(flat.pop(path), jnp.float32) for path in chosen}
    frozen["tuned"] = traverse_util.unflatten_dict(flat, sep="/")
    return trained, frozen


def merge(trained: Flat, frozen: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """The segmented tree a forward pass takes; masters are cast once, before the scan.

    Adapters are no weights of that tree: `lora.variables` makes them a collection beside it.
    """
    flat = traverse_util.flatten_dict(frozen.get("tuned", {}), sep="/")  # {}: all are trained
    flat |= {path: leaf.astype(dtype) for path, leaf in trained.items() if not lora.is_leaf(path)}
    return {**frozen, "tuned": traverse_util.unflatten_dict(flat, sep="/")}


def overlay(params: Mapping[str, Any], trained: Flat, layers: Sequence[int]) -> dict[str, Any]:
    """The one-segment tree with the trained leaves put in their place."""
    first, stop = layers
    flat = traverse_util.flatten_dict(params, sep="/")
    for path, leaf in trained.items():
        whole = flat[f"blocks/{path}"]
        flat[f"blocks/{path}"] = whole.at[first:stop].set(leaf.astype(whole.dtype))
    return traverse_util.unflatten_dict(flat, sep="/")


def _choose(paths: list[str], modules: Sequence[str]) -> list[str]:
    chosen: set[str] = set()
    for pattern in modules:
        hits = [path for path in paths if re.search(pattern, path)]
        if not hits:
            raise ValueError(
                f"train.modules: {pattern!r} matches no weight, expected a pattern of one of "
                f"{', '.join(paths)}."
            )
        chosen.update(hits)
    return sorted(chosen)
