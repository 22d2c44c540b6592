"""What a run is after, as data: directions, losses and weights of each of its behaviors."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from reptune_jax.tuning import adapters
from reptune_jax.tuning import step as steps
from reptune_jax.tuning.losses import CosineLoss
from reptune_jax.vectors.steering_vector import SteeringVector

_ANCHORED = ("shift", "keep")  # modes that refer to the base model's cosines
Vectors = Mapping[str, SteeringVector]  # of a run's further behaviors, by name


def make_task(
    c: ConfigDict, vector: SteeringVector, frozen: dict[str, Any], others: Vectors | None = None
) -> steps.Task:
    """The armed config as data: directions, cosine loss, weights."""
    others, also = others or {}, c.loss.also
    probes = [v.probe(c.loss.center) for v in (vector, *(others[name] for name in also))]
    probe = jax.tree.map(lambda *each: jnp.stack(each, axis=1), *probes)
    weights = [c.loss[name] for name in steps.LOSSES]
    anneal = [c.loss.anneal[name] for name in steps.LOSSES]
    for one in also.values():
        weights += [one.token, one.cosine]
        anneal += [one.anneal, one.anneal]
    return steps.Task(
        frozen,
        probe,
        cosine_spec(c, len(vector.directions_NxD)),
        jnp.array(weights, jnp.float32),
        jnp.array(anneal, jnp.float32),
        jnp.float32(adapters.scale(c.train.lora)),
    )


def cosine_spec(c: ConfigDict, N: int) -> CosineLoss:
    """Each behavior's cosine loss, the main one first."""
    each = {"loss": (c.sign, c.loss)}
    each |= {f"loss.also.{name}": (one.sign, one) for name, one in c.loss.also.items()}
    layer_KxN = np.zeros((len(each), N), np.float32)
    for layer_N, (name, (_, one)) in zip(layer_KxN, each.items(), strict=True):
        first, stop = one.layers
        if not 0 <= first < stop <= N:
            raise ValueError(
                f"{name}.layers: got ({first}, {stop}), expected 0 <= first < stop <= {N}."
            )
        layer_N[first:stop] = 1

    def per(value: Callable[[int, ConfigDict], float]) -> jax.Array:
        return jnp.array([value(sign, one) for sign, one in each.values()], jnp.float32)

    return CosineLoss(
        sign_K=per(lambda sign, _: sign),
        into_K=per(lambda _, one: one.mode == "in"),
        out_K=per(lambda _, one: one.mode == "out"),
        hold_K=per(lambda _, one: one.mode in _ANCHORED),
        shift_K=per(lambda _, one: one.shift * (one.mode == "shift")),
        layer_KxN=jnp.asarray(layer_KxN),
    )


def needs_anchors(c: ConfigDict) -> bool:
    """Whether a loss refers to the base model's cosines."""
    return any(mode in _ANCHORED for mode in (c.loss.mode, *(o.mode for o in c.loss.also.values())))
