"""What is trained and what is frozen.

The one-segment tree of a loaded model is cut into `below | tuned | above`, so that the backward
pass stops at the lowest trained layer; of the tuned segment only the chosen weights become trained
leaves (float32 masters), everything else stays frozen in its own dtype.

With `train.lora.rank` > 0 the chosen projections have adapters instead, and no weight moves.
"""

import contextlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from reptune_jax.hub.weights import abstract_params
from reptune_jax.model import lora
from reptune_jax.model.arch import Arch
from reptune_jax.model.lora import Flat
from reptune_jax.model.transformer import Segments


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


@contextlib.contextmanager
def lent(params: dict[str, Any], layers: Sequence[int]) -> Iterator[dict[str, Any]]:
    """`params` in segments, without a second copy of the model: meanwhile it has no blocks itself.

    Leaf by leaf the parts take the place of the whole, and in the end the whole that of the parts,
    bit for bit. Who still holds a part then holds a second copy.
    """
    blocks = traverse_util.flatten_dict(params.pop("blocks"))
    placed = {path: whole.sharding for path, whole in blocks.items()}
    parts: dict[tuple[str, ...], dict[str, jax.Array]] = {}
    cuts = _cuts(len(next(iter(blocks.values()))), layers)
    tree: dict[str, Any] = {}
    try:
        for path in placed:
            parts[path] = {name: blocks[path][rows] for name, rows in cuts.items()}
            del blocks[path]
        tree |= params
        for name in cuts:
            tree[name] = traverse_util.unflatten_dict({p: of[name] for p, of in parts.items()})
        yield tree
    finally:
        tree.clear()
        for path in list(parts):
            whole = jnp.concatenate(list(parts.pop(path).values()))
            blocks[path] = jax.device_put(whole, placed[path])
        params["blocks"] = traverse_util.unflatten_dict(blocks)


def split(
    params: Mapping[str, Any], layers: Sequence[int], modules: Sequence[str]
) -> tuple[Flat, dict[str, Any]]:
    """(trained leaves by path, float32; the frozen rest in segments).

    `params` are a model's, whose blocks are copied, or `lent`.

    Raises:
      ValueError: a pattern in `modules` that matches no weight.
    """
    frozen = dict(params)
    if blocks := frozen.pop("blocks", None):
        cuts = _cuts(len(jax.tree.leaves(blocks)[0]), layers)
        frozen |= {name: jax.tree.map(lambda a, r=r: a[r], blocks) for name, r in cuts.items()}
    flat = traverse_util.flatten_dict(frozen.pop("tuned"), sep="/")
    chosen = _choose(sorted(flat), modules)
    # A copy even where dtype and range are the same: a step donates it, the base model must stay.
    trained = {path: jnp.array(flat.pop(path), jnp.float32) for path in chosen}
    frozen["tuned"] = traverse_util.unflatten_dict(flat, sep="/")
    return trained, frozen


def _cuts(N: int, layers: Sequence[int]) -> dict[str, slice]:
    """The layers of each segment, bottom to top."""
    stops = itertools.accumulate(length for _, length in segments(N, layers))
    return {
        name: slice(stop - length, stop)
        for (name, length), stop in zip(segments(N, layers), stops, strict=True)
    }


def merge(trained: Flat, frozen: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """The segmented tree a forward pass takes; masters are cast once, before the scan.

    Adapters are no weights of that tree: `lora.variables` makes them a collection beside it.
    """
    flat = traverse_util.flatten_dict(frozen.get("tuned", {}), sep="/")  # {}: all are trained
    flat |= {path: leaf.astype(dtype) for path, leaf in trained.items() if not lora.is_leaf(path)}
    return {**frozen, "tuned": traverse_util.unflatten_dict(flat, sep="/")}


def begin(
    arch: Arch,
    params: Mapping[str, Any],
    train: Any,
    seed: int,
) -> tuple[Flat, dict[str, Any]]:
    """(trained leaves at step 0, the frozen rest in segments), as the config says.

    Raises:
      ValueError: a pattern that matches nothing that can be trained so.
    """
    if not train.lora.rank:
        return split(params, train.layers, train.modules)
    _, frozen = split(params, train.layers, ())
    shapes = abstract_params(arch)  # the base may be held in integers
    kernels = {p: shapes[f"blocks/{p}/kernel"].shape[1:] for p in targets(arch, train.modules)}
    first, stop = train.layers
    return lora.init(arch, kernels, stop - first, train.lora.rank, seed), frozen


def targets(arch: Arch, modules: Sequence[str]) -> list[str]:
    """The projections whose kernel a pattern matches.

    Raises:
      ValueError: a pattern that matches no projection.
    """
    return _choose(sorted(lora.input_axes(arch)), modules, adapted=True)


def scale(settings: Any) -> float:
    """What (x A) B is multiplied by; `settings` is `train.lora`."""
    return settings.alpha / settings.rank if settings.rank else 1.0


def about(arch: Arch, train: Any) -> dict[str, Any] | None:
    """What a checkpoint says of its adapters; None where whole weights are trained."""
    if not train.lora.rank:
        return None
    found = targets(arch, train.modules)
    return {"rank": train.lora.rank, "alpha": float(train.lora.alpha), "targets": found}


def _choose(known: Sequence[str], modules: Sequence[str], adapted: bool = False) -> list[str]:
    kind, more = "weight", ""
    if adapted:
        kind, more = "projection", " Other weights have no adapters: set train.lora.rank=0."
    chosen: set[str] = set()
    for pattern in modules:
        hits = [path for path in known if re.search(pattern, f"{path}/kernel" if adapted else path)]
        if not hits:
            raise ValueError(
                f"train.modules: {pattern!r} matches no {kind}, expected a pattern of one of "
                f"{', '.join(known)}.{more}"
            )
        chosen.update(hits)
    return sorted(chosen)
