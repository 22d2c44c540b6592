"""Generation: prefill and decoding in one compiled loop, the cache donated to it."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from reptune_jax.model.cache import Cache
from reptune_jax.model.intervene import Steer
from reptune_jax.model.transformer import Decoder, unembed

MISSING = -1  # instead of a token: its logits were not finite, and neither is what follows


@partial(jax.jit, static_argnames=("decoder", "max_new"), donate_argnames=("cache",))
def generate(
    decoder: Decoder,
    params: dict,
    tokens_BxT: jax.Array,
    mask_BxT: jax.Array,
    cache: Cache,
    steer: Steer | None,
    stop_ids: jax.Array,
    temperature: jax.Array,
    key: jax.Array,
    *,
    max_new: int,
) -> tuple[jax.Array, Cache]:
    """Left-padded prompts to `max_new` tokens each, [B, max_new]; after a stop token, that token.

    Greedy at temperature 0. Logits that are not finite give MISSING, which ends the row. A `steer`
    whose token mask is [B, T+1] applies its first T columns to the prompt and the last one to every
    generated token. The cache (T + max_new slots) is returned only so that its buffer can be
    reused.
    """
    B, T = tokens_BxT.shape
    # Generated tokens are real from the start: causality hides the slots not yet written.
    mask_BxS = jnp.concatenate([mask_BxT, jnp.ones((B, max_new), mask_BxT.dtype)], axis=1)
    at_prompt, at_new = _split_steer(steer, T)

    def forward(tokens, cache, slot, steer):
        hidden, cache = decoder.apply(
            {"params": params}, tokens, mask_BxS, steer=steer, cache=cache, slot=slot
        )
        return unembed(decoder, params, hidden[:, -1]), cache

    def pick(logits_BxV, i):
        token_B = jax.lax.cond(
            temperature > 0,
            lambda: jax.random.categorical(
                jax.random.fold_in(key, i), logits_BxV / jnp.maximum(temperature, 1e-6)
            ).astype(jnp.int32),
            lambda: jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32),
        )
        return jnp.where(jnp.isfinite(logits_BxV.max(axis=-1)), token_B, MISSING)

    def ends(token_B):
        return jnp.isin(token_B, stop_ids) | (token_B == MISSING)

    def unfinished(state):
        i, _, done_B, _, _ = state
        return (i < max_new) & ~jnp.all(done_B)

    def step(state):
        i, last_B, done_B, out_BxM, cache = state
        logits_BxV, cache = forward(jnp.maximum(last_B, 0)[:, None], cache, T + i - 1, at_new)
        next_B = jnp.where(done_B, last_B, pick(logits_BxV, i))
        return i + 1, next_B, done_B | ends(next_B), out_BxM.at[:, i].set(next_B), cache

    logits_BxV, cache = forward(tokens_BxT, cache, 0, at_prompt)
    first_B = pick(logits_BxV, 0)
    # A row that stops early repeats its stop token, also where the loop ends before max_new.
    fill = jnp.broadcast_to(stop_ids[0], (B, max_new)).astype(jnp.int32)
    state = (jnp.int32(1), first_B, ends(first_B), fill.at[:, 0].set(first_B), cache)
    _, _, _, out_BxM, cache = jax.lax.while_loop(unfinished, step, state)
    return out_BxM, cache


def _split_steer(steer: Steer | None, T: int) -> tuple[Steer | None, Steer | None]:
    if steer is None:
        return None, None
    token_BxT1 = steer.token_BxT
    return (
        dataclasses.replace(steer, token_BxT=token_BxT1[:, :T]),
        dataclasses.replace(steer, token_BxT=token_BxT1[:, T : T + 1]),
    )
