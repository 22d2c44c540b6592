"""Probabilities in given text: whole continuations, candidates for the next token, endings.

`above` is `Decoder`'s: rows that are known up to a layer go on from there.
"""

from functools import partial

import jax
import jax.numpy as jnp

from reptune_jax.model.prefix import apply_after
from reptune_jax.model.transformer import unembed


@partial(jax.jit, static_argnames=("decoder", "L"))
def continuations(decoder, params, prefix, tokens_BxT, mask_BxT, start_B, steer, above=None, *, L):
    """Summed log-probability of the tokens from `start_B` on, and whether each is the argmax."""
    asked = {"steer": steer, "above": above}
    hidden, _ = apply_after(decoder, {"params": params}, prefix, tokens_BxT, mask_BxT, **asked)
    at_BxL = start_B[:, None] + jnp.arange(L)
    real_BxL = at_BxL < mask_BxT.sum(axis=1, keepdims=True)
    at_BxL = jnp.minimum(at_BxL, tokens_BxT.shape[1] - 1)
    target_BxL = jnp.take_along_axis(tokens_BxT, at_BxL, axis=1)
    hidden_BxLxD = jnp.take_along_axis(hidden, at_BxL[..., None] - 1, axis=1)

    def row(args):  # one row at a time: [L, V] logits, never [B, L, V]
        hidden_LxD, target_L, real_L = args
        logits_LxV = unembed(decoder, params, hidden_LxD)
        picked_L = jnp.take_along_axis(logits_LxV, target_L[:, None], axis=1)[:, 0]
        logp_L = picked_L - jax.nn.logsumexp(logits_LxV, axis=-1)
        greedy_L = picked_L >= logits_LxV.max(axis=-1)
        return jnp.sum(logp_L * real_L), jnp.all(greedy_L | ~real_L)

    return jax.lax.map(row, (hidden_BxLxD, target_BxL, real_BxL))


@partial(jax.jit, static_argnames=("decoder",))
def endings(decoder, params, tokens_BxT, mask_BxT, at_BxL, stop_S):
    """log p(the next token is one of `stop_S`) at each of L positions, [B, L]."""
    hidden, _ = decoder.apply({"params": params}, tokens_BxT, mask_BxT)
    hidden_BxLxD = jnp.take_along_axis(hidden, at_BxL[..., None], axis=1)

    def row(hidden_LxD):
        logp_LxV = jax.nn.log_softmax(unembed(decoder, params, hidden_LxD), axis=-1)
        return jax.nn.logsumexp(logp_LxV[:, stop_S], axis=-1)

    return jax.lax.map(row, hidden_BxLxD)


@partial(jax.jit, static_argnames=("decoder",))
def candidates(decoder, params, prefix, tokens_BxT, mask_BxT, candidates_BxC, steer, above=None):
    """The last real token of every row predicts its next one."""
    asked = {"steer": steer, "above": above}
    hidden, _ = apply_after(decoder, {"params": params}, prefix, tokens_BxT, mask_BxT, **asked)
    last_B = mask_BxT.sum(axis=1) - 1
    hidden_BxD = jnp.take_along_axis(hidden, last_B[:, None, None], axis=1)[:, 0]
    logits_BxV = unembed(decoder, params, hidden_BxD)
    return jnp.take_along_axis(jax.nn.log_softmax(logits_BxV, axis=-1), candidates_BxC, axis=1)
