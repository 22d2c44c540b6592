"""The one layer of weights that everything else is made of: from some axes to others."""

import math
from typing import Any

import flax.linen as nn
import jax

from reptune_jax.model import integers


class Projection(nn.Module):
    """x's last axes, `inputs` of them, times a kernel [*inputs, *outs], plus a bias [*outs].

    Where `params` hold a kernel as integers, that one is used.
    """

    outs: tuple[int, ...]
    use_bias: bool
    dtype: Any
    inputs: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(self.dtype)
        if self.has_variable("params", integers.CODES):
            codes_RxO: jax.Array = self.get_variable("params", integers.CODES)
            step_GxO: jax.Array = self.get_variable("params", integers.STEP)
            y = integers.product(x, codes_RxO, step_GxO, self.inputs, self.outs)
        else:
            shape = (*x.shape[-self.inputs :], *self.outs)
            kernel = self.param("kernel", _random, shape, self.inputs)
            y = integers.times(x, kernel.astype(self.dtype), self.inputs)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, self.outs).astype(self.dtype)
        return y


def _random(key: jax.Array, shape: tuple[int, ...], inputs: int) -> jax.Array:
    """Of variance 1 / inputs."""
    return jax.random.normal(key, shape) * math.prod(shape[:inputs]) ** -0.5
