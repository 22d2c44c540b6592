"""The losses. Each returns its unreduced sum and its count by row, so that accumulating is exact.

Token loss: cross-entropy at label positions. Cosine loss: paper section 3, tune in (1 - s cos)/2,
tune out |cos|; beyond the paper, held at (or shifted from) the base model's cosine. Ending loss:
how likely an answer ends, held at the base's where it goes on. Match: the distance of residuals
from the base's under a persona, or from the base's plus a dose of the vector. Retention, on text
that has nothing to do with the behavior: KL(base || tuned), the distance of residuals from the
base's, cross-entropy on the base's own answers.
"""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

_EPS = 1e-6
_RARE = 1e-4  # endings less likely than this are all alike


class Sum(NamedTuple):
    """Unreduced losses: their sums and how much was summed; both [B] as the functions return it."""

    total: jax.Array
    n: jax.Array

    def over_rows(self) -> "Sum":
        """All rows together, scalars."""
        return Sum(jnp.sum(self.total), jnp.sum(self.n))

    def by_behavior(self, of_B: jax.Array, K: int) -> "Sum":
        """[K]: the rows of each behavior together."""
        of_KxB = jnp.arange(K)[:, None] == of_B
        return Sum(of_KxB @ self.total, of_KxB @ self.n)


@flax.struct.dataclass
class CosineLoss:
    """Which cosine loss each behavior has, as data: all arms and signs are one compiled program."""

    sign_K: jax.Array  # s: +1 toward the vector, -1 away from it
    into_K: jax.Array  # weight of (1 - s cos)/2
    out_K: jax.Array  # weight of |cos|
    hold_K: jax.Array  # weight of (cos - (base cos + s shift))^2
    shift_K: jax.Array
    layer_KxN: jax.Array  # 1 at layers that count


def take(hidden_BxTxD: jax.Array, at_BxL: jax.Array) -> jax.Array:
    """[B, L, D]: hidden states at the positions that predict a label, and only those."""
    return jnp.take_along_axis(hidden_BxTxD, at_BxL[..., None], axis=1)


def token_loss(logits_BxLxV: jax.Array, target_BxLxC: jax.Array, weight_BxLxC: jax.Array) -> Sum:
    """Cross-entropy, soft over C candidate tokens (1: ordinary; 2 at .5 each: label-neutral)."""
    logp_BxLxV = jax.nn.log_softmax(logits_BxLxV, axis=-1)
    logp_BxLxC = jnp.take_along_axis(logp_BxLxV, target_BxLxC, axis=-1)
    return Sum(-jnp.sum(logp_BxLxC * weight_BxLxC, (1, 2)), jnp.sum(weight_BxLxC, (1, 2)))


def cosine_loss(
    cosine_NxBxT: jax.Array,
    weight_BxT: jax.Array,
    spec: CosineLoss,
    of_B: jax.Array,
    base_BxNxT: jax.Array | None = None,
) -> Sum:
    """Mean over layers, then over the chosen tokens (paper section 3; its code: one token each).

    `of_B` says which behavior's loss a row has; `base_BxNxT`, the base's cosines, is for `hold_K`.
    """
    sign, into, out, hold, shift = (
        a[of_B][:, None]  # [B, 1]
        for a in (spec.sign_K, spec.into_K, spec.out_K, spec.hold_K, spec.shift_K)
    )
    each_NxBxT = into * (1 - sign * cosine_NxBxT) / 2 + out * jnp.abs(cosine_NxBxT)
    if base_BxNxT is not None:
        goal_NxBxT = jnp.swapaxes(base_BxNxT, 0, 1) + sign * shift
        each_NxBxT += hold * (cosine_NxBxT - goal_NxBxT) ** 2
    share_KxN = spec.layer_KxN / jnp.sum(spec.layer_KxN, -1, keepdims=True)
    each_BxT = jnp.einsum("bn,nbt->bt", share_KxN[of_B], each_NxBxT)
    return Sum(jnp.sum(each_BxT * weight_BxT, 1), jnp.sum(weight_BxT, 1))


def ending_loss(
    logits_BxLxV: jax.Array, base_BxL: jax.Array, weight_BxL: jax.Array, stop_S: jax.Array
) -> Sum:
    """(log p(a token of `stop_S`) - the base's)^2, in nats^2, where an answer goes on.

    Text that was cut at a length teaches that answers go on. Between likelihoods (a label that is
    worth 1 - p, and an ending that is worth p) the pull is p too, so next to nothing.
    """
    logp_BxLxV = jax.nn.log_softmax(logits_BxLxV, axis=-1)
    ending_BxL = jax.nn.logsumexp(logp_BxLxV[..., stop_S], axis=-1)
    rare = jnp.log(_RARE)
    apart_BxL = jnp.logaddexp(ending_BxL, rare) - jnp.logaddexp(base_BxL, rare)
    return Sum(jnp.sum(apart_BxL**2 * weight_BxL, 1), jnp.sum(weight_BxL, 1))


def retention_loss(
    logits_RxLxV: jax.Array, base_logits_RxLxV: jax.Array, weight_RxL: jax.Array
) -> Sum:
    """KL(base || tuned) in nats at the chosen tokens."""
    base = jax.lax.stop_gradient(jax.nn.log_softmax(base_logits_RxLxV, axis=-1))
    tuned = jax.nn.log_softmax(logits_RxLxV, axis=-1)
    kl_RxL = jnp.sum(jnp.exp(base) * (base - tuned), axis=-1)
    return Sum(jnp.sum(kl_RxL * weight_RxL, 1), jnp.sum(weight_RxL, 1))


def residual_loss(read_MxRxLxD: jax.Array, goal_RxMxLxD: jax.Array, weight_RxL: jax.Array) -> Sum:
    """|h - goal|^2 / |goal|^2 at the chosen tokens, mean over the M layers; often the base's h.

    Relative, because a residual of a late layer is tens of times as long as one of an early layer.
    (Circuit breakers, arXiv 2406.04313, hold |h - h_base|.)
    """
    goal = jnp.swapaxes(goal_RxMxLxD, 0, 1).astype(jnp.float32)
    apart_MxRxL = jnp.sum((read_MxRxLxD - goal) ** 2, -1)
    each_RxL = jnp.mean(apart_MxRxL / (jnp.sum(goal**2, -1) + _EPS), 0)
    return Sum(jnp.sum(each_RxL * weight_RxL, 1), jnp.sum(weight_RxL, 1))
