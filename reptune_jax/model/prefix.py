"""Rows that begin alike compute what they share once: a template, a persona, a question.

Exact, not an approximation: attention is causal, so the keys and values of a common beginning do
not depend on what follows it. They are computed once for each group of rows and spread over it.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from reptune_jax.model.cache import Cache, init_cache
from reptune_jax.model.intervene import Steers
from reptune_jax.model.transformer import Decoder

_MULTIPLE = 8  # shared lengths are rounded down to this, so that few shapes are compiled


@flax.struct.dataclass
class Prefix:
    """The tokens that each of G groups of as many rows begins with, and how they are steered."""

    tokens_GxP: Any
    steer: Steers | None
    mask_GxP: Any = None  # padding on the left; None: all are real


def shared_length(rows: Sequence[Sequence[int]], most: int) -> int:
    """How many first tokens all rows share, at most `most`; 0 where sharing would not pay."""
    columns = itertools.islice(zip(*rows, strict=False), most)
    length = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
    return length // _MULTIPLE * _MULTIPLE


def apply_after(
    decoder: Decoder,
    variables: dict[str, Any],
    prefix: Prefix | None,
    tokens_BxT: jax.Array,
    mask_BxT: jax.Array,
    **asked: Any,
) -> Any:
    """`decoder.apply` on rows whose common beginning was cut off into `prefix`.

    Hidden states, reads and cosines are those of the T remaining tokens.
    """
    if prefix is None:
        return decoder.apply(variables, tokens_BxT, mask_BxT, **asked)
    (G, P), B = prefix.tokens_GxP.shape, len(tokens_BxT)
    real_GxP = jnp.ones((G, P)) if prefix.mask_GxP is None else prefix.mask_GxP
    real_BxP = jnp.repeat(jnp.asarray(real_GxP, mask_BxT.dtype), B // G, axis=0)
    mask_BxS = jnp.concatenate([real_BxP, mask_BxT], axis=1)
    cache = _spread(decoder, variables, prefix, mask_BxS)
    return decoder.apply(variables, tokens_BxT, mask_BxS, cache=cache, slot=P, **asked)


def _spread(
    decoder: Decoder, variables: dict[str, Any], prefix: Prefix, mask_BxS: jax.Array
) -> Cache:
    """A cache of B rows that holds the prefixes, each computed for one row of its group."""
    (B, S), (G, P) = mask_BxS.shape, prefix.tokens_GxP.shape
    empty = init_cache(decoder.arch, decoder.segments, G, S, decoder.dtype)
    _, cache = decoder.apply(
        variables,
        prefix.tokens_GxP,
        jnp.ones((G, S), mask_BxS.dtype).at[:, :P].set(mask_BxS[:: B // G, :P]),
        steer=prefix.steer,
        cache=empty,
        slot=0,
    )
    if G == 1:
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (a.shape[0], B, *a.shape[2:])), cache)
    return jax.tree.map(lambda a: jnp.repeat(a, B // G, axis=1), cache)
