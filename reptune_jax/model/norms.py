"""Normalization; families differ in what the scale is added to and in when they round.

  rms           x / rms(x) rounded to the dtype, then times the scale      (llama and most others)
  rms_late      times the scale in float32, then rounded                   (olmo2)
  rms_plus_one  times 1 + scale in float32, then rounded                   (gemma)
  layer         mean removed, scale and bias in float32, then rounded      (gpt2, gpt_neox)

Scales are stored as the checkpoint has them, so that they go out again to the byte.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Norm(nn.Module):
    """Over the last axis, in float32."""

    kind: str
    eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x_xD: jax.Array) -> jax.Array:
        D = x_xD.shape[-1]
        scale_D = self.param("scale", nn.initializers.ones, (D,))
        x = x_xD.astype(jnp.float32)
        if self.kind == "layer":
            x = x - x.mean(axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + self.eps)
        if self.kind == "rms":
            return x.astype(self.dtype) * scale_D.astype(self.dtype)
        scale_D = scale_D.astype(jnp.float32)
        x = x * (1 + scale_D if self.kind == "rms_plus_one" else scale_D)
        if self.kind == "layer":
            x = x + self.param("bias", nn.initializers.zeros, (D,)).astype(jnp.float32)
        return x.astype(self.dtype)
