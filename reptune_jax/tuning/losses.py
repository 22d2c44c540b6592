"""The losses. Each returns (unreduced sum, count), so that accumulating them is exact.

Token loss: cross-entropy at label positions. Cosine loss: paper section 3, tune in (1 - s cos)/2,
tune out |cos|. Retention: KL(base || tuned) on text that has nothing to do with the behavior.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp


class Sum(NamedTuple):
    """An unreduced loss: its sum and how much was summed."""

    total: jax.Array
    n: jax.Array


@flax.struct.dataclass
class CosineLoss:
    """Which cosine loss, as data: every arm and sign is the same compiled program."""

    sign: jax.Array  # s: +1 toward the vector, -1 away from it
    into: jax.Array  # weight of (1 - s cos)/2
    out: jax.Array  # weight of |cos|
    layer_N: jax.Array  # 1 at layers that count


def take(hidden_BxTxD: jax.Array, at_BxL: jax.Array) -> jax.Array:
    """[B, L, D]: hidden states at the positions that predict a label, and only those."""
    return jnp.take_along_axis(hidden_BxTxD, at_BxL[..., None], axis=1)


def token_loss(
    logits: Callable[[jax.Array], jax.Array],
    hidden_BxLxD: jax.Array,
    target_BxLxC: jax.Array,
    weight_BxLxC: jax.Array,
) -> Sum:
    """Cross-entropy, soft over C candidate tokens (1: ordinary; 2 at .5 each: label-neutral)."""
    logp_BxLxV = jax.nn.log_softmax(logits(hidden_BxLxD), axis=-1)
    logp_BxLxC = jnp.take_along_axis(logp_BxLxV, target_BxLxC, axis=-1)
    return Sum(-jnp.sum(logp_BxLxC * weight_BxLxC), jnp.sum(weight_BxLxC))


def cosine_loss(cosine_NxBxT: jax.Array, weight_BxT: jax.Array, spec: CosineLoss) -> Sum:
    """Mean over layers, then over the chosen tokens (paper section 3; its code: one token each)."""
    each = spec.into * (1 - spec.sign * cosine_NxBxT) / 2 + spec.out * jnp.abs(cosine_NxBxT)
    each_BxT = jnp.einsum("n,nbt->bt", spec.layer_N / jnp.sum(spec.layer_N), each)
    return Sum(jnp.sum(each_BxT * weight_BxT), jnp.sum(weight_BxT))


def retention_loss(
    logits: Callable[[jax.Array], jax.Array],
    hidden_RxLxD: jax.Array,
    base_hidden_RxLxD: jax.Array,
    weight_RxL: jax.Array,
) -> Sum:
    """KL(base || tuned) in nats at the chosen tokens; the base comes as its final hidden states."""
    base = jax.lax.stop_gradient(jax.nn.log_softmax(logits(base_hidden_RxLxD), axis=-1))
    tuned = jax.nn.log_softmax(logits(hidden_RxLxD), axis=-1)
    kl_RxL = jnp.sum(jnp.exp(base) * (base - tuned), axis=-1)
    return Sum(jnp.sum(kl_RxL * weight_RxL), jnp.sum(weight_RxL))
