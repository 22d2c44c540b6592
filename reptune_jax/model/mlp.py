"""The feed-forward half of a layer."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from reptune_jax.model.arch import Arch
from reptune_jax.model.projection import Projection

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nn.silu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_new": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu,
}


class MLP(nn.Module):
    """act(gate) * up, then down; ungated: act(up), then down."""

    arch: Arch
    dtype: Any

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        a = self.arch

        def act(x_BxTxF: jax.Array) -> jax.Array:  # rounded once: x sigmoid(x) would be twice
            return ACTIVATIONS[a.act](x_BxTxF.astype(jnp.float32)).astype(self.dtype)

        def dense(name: str, features: int) -> Projection:
            return Projection((features,), a.mlp_bias, self.dtype, name=name)

        hidden_BxTxF = act(dense("gate" if a.gated else "up", a.F)(x_BxTxD))
        if a.gated:
            hidden_BxTxF *= dense("up", a.F)(x_BxTxD)
        return dense("down", a.D)(hidden_BxTxF)
