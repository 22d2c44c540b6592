"""Generation: prefill and decoding in one compiled loop, the cache donated to it.

A scan over stacked layers slices each layer's weights out, which on accelerators copies them: the
prompt can afford that once, the loop not at every token. There it has every layer's weights and
cache as arrays of their own (`apart`), cut out of the stacks once a call. This takes as much memory
as the layers until the call ends; where a device has too little, and on CPU, the loop scans too.
"""

import dataclasses
import itertools
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from reptune_jax.model.cache import Cache
from reptune_jax.model.intervene import Steers
from reptune_jax.model.sampling import Sampling, draw, seen
from reptune_jax.model.transformer import Decoder, Segments, unembed

MOST = 2 / 3  # of a device's memory that weights and the loop's copy of the layers may fill
MISSING = -1  # instead of a token: its logits were not finite, and neither is what follows


@partial(jax.jit, static_argnames=("decoder", "max_new"), donate_argnames=("cache",))
def generate(
    decoder: Decoder,
    params: dict,
    tokens_BxT: jax.Array,
    mask_BxT: jax.Array,
    cache: Cache,
    steer: Steers | None,
    stop_ids: jax.Array,
    sampling: Sampling,
    key: jax.Array,
    *,
    max_new: int,
) -> tuple[jax.Array, Cache]:
    """Left-padded prompts to `max_new` tokens each, [B, max_new]; after a stop token, that token.

    `decoder` is the loop's: it scans, or has its layers `apart`; `params` have them stacked.
    Logits that are not finite give MISSING, which ends the row. Of a `steer`'s token mask the first
    T columns are the prompt's; those behind are the generated tokens', the last for all that have
    none of their own. The cache (T + max_new slots) is returned only so that its buffer can be
    reused.
    """
    B, T = tokens_BxT.shape
    stacked = decoder.clone(segments=(("blocks", sum(n for _, n in decoder.segments)),))
    own = _cut(params, decoder.segments)
    # Generated tokens are real from the start: causality hides the slots not yet written.
    mask_BxS = jnp.concatenate([mask_BxT, jnp.ones((B, max_new), mask_BxT.dtype)], axis=1)

    def pick(logits_BxV, i, seen_BxV):
        token_B, seen_BxV = draw(sampling, logits_BxV, seen_BxV, jax.random.fold_in(key, i))
        return jnp.where(jnp.isfinite(logits_BxV.max(axis=-1)), token_B, MISSING), seen_BxV

    def ends(token_B):
        return jnp.isin(token_B, stop_ids) | (token_B == MISSING)

    def unfinished(state):
        i, _, done_B, *_ = state
        return (i < max_new) & ~jnp.all(done_B)

    def step(state):
        i, last_B, done_B, out_BxM, seen_BxV, cache = state
        last = jnp.maximum(last_B, 0)[:, None], mask_BxS
        hidden, cache = decoder.apply(
            {"params": own}, *last, steer=_at(steer, T + i - 1), cache=cache, slot=T + i - 1
        )
        logits_BxV = unembed(decoder, own, hidden[:, -1])
        next_B, seen_BxV = pick(logits_BxV, i, seen_BxV)
        next_B = jnp.where(done_B, last_B, next_B)
        out_BxM = out_BxM.at[:, i].set(next_B)
        return i + 1, next_B, done_B | ends(next_B), out_BxM, seen_BxV, cache

    hidden, begun = stacked.apply(
        {"params": params},
        tokens_BxT,
        mask_BxT,
        steer=_at(steer, 0, T),
        cache=_short(cache, decoder.segments, T),
    )
    cache = _begin(cache, decoder.segments, begun)
    logits_BxV = unembed(stacked, params, hidden[:, -1])
    seen_BxV = seen(sampling, tokens_BxT, mask_BxT, logits_BxV.shape[1])
    first_B, seen_BxV = pick(logits_BxV, 0, seen_BxV)
    # A row that stops early repeats its stop token, also where the loop ends before max_new.
    fill = jnp.broadcast_to(stop_ids[0], (B, max_new)).astype(jnp.int32)
    state = (jnp.int32(1), first_B, ends(first_B), fill.at[:, 0].set(first_B), seen_BxV, cache)
    _, _, _, out_BxM, _, cache = jax.lax.while_loop(unfinished, step, state)
    return out_BxM, cache


def _at(steer: Steers | None, start: Any, length: int = 1) -> Steers | None:
    """For `length` tokens from `start` on; behind the end a slice is the last column again."""

    def cut(token_BxT: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(token_BxT, start, length, axis=1)

    return steer and tuple(
        dataclasses.replace(each, token_BxT=cut(each.token_BxT)) for each in steer
    )


# ------------------------------------------------------------------ the loop's layers


def apart(decoder: Decoder) -> Decoder:
    """`decoder` with each layer in a segment of its own."""
    return decoder.clone(segments=tuple((f"layer_{l}", 1) for l in range(decoder.arch.N)))


def for_loop(decoder: Decoder, params: dict) -> Decoder:
    """`decoder` as `generate` should have it, for weights on these devices.

    Says the same on every process, and at every call: texts must not change with what else is in
    memory.
    """
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return decoder
    limit = (device.memory_stats() or {}).get("bytes_limit", math.inf)
    fits = _bytes_a_device(params) + _bytes_a_device(params["blocks"]) <= MOST * limit
    return apart(decoder) if fits else decoder


def _bytes_a_device(tree: Any) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in leaves)


def _cut(params: dict, segments: Segments) -> dict:
    """The one-segment tree in these segments, bottom to top."""
    out = {name: tree for name, tree in params.items() if name != "blocks"}
    for name, rows in _rows(segments):
        out[name] = jax.tree.map(lambda a, rows=rows: a[rows], params["blocks"])
    return out


def _rows(segments: Segments) -> list[tuple[str, slice]]:
    """(segment, where its layers are in a stack)."""
    stops = itertools.accumulate(length for _, length in segments)
    return [
        (name, slice(stop - length, stop))
        for (name, length), stop in zip(segments, stops, strict=True)
    ]


def _short(cache: Cache, segments: Segments, T: int) -> Cache:
    """A stacked cache for the prompt's T tokens alone, laid out on devices as `cache` is."""
    parts = [{kind: a[..., :T, :] for kind, a in cache[name].items()} for name, _ in segments]
    return {"blocks": jax.tree.map(lambda *a: jnp.concatenate(a), *parts)}


def _begin(cache: Cache, segments: Segments, begun: Any) -> Cache:
    """`cache` with what the prompt has `begun` in its first slots."""
    return {
        name: {
            kind: jax.lax.dynamic_update_slice(a, begun["blocks"][kind][rows], (0,) * a.ndim)
            for kind, a in cache[name].items()
        }
        for name, rows in _rows(segments)
    }
