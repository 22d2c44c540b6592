"""The exact rung: a constant addition written into the weights as a bias, no training.

Adding a v at the output of block l is the same as adding it to the bias of that block's
`down_proj`, for every token, prompt included. The checkpoint stays an ordinary one where its config
has such biases.
"""

import dataclasses

import jax.numpy as jnp
from flax import traverse_util

from reptune_jax.lm import Model
from reptune_jax.vectors.steering_vector import SteeringVector

CAN_BAKE = ("llama",)  # families whose Hugging Face config has `mlp_bias`


def bake(model: Model, vector: SteeringVector) -> Model:
    """The model that behaves, without a hook, as `model` steered with `vector` at every token.

    Raises:
      ValueError: the family has no bias to bake into, or the vector does not fit.
    """
    if model.arch.family not in CAN_BAKE:
        raise ValueError(
            f"bake: got a {model.arch.family} model, expected one of {', '.join(CAN_BAKE)}: its "
            "Hugging Face config has no MLP bias. Tune the vector into the weights (`train`)."
        )
    a = model.arch
    vector.check_shape(a.N, a.D)
    flat = traverse_util.flatten_dict(model.params, sep="/")
    for name, width in (("gate", a.F), ("up", a.F), ("down", a.D)):
        flat.setdefault(f"blocks/mlp/{name}/bias", jnp.zeros((a.N, width), model.dtype))
    bias_NxD = flat["blocks/mlp/down/bias"]
    flat["blocks/mlp/down/bias"] = bias_NxD + jnp.asarray(vector.dose_NxD, bias_NxD.dtype)
    return dataclasses.replace(
        model,
        arch=dataclasses.replace(a, mlp_bias=True),
        params=traverse_util.unflatten_dict(flat, sep="/"),
        config={**model.config, "mlp_bias": True},
    )
