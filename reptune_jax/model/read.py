"""The one reader of the residual stream: a forward pass, and what was asked of it on the way."""

import dataclasses
from functools import partial
from typing import Any

import flax.struct
import jax

from reptune_jax.model import lora
from reptune_jax.model.prefix import Prefix, apply_after
from reptune_jax.model.transformer import Decoder, collect


@flax.struct.dataclass
class Read:
    """What one pass gave; None where it was not asked for. Layer l is the output of block l."""

    hidden_BxTxD: Any  # after the final norm; with `leave`, what enters that segment
    residual_NxBxTxD: jax.Array | None  # keep_residual=True
    mean_NxBxPxD: jax.Array | None  # read_BxPxT=…: weighted means over tokens, float32
    cosine_NxBxT: jax.Array | None  # probe=…


def read(
    decoder: Decoder,
    variables: dict[str, Any],
    tokens_BxT: jax.Array,
    mask_BxT: jax.Array,
    prefix: Prefix | None = None,
    **asked: Any,
) -> Read:
    """One pass of a model with these `variables` (params, and adapters if it has any).

    `asked` is what `Decoder` takes: steer, probe, read_BxPxT, keep_residual, enter, leave. Only
    what is asked for is captured, and only layers that run have a part in it.
    """
    with lora.applied():
        (hidden_BxTxD, _), sown = apply_after(
            decoder, variables, prefix, tokens_BxT, mask_BxT, mutable=["intermediates"], **asked
        )
    found = sown.get("intermediates", {})

    def of(name: str) -> jax.Array | None:
        return collect(found, decoder.segments, name)

    return Read(hidden_BxTxD, of("residual"), of("read"), of("cosine"))


@partial(jax.jit, static_argnames=("decoder", "hidden", "keep_residual", "leave"))
def read_at_once(
    decoder: Decoder, params: Any, *inputs: Any, hidden: bool = True, **asked: Any
) -> Read:
    """`read`, compiled, of a model without adapters; without `hidden` those are not kept."""
    found = read(decoder, {"params": params}, *inputs, **asked)
    return found if hidden else dataclasses.replace(found, hidden_BxTxD=None)
