"""The untuned model's cosines at a run's rows, for losses that hold to them or shift from them."""

import dataclasses
from functools import partial

import jax
import numpy as np

from reptune_jax import mesh as meshes
from reptune_jax.data.batches import Rows
from reptune_jax.lm import Model
from reptune_jax.model.intervene import Probe
from reptune_jax.model.transformer import Decoder, collect


def add(rows: Rows, model: Model, probe: Probe, batch: int) -> Rows:
    """The rows with the untuned model's cosines, each with its own behavior's vector."""
    found, B = [], len(rows.of_B)
    for start in range(0, B, batch):
        rows_B = np.resize(np.arange(start, min(start + batch, B)), batch)
        inputs = tuple(a[rows_B] for a in (rows.tokens_BxT, rows.mask_BxT, rows.of_B))
        inputs = meshes.put_rows(inputs, model.mesh)
        found.append(meshes.fetch(_cosines(model.decoder, model.params, probe, *inputs)))
    return dataclasses.replace(rows, base_BxNxT=np.concatenate(found)[:B])


@partial(jax.jit, static_argnames=("decoder",))
def _cosines(decoder: Decoder, params, probe: Probe, tokens_BxT, mask_BxT, of_B):
    probe = jax.tree.map(lambda a: a[:, of_B], probe)
    _, sown = decoder.apply(
        {"params": params}, tokens_BxT, mask_BxT, probe=probe, mutable=["intermediates"]
    )
    return collect(sown["intermediates"], decoder.segments, "cosine").swapaxes(0, 1)
