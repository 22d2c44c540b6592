"""Taking the behavior out of the weights again, turning it round, and what rounding leaves of it.

How an attack is called: `project:` takes out of the change what it writes along a direction (the
base is needed), `ablate:` takes the direction out of all that writes to the residual stream.
"""

import dataclasses

import numpy as np

from reptune_jax.console import say
from reptune_jax.evals.attacks import weights
from reptune_jax.evals.attacks.target import CONTROL, Target
from reptune_jax.evals.results import Row
from reptune_jax.vectors.bake import bake

WAYS, DIRECTIONS = ("project", "ablate"), ("vector", "found", "random")
REMOVALS = tuple(f"{way}:{of}" for of in DIRECTIONS for way in WAYS)
ROUNDED = tuple((how, weights.GROUP) for how in weights.ROUND)


def removal(target: Target) -> list[Row]:
    """Both ways, along the vector, along what is found in the weights, and along random ones."""
    model, found = target.cond.model, []
    for name, direction_NxD in directions(target).items():
        edited = weights.projected(target.base, model, direction_NxD)
        found += target.measure(f"project:{name}", dataclasses.replace(target.cond, model=edited))
        if model.arch.post_norm:
            say(f"ablate: left out, {model.arch.family} norms what its blocks write")
            continue
        one_NxD = np.zeros_like(direction_NxD)
        one_NxD[0] = _one(target, direction_NxD)
        vector = dataclasses.replace(target.own, directions_NxD=one_NxD, layers=(0,))
        edited = bake(model, vector, "ablate")
        found += target.measure(f"ablate:{name}", dataclasses.replace(target.cond, model=edited))
    return found


def directions(target: Target) -> dict[str, np.ndarray]:
    """What an attacker may take out, a unit direction of each layer, [N, D]."""
    rows_NxRxD = weights.written(target.base, target.cond.model)
    found = {"vector": target.own.directions_NxD}
    if rows_NxRxD is not None:
        blind = weights.spectrum(rows_NxRxD.reshape(-1, rows_NxRxD.shape[-1]), 1)
        found["found"] = np.repeat(blind.right_KxD, len(rows_NxRxD), 0)
    found["random"] = target.own.random_like(CONTROL + target.cond.seed).directions_NxD
    return {of: weights.unit(found[of]).astype(np.float32) for of in DIRECTIONS if of in found}


def _one(target: Target, direction_NxD: np.ndarray) -> np.ndarray:
    """One direction for all layers: the mean over those whose cosine was trained."""
    first, stop = target.lab.bench.c.loss.layers
    return weights.unit(direction_NxD[first:stop].mean(0, keepdims=True))[0]


def scale(target: Target) -> list[Row]:
    """base + k (tuned - base), at every k of `attack.scales`."""
    found = []
    for k in target.lab.bench.c.attack.scales:
        model = weights.scaled(target.base, target.cond.model, k)
        found += target.measure("scale", dataclasses.replace(target.cond, model=model), k)
    return found


def rounding(target: Target) -> list[Row]:
    """Kernels of the blocks rounded to nearest; of a tuned model also how far its change goes."""
    found = []
    for how in weights.ROUND:
        model = weights.rounded(target.cond.model, how)
        found += target.measure(f"round:{how}", dataclasses.replace(target.cond, model=model))
        if target.cond.arm != "base":
            share = weights.crossed(target.base, target.cond.model, how)
            found.append(target.number(f"round:{how}", "crossed", share))
    return found
