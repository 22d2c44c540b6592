"""The exact rungs: an intervention written into the weights, no training.

add     adding a v at the output of block l is adding it to the bias of that block's MLP output, for
        every token, prompt included. The checkpoint stays an ordinary one where its config has such
        biases.
ablate  a residual stream has no component along u if nothing ever writes one: u is projected out of
        all that writes to it (embedding, attention and MLP outputs with their biases). That is
        ablation at *every* write, also between a block's attention and its MLP; a `Steer`
        ablates at the output of blocks only.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from reptune_jax.hub.rounding import Rounding
from reptune_jax.lm import Model
from reptune_jax.vectors.steering_vector import SteeringVector

# family -> the key of its Hugging Face config that gives the MLP biases; where a family's MLP
# output always has one (gpt2, gpt_neox), the leaf is there and needs no key
MLP_BIAS_KEYS = {"llama": "mlp_bias", "granite": "mlp_bias"}
_WRITERS = ("attn/o/kernel", "attn/o/bias", "mlp/down/kernel", "mlp/down/bias")


def bake(model: Model, vector: SteeringVector, mode: str = "add") -> Model:
    """The model that behaves, without a hook, as `model` under the intervention at every token.

    "add": as steered with `vector`, exactly. "ablate": with the component along the vector's one
    direction (`vector.at(layers=[l])`) removed wherever something is written to the residual.

    Raises:
      ValueError: the family has no bias to bake into, or a norm after what would be orthogonalized;
        more than one direction to ablate; or the vector does not fit.
    """
    if not isinstance(vector, SteeringVector):
        raise ValueError(
            f"bake: got {type(vector).__name__}, expected a SteeringVector: only what is done at "
            "every token, adding it or ablating, can be written into weights. Steer online."
        )
    vector.check_shape(model.arch.N, model.arch.D)
    vector.note_model(model)
    if mode == "add":
        return _add(model, vector)
    if mode == "ablate":
        return _ablate(model, _one_direction(vector))
    raise ValueError(f"mode: got {mode!r}, expected 'add' or 'ablate'.")


def _add(model: Model, vector: SteeringVector) -> Model:
    a = model.arch
    flat = traverse_util.flatten_dict(model.params, sep="/")
    key = MLP_BIAS_KEYS.get(a.family)
    if key is None and "blocks/mlp/down/bias" not in flat:
        raise ValueError(
            f"bake: got a {a.family} model, expected one of {', '.join(MLP_BIAS_KEYS)} or a family "
            "whose MLP always has a bias: its Hugging Face config has no MLP bias. Steer online, "
            "or tune the vector into the weights (`train`)."
        )
    _check_pre_norm(model)
    if key is not None:
        for name, width in (("gate", a.F), ("up", a.F), ("down", a.D)):
            flat.setdefault(f"blocks/mlp/{name}/bias", jnp.zeros((a.N, width), model.dtype))
        model = dataclasses.replace(
            model,
            arch=dataclasses.replace(a, mlp_bias=True),
            config={**model.config, key: True},
        )
    dose_NxD = vector.dose_NxD / a.residual_scale
    bias_NxD = flat["blocks/mlp/down/bias"]
    baked_NxD = bias_NxD + jnp.asarray(dose_NxD, bias_NxD.dtype)
    rounding = Rounding(model.dtype)
    rounding.add(bias_NxD, jnp.asarray(dose_NxD, jnp.float32), baked_NxD)
    rounding.report(model.name)
    return _with(model, {**flat, "blocks/mlp/down/bias": baked_NxD})


def _ablate(model: Model, u_D: np.ndarray) -> Model:
    _check_pre_norm(model)
    flat = traverse_util.flatten_dict(model.params, sep="/")
    if model.arch.tied:
        # The unembedding reads and must keep what it reads: it becomes a table of its own.
        flat["head/embedding"] = flat["embed/embedding"]
        model = dataclasses.replace(
            model,
            arch=dataclasses.replace(model.arch, tied=False),
            config={**model.config, "tie_word_embeddings": False},
        )
    rounding = Rounding(model.dtype)
    for path in flat:
        if _writes(path):
            before = flat[path]
            removed = _along(before, u_D)
            flat[path] = (before.astype(jnp.float32) - removed).astype(before.dtype)
            rounding.add(before, -removed, flat[path])
    rounding.report(model.name)
    return _with(model, flat)


def _writes(path: str) -> bool:
    """Whether a leaf writes to the residual: its last axis is D."""
    top, _, rest = path.partition("/")
    return rest in _WRITERS if top == "blocks" else rest == "embedding" and top != "head"


@jax.jit
def _along(leaf: jax.Array, u_D: jax.Array) -> jax.Array:
    """The component along u of every [..., D] row, float32."""
    along = jnp.einsum("...d,d->...", leaf.astype(jnp.float32), u_D, precision="highest")
    return along[..., None] * u_D


def _one_direction(vector: SteeringVector) -> np.ndarray:
    rows = np.flatnonzero(np.linalg.norm(vector.directions_NxD, axis=1))
    if len(rows) != 1:
        raise ValueError(
            f"vector: got directions at {len(rows)} layers, expected one, which is ablated "
            "everywhere. Take one: vector.at(layers=[l])."
        )
    row_D = vector.directions_NxD[rows[0]].astype(np.float32)
    return row_D / np.linalg.norm(row_D)


def _check_pre_norm(model: Model) -> None:
    """A norm with a scale between a writer and the residual would turn the direction."""
    if model.arch.post_norm:
        raise ValueError(
            f"bake: got a {model.arch.family} model, whose blocks norm what they add, expected one "
            "that adds it as it is. Steer online, or tune the vector into the weights (`train`)."
        )


def _with(model: Model, flat: dict[str, Any]) -> Model:
    return dataclasses.replace(model, params=traverse_util.unflatten_dict(flat, sep="/"))
