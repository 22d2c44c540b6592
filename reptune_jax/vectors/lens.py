"""What a vector reads: the tokens that it stands for, and where in a text it is found."""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from reptune_jax import mesh as meshes
from reptune_jax.lm import Model
from reptune_jax.model.read import read_at_once
from reptune_jax.model.transformer import Decoder, unembed
from reptune_jax.vectors.steering_vector import SteeringVector


def lens_logits(decoder: Decoder, params: Any, hidden_LxD: jax.Array) -> jax.Array:
    """Logits [L, V] of what goes through the final norm alone, as if nothing came after it."""
    variables = {"params": params}
    normed_LxD = decoder.apply(variables, hidden_LxD, method=lambda m, h_LxD: m.final_norm(h_LxD))
    return unembed(decoder, params, cast(jax.Array, normed_LxD))


def as_residuals(vector: SteeringVector) -> np.ndarray:
    """[N, D]: as long as residuals are, where that is known: the final norm has an epsilon."""
    unknown = "residual_norm" in vector.meta.get("unknown", ())
    return vector.dose_NxD if unknown else vector.unit().dose_NxD


def top_tokens(
    model: Model, vector: SteeringVector, top: int = 8
) -> dict[int, tuple[list[str], list[str]]]:
    """Layer -> the `top` tokens with the largest logits of v, and those of -v, largest first."""
    hidden_LxD = as_residuals(vector)[list(vector.layers)]
    both = np.concatenate([hidden_LxD, -hidden_LxD])
    ids_2LxK = meshes.fetch(_top(model.decoder, model.params, jnp.asarray(both), top=top))
    texts = [[model.tokenizer.decode([i]) for i in ids_K] for ids_K in ids_2LxK.tolist()]
    L = len(vector.layers)
    return {l: (texts[i], texts[L + i]) for i, l in enumerate(vector.layers)}


@partial(jax.jit, static_argnames=("decoder", "top"))
def _top(decoder: Decoder, params: Any, hidden_LxD: jax.Array, *, top: int) -> jax.Array:
    return jax.lax.top_k(lens_logits(decoder, params, hidden_LxD), top)[1]


def project(model: Model, vector: SteeringVector, ids: Sequence[int]) -> np.ndarray:
    """[N, T]: how far along v each token's residual lies, in what a dose of 1 adds.

    From the mean of both classes where it is known, so that of a mean difference the classes' own
    means lie at +.5 and -.5; else from zero. 0 at layers without a direction.
    """
    vector.check_shape(model.arch.N, model.arch.D)
    vector.note_model(model)
    rows = meshes.put_rows(
        (np.array([ids], np.int32), np.ones((1, len(ids)), np.int32)), model.mesh
    )
    found = read_at_once(model.decoder, model.params, *rows, hidden=False, keep_residual=True)
    h_NxTxD = meshes.fetch(found.residual_NxBxTxD)[:, 0].astype(np.float64)
    dose_NxD = vector.dose_NxD.astype(np.float64)
    along_NxT = np.einsum("ntd,nd->nt", h_NxTxD - vector.mean_NxD[:, None], dose_NxD)
    return along_NxT / np.maximum(np.square(dose_NxD).sum(1), 1e-30)[:, None]
