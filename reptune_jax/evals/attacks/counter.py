"""Steering back: the dose of the vector that undoes the tuning, and how much of it is translation.

A model that merely adds a doses of the vector is undone by steering with -a; what exceeds that is
resistance.
"""

import dataclasses

from ml_collections import ConfigDict

from reptune_jax.console import say
from reptune_jax.data.behavior import Behavior
from reptune_jax.evals.arms import Condition
from reptune_jax.evals.attacks.target import CONTROL, Target, read_means
from reptune_jax.evals.results import Row
from reptune_jax.vectors.steering_vector import SteeringVector


def counter(target: Target) -> list[Row]:
    """Steered against its sign at one layer, by the behavior's vector and by a random direction.

    `k` of a row is the signed dose that was added; the base is steered to both sides.
    """
    c, cond = target.lab.bench.c, target.cond
    if cond.steer is not None and not isinstance(cond.steer, SteeringVector):
        say(f"counter: left out for {cond.title}, which is no addition at every token")
        return [target.number("counter:shift", "shift", float("nan"))]
    layer, vector = at_layer(target), target.lab.bench.vector
    ways = {"vector": vector, "random": vector.random_like(CONTROL + cond.seed)}
    found = []
    for name, dose in tried(c, target.lab.bench.behavior, cond.sign):
        added = ways[name].at([layer]) * dose
        steer = added if cond.steer is None else cond.steer + added
        steered = dataclasses.replace(cond, steer=steer)
        found += target.measure(f"counter:{name}", steered, dose, layer)
    return found + (shifts(target, layer) if cond.arm != "base" else [])


def tried(c: ConfigDict, behavior: Behavior, sign: int) -> list[tuple[str, float]]:
    """(direction, signed dose) of all that is added, against a sign; to the base to both sides."""
    if not sign:
        return [("vector", -s * dose) for s in (1, -1) for dose in c.attack.doses]
    return [(name, -sign * dose) for name in ("vector", "random") for dose in c.attack.doses]


def at_layer(target: Target) -> int:
    """Where `attack.layer` says, else amid the layers whose cosine was trained."""
    c = target.lab.bench.c
    return c.attack.layer if c.attack.layer >= 0 else sum(c.loss.layers) // 2


def shifts(target: Target, layer: int) -> list[Row]:
    """a: how far each item's residual lies from the base's along the vector, in doses of it.

    Averaged over the tokens of its `neg` answer after an open prompt, or at the last token of a
    question.
    """
    bench = target.lab.bench
    dose_D, asked = bench.vector.dose_NxD[layer], target.texts()
    own_IxD, base_IxD = (
        read_means(cond, [text for _, text in asked], bench.c.eval.batch)[layer, :, 0]
        for cond in (target.cond, Condition(target.base, "base"))
    )
    a_I = (own_IxD - base_IxD) @ dose_D / (dose_D @ dose_D)
    rows = [
        target.number("counter:shift", "shift", a, item.id, layer=layer)
        for (item, _), a in zip(asked, a_I, strict=True)
    ]
    of = {item.id: item.cluster for item, _ in asked}
    return [dataclasses.replace(row, cluster=of[row.item_id]) for row in rows]
