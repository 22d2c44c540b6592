"""Layers by number: shares of a model's depth become layers of it, and all are checked.

A key of layers holds numbers, counted from 0 (15, or "15"), or shares of the depth ("0.5"), so that
a default fits every model. A range is [first, stop).
"""

import re
from collections.abc import Callable, Iterator, Sequence

from ml_collections import ConfigDict

from reptune_jax.hub.source import open_source

_SHARE = re.compile(r"0?\.\d+|1\.0*")
_RANGES = ("loss.layers", "train.layers")  # and those of loss.also


def settle(c: ConfigDict, layers_of_model: Callable[[], int] | None = None) -> None:
    """Gives every key its layers by number, in place.

    How many the model has is asked for a share alone; by default its files say it.

    Raises:
      ValueError: neither a number nor a share, or a range without a layer.
    """
    N = 0
    if any(not number(one) for _, group in _keys(c) for one in group.layers):
        N = layers_of_model() if layers_of_model else open_source(c.model).arch().N
    for key, group in _keys(c):
        layers = [layer(key, one, N) for one in group.layers]
        if _is_range(key) and len(layers) == 2 and all(map(share, group.layers)):
            layers[1] = max(layers[1], layers[0] + 1)  # a share is never nothing
        if _is_range(key) and (len(layers) != 2 or not layers[0] < layers[1]):
            raise ValueError(
                f"{key}: got {group.layers}, expected first < stop. Example: (10, 20)."
            )
        group.layers = tuple(layers)


def check(c: ConfigDict, N: int) -> None:
    """Raises ValueError where a key names a layer that a model of N layers does not have."""
    for key, group in _keys(c):
        named = tuple(group.layers)
        if _is_range(key):
            named = (named[0], named[1] - 1)
        elif key == "steer.layers":
            named = tuple(l + i for l in named for i in (0, c.steer.width - 1))
        elif not c.targets.dose:
            continue  # which layers it would be written under is not asked
        if any(not 0 <= one < N for one in named):
            raise ValueError(
                f"{key}: got {tuple(group.layers)}, expected layers of {c.model}, which has {N}, "
                "counted from 0. A range's end is not in it."
            )


def numbers(key: str, asked: Sequence[int | str], N: int, model: str) -> list[int]:
    """The layers that are meant, of a model of N, each once and in order.

    Raises:
      ValueError: neither a number nor a share, or a layer that it does not have.
    """
    found = []
    for one in asked:
        at = int(one) if number(one) else min(layer(key, one, N), N - 1)
        if at >= N:
            raise ValueError(
                f"{key}: got {one}, expected layers of {model}, which has {N}, counted from 0, or "
                "shares of its depth such as 0.5."
            )
        found.append(at)
    return sorted(set(found))


def layer(key: str, asked: int | str, N: int) -> int:
    """A layer by number, or the nearest to a share of N layers."""
    if number(asked):
        return int(asked)
    if not share(asked):
        raise ValueError(
            f"{key}: got {asked}, expected layers, counted from 0, or shares of the depth such as "
            "0.5."
        )
    return round(float(asked) * N)


def number(asked: object) -> bool:
    """Whether a layer is meant by number."""
    return asked.isdecimal() if isinstance(asked, str) else type(asked) is int and asked >= 0


def share(asked: object) -> bool:
    """Whether a layer is meant by share of the depth."""
    return isinstance(asked, str) and bool(_SHARE.fullmatch(asked))


def _keys(c: ConfigDict) -> Iterator[tuple[str, ConfigDict]]:
    """Every key whose layers are the model's, and the group that it is in."""
    for name in ("loss", "train", "steer", "targets"):
        yield f"{name}.layers", c[name]
    for name, group in c.loss.also.items():
        yield f"loss.also.{name}.layers", group


def _is_range(key: str) -> bool:
    return key in _RANGES or key.startswith("loss.also.")
