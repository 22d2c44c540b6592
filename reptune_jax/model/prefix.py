"""Rows that begin alike compute what they share once: a template, a persona, a question.

Exact, not an approximation: attention is causal, so the keys and values of a common beginning do
not depend on what follows it. They are computed for one row and spread over the batch.
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
    """The tokens that all rows of a batch begin with, and how they are steered."""

    tokens_1xP: Any
    steer: Steers | None
    mask_1xP: Any = None  # padding on the left; None: all are real


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
    B, P = len(tokens_BxT), prefix.tokens_1xP.shape[1]
    real_1xP = jnp.ones((1, P)) if prefix.mask_1xP is None else prefix.mask_1xP
    real_BxP = jnp.broadcast_to(jnp.asarray(real_1xP, mask_BxT.dtype), (B, P))
    mask_BxS = jnp.concatenate([real_BxP, mask_BxT], axis=1)
    cache = _spread(decoder, variables, prefix, mask_BxS)
    return decoder.apply(variables, tokens_BxT, mask_BxS, cache=cache, slot=P, **asked)


def _spread(
    decoder: Decoder, variables: dict[str, Any], prefix: Prefix, mask_BxS: jax.Array
) -> Cache:
    """A cache of B rows that holds the prefix, computed for one of them."""
    (B, S), P = mask_BxS.shape, prefix.tokens_1xP.shape[1]
    empty = init_cache(decoder.arch, decoder.segments, 1, S, decoder.dtype)
    _, cache = decoder.apply(
        variables,
        prefix.tokens_1xP,
        jnp.ones((1, S), mask_BxS.dtype).at[:, :P].set(mask_BxS[:1, :P]),
        steer=prefix.steer,
        cache=empty,
        slot=0,
    )
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (a.shape[0], B, *a.shape[2:])), cache)
