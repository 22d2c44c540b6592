"""What the untuned model computes at a run's rows, once instead of in every step.

Base cosines, for losses that hold to them or shift from them; and what enters the lowest trained
layer, since nothing below it changes: steps then begin there.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from reptune_jax import mesh as meshes
from reptune_jax.data.batches import Keep, Rows
from reptune_jax.lm import Model
from reptune_jax.model.intervene import Probe
from reptune_jax.model.transformer import Decoder, collect

_below: dict[str, Any] = {}  # the arms of a study share rows


def add_cosines(rows: Rows, model: Model, probe: Probe, batch: int) -> Rows:
    """The rows with the untuned model's cosines, each with its own behavior's vector."""
    of_rows = partial(_cosines, model.decoder, model.params, probe)
    inputs = rows.tokens_BxT, rows.mask_BxT, rows.of_B
    return dataclasses.replace(rows, base_BxNxT=in_batches(of_rows, inputs, model, batch))


def below_gib(model: Model, first: int, sides: tuple[Rows | Keep | None, ...]) -> float:
    """What `add_below` would hold on the host; 0 where there is no layer below."""
    tokens = sum(side.tokens_BxT.size for side in sides if side is not None)
    return bool(first) * tokens * model.arch.D * model.dtype.itemsize / 2**30


def add_below(
    side: Rows | Keep, model: Model, decoder: Decoder, frozen: Any, probe: Probe, batch: int
) -> Any:
    """The rows with the residual stream that enters the segment `tuned`, and cosines below it."""
    of_B = side.of_B if isinstance(side, Rows) else np.zeros(len(side.tokens_BxT), np.int32)
    inputs = side.tokens_BxT, side.mask_BxT, of_B
    known = hashlib.sha256(repr((model.sha, model.dtype, decoder.segments)).encode())
    for array in (*inputs, *map(np.asarray, jax.tree.leaves(probe))):
        known.update(array.tobytes())
    key = known.hexdigest()
    if key not in _below:
        _below[key] = in_batches(partial(_enter, decoder, frozen, probe), inputs, model, batch)
    x_BxTxD, cosine_BxMxT = _below[key]
    if isinstance(side, Keep):
        return dataclasses.replace(side, below_BxTxD=x_BxTxD)
    return dataclasses.replace(side, below_BxTxD=x_BxTxD, below_cosine_BxMxT=cosine_BxMxT)


def in_batches(
    compute: Callable[..., Any], inputs: tuple[np.ndarray, ...], model: Model, batch: int
) -> Any:
    """`compute(*inputs)` for all rows, some at a time on the devices; the results on the host."""
    found, B = [], len(inputs[0])
    for start in range(0, B, batch):
        rows_B = np.resize(np.arange(start, min(start + batch, B)), batch)
        rows = meshes.put_rows(tuple(a[rows_B] for a in inputs), model.mesh)
        found.append(meshes.fetch(compute(*rows)))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:B], *found)


@partial(jax.jit, static_argnums=0)
def _cosines(decoder: Decoder, params, probe: Probe, tokens_BxT, mask_BxT, of_B):
    _, sown = _apply(decoder, params, probe, tokens_BxT, mask_BxT, of_B)
    return collect(sown["intermediates"], decoder.segments, "cosine").swapaxes(0, 1)


@partial(jax.jit, static_argnums=0)
def _enter(decoder: Decoder, params, probe: Probe, tokens_BxT, mask_BxT, of_B):
    (x_BxTxD, _), sown = _apply(decoder, params, probe, tokens_BxT, mask_BxT, of_B, leave="tuned")
    cosine_MxBxT = collect(sown["intermediates"], decoder.segments, "cosine")
    return x_BxTxD, cosine_MxBxT.swapaxes(0, 1)


def _apply(decoder: Decoder, params, probe: Probe, tokens_BxT, mask_BxT, of_B, **how):
    probe = jax.tree.map(lambda a: a[:, of_B], probe)
    inputs = {"tokens_BxT": tokens_BxT, "mask_BxT": mask_BxT, "probe": probe, **how}
    return decoder.apply({"params": params}, **inputs, mutable=["intermediates"])
