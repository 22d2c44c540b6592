"""LoRA in a run: which projections, how they begin, and how they get into whole weights.

With `train.lora.rank` = 0 whole weights are trained (`partition.split`); otherwise the projections
that `train.modules` names, in the layers of `train.layers`, have adapters and nothing else moves.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from reptune_jax.model import lora
from reptune_jax.model.arch import Arch
from reptune_jax.tuning import partition
from reptune_jax.tuning.partition import Flat


def begin(
    arch: Arch,
    params: Mapping[str, Any],
    train: Any,
    seed: int,
    frozen: dict[str, Any] | None = None,
) -> tuple[Flat, dict[str, Any]]:
    """(trained leaves at step 0, the frozen rest in segments), as the config says.

    With adapters nothing of a model is taken out of its frozen rest, so that runs of one config can
    share a copy: `frozen`, as an earlier call returned it.

    Raises:
      ValueError: a pattern that matches nothing that can be trained so.
    """
    if not train.lora.rank:
        return partition.split(params, train.layers, train.modules)
    if frozen is None:
        _, frozen = partition.split(params, train.layers, ())
    flat = traverse_util.flatten_dict(frozen["tuned"], sep="/")
    kernels = {p: flat[f"{p}/kernel"].shape[1:] for p in targets(arch, train.modules)}
    first, stop = train.layers
    return lora.init(arch, kernels, stop - first, train.lora.rank, seed), frozen


def targets(arch: Arch, modules: Sequence[str]) -> list[str]:
    """The projections whose kernel a pattern matches.

    Raises:
      ValueError: a pattern that matches no projection.
    """
    known = sorted(lora.input_axes(arch))
    chosen: set[str] = set()
    for pattern in modules:
        hits = [path for path in known if re.search(pattern, f"{path}/kernel")]
        if not hits:
            raise ValueError(
                f"train.modules: {pattern!r} matches no projection, expected a pattern of one of "
                f"{', '.join(known)}. Other weights have no adapters: set train.lora.rank=0."
            )
        chosen.update(hits)
    return sorted(chosen)


def scale(settings: Any) -> float:
    """What (x A) B is multiplied by; `settings` is `train.lora`."""
    return settings.alpha / settings.rank if settings.rank else 1.0


def about(arch: Arch, train: Any) -> dict[str, Any] | None:
    """What a checkpoint says of its adapters; None where whole weights are trained."""
    if not train.lora.rank:
        return None
    found = targets(arch, train.modules)
    return {"rank": train.lora.rank, "alpha": float(train.lora.alpha), "targets": found}


def kernels(meta: Mapping[str, Any]) -> list[str]:
    """The kernels that a checkpoint's adapters change; none where it has whole weights."""
    return [f"{path}/kernel" for path in (meta.get("lora") or {"targets": ()})["targets"]]


def change(
    trained: Mapping[str, Any], meta: Mapping[str, Any], kernel: str, layers: slice = slice(None)
) -> jax.Array:
    """What a checkpoint's adapters add to a kernel in some of the tuned layers, [L, ...]."""
    path = kernel.removesuffix("/kernel")
    a, b = (trained[f"{path}/{leaf}"][layers] for leaf in (lora.A, lora.B))
    return lora.delta(a, b, meta["lora"]["alpha"] / meta["lora"]["rank"])


def overlay(
    params: Mapping[str, Any], trained: Mapping[str, Any], meta: Mapping[str, Any]
) -> dict[str, Any]:
    """The one-segment tree of the tuned model: a checkpoint's weights, or its adapters, put in."""
    if not meta.get("lora"):
        return partition.overlay(params, dict(trained), meta["layers"])
    first, stop = meta["layers"]
    flat = traverse_util.flatten_dict(params, sep="/")
    merged = {}
    for path in kernels(meta):
        base = flat[f"blocks/{path}"][first:stop].astype(jnp.float32)
        merged[path] = base + change(trained, meta, path)
    return partition.overlay(params, merged, (first, stop))
