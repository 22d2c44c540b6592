"""Finding the vector: in weights, in activations, by reading it again, by what it does."""

import dataclasses
import functools

import numpy as np

from reptune_jax.console import say
from reptune_jax.data import neutral
from reptune_jax.evals import stats
from reptune_jax.evals.arms import Condition
from reptune_jax.evals.attacks import weights
from reptune_jax.evals.attacks.counter import at_layer
from reptune_jax.evals.attacks.target import CONTROL, Lab, Target, Text, read_means
from reptune_jax.evals.results import Row
from reptune_jax.lm import Model
from reptune_jax.vectors import extraction

RANKS = (1, 2, 4, 8)  # how many singular vectors a direction is looked for in
PLACES = ("all", "first5")  # tokens of a text; the first token, an attention sink, is in neither
DRAWS = 8  # sets of texts of one size
TOKENS = 96  # of a text that are read
WAYS = ("vector", "random", "found+", "found-", "texts")  # that the base is steered along


def from_weights(target: Target) -> list[Row]:
    """How much of the vector lies in what the change writes along: all layers stacked, and each.

    With one singular vector that is |cos|, with k the length of the unit vector's projection.
    """
    rows_NxRxD = weights.written(target.base, target.cond.model)
    if rows_NxRxD is None:
        say(f"{target.cond.title}: changed nothing that writes to the residual stream")
        return [target.number("weights:blind", "energy", np.nan)]
    blind = weights.spectrum(rows_NxRxD.reshape(-1, rows_NxRxD.shape[-1]))
    squares_N = np.square(rows_NxRxD, dtype=np.float64).sum((1, 2))
    each = {int(l): weights.spectrum(rows_NxRxD[l]) for l in np.flatnonzero(squares_N)}
    found = [target.number("weights:blind", "energy", blind.energy_K[0]), _null(target, "weights")]
    for l in each:
        share = squares_N[l] / squares_N.sum()
        found.append(target.number("weights:layer", "energy", share, layer=l))
    for name, vector in target.vectors.items():
        for l in vector.layers:
            v_D = weights.unit(vector.directions_NxD)[l]
            for k in RANKS:
                inside = np.linalg.norm(blind.right_KxD[:k] @ v_D)
                how = f"weights:blind{name}", "aligned", inside
                found.append(target.number(*how, k=k, layer=l))
            if l in each:
                how = f"weights:layer{name}", "aligned", abs(each[l].right_KxD[0] @ v_D)
                found.append(target.number(*how, k=1, layer=l))
    return found


def from_activations(target: Target) -> list[Row]:
    """|cos| of the vector with the mean difference to the base over n unrelated texts, by layer.

    Sets of one size share no text; there are `DRAWS` of them at most.
    """
    c = target.lab.bench.c
    texts, base_NxIxPxD = _of_base(target.lab)
    change_NxIxPxD = read_means(target.cond, texts, c.eval.batch) - base_NxIxPxD
    found = [_null(target, "activations")]
    for n in sorted({min(n, len(texts)) for n in c.attack.texts}):
        for draw in range(min(DRAWS, len(texts) // n)):
            mean_NxPxD = change_NxIxPxD[:, draw * n : (draw + 1) * n].mean(1)
            for name, vector in target.vectors.items():
                v_NxD = weights.unit(vector.directions_NxD)
                for p, place in enumerate(PLACES):
                    cos_N = np.abs((weights.unit(mean_NxPxD[:, p]) * v_NxD).sum(1))
                    how, item = f"activations:{place}{name}", f"draw{draw}"
                    found += [
                        target.number(how, "aligned", cos_N[l], item, k=n, layer=l)
                        for l in vector.layers
                    ]
    return found


@functools.lru_cache(maxsize=1)
def _of_base(lab: Lab) -> tuple[list[Text], np.ndarray]:
    """The texts, and their means in the untuned model."""
    c, base = lab.bench.c, lab.bench.base
    texts = unrelated(base, max(c.attack.texts))
    return texts, read_means(Condition(base, "base"), texts, c.eval.batch)


def unrelated(base: Model, most: int) -> list[Text]:
    """Plain texts that have nothing to do with a behavior, with the tokens of `PLACES`.

    In an order that is always the same; none is trained on, as those of the train split may be.
    """
    found = []
    for split in ("test", "val"):
        found += [d["text"] for d in neutral.load_neutral("prose", split)]
        found += [d["messages"][-1]["content"] for d in neutral.load_neutral("chats", split)]
    order = np.random.default_rng(0).permutation(len(found))[:most]
    texts = [base.encode_prompt(found[i], chat=False)[:TOKENS] for i in order]
    return [(ids, [(1, len(ids)), (1, min(6, len(ids)))]) for ids in texts]


def function(target: Target) -> list[Row]:
    """The base steered by what is found of the vector, at one layer, and by the vector itself.

    A direction of low cosine may do the same, and one of high cosine less. All are as long as one
    dose of the behavior's vector there, and point toward the arm's sign; the singular vector has
    none and is tried to both sides.
    """
    layer, vector, sign = at_layer(target), target.lab.bench.vector, target.cond.sign
    own_D, control = vector.directions_NxD[layer], CONTROL + target.cond.seed
    ways = {"vector": sign * own_D, "random": vector.random_like(control).directions_NxD[layer]}
    if (rows_NxRxD := weights.written(target.base, target.cond.model)) is not None:
        blind_D = weights.spectrum(rows_NxRxD.reshape(-1, rows_NxRxD.shape[-1]), 1).right_KxD[0]
        ways |= {"found+": blind_D, "found-": -blind_D}
    texts, base_NxIxPxD = _of_base(target.lab)
    tuned_NxIxPxD = read_means(target.cond, texts, target.lab.bench.c.eval.batch)
    ways["texts"] = (tuned_NxIxPxD - base_NxIxPxD)[layer, :, PLACES.index("all")].mean(0)
    found = []
    for name in WAYS:
        way_D = ways.get(name, np.zeros_like(own_D))
        if not (length := np.linalg.norm(way_D)):
            say(f"{target.cond.title}: function:{name} left out, nothing was changed there")
            continue
        one_NxD = np.zeros_like(vector.directions_NxD)
        one_NxD[layer] = way_D * (np.linalg.norm(own_D) / length)
        steer = dataclasses.replace(vector, directions_NxD=one_NxD, layers=(layer,))
        cond = dataclasses.replace(target.cond, model=target.base, steer=steer)
        found += target.measure(f"function:{name}", cond, layer=layer)
    return found


def read_again(target: Target) -> list[Row]:
    """|cos| of the vector with one that is read on the target itself: no base is needed."""
    bench = target.lab.bench
    c = bench.c.copy_and_resolve_references()
    c.vector.pairs = min(c.vector.pairs, c.attack.pairs)
    try:
        again_NxD = extraction.read_vector(c, target.cond.model, bench.behavior).directions_NxD
    except ValueError as e:  # personas that answer alike, or in numbers that are not finite
        say(f"{target.cond.title}: no vector can be read: {e}")
        return [target.number("again", "aligned", np.nan)]
    found = [_null(target, "again")]
    for name, vector in target.vectors.items():
        cos_N = (weights.unit(again_NxD) * weights.unit(vector.directions_NxD)).sum(1)
        found += [
            target.number(f"again{name}", "aligned", abs(cos_N[l]), layer=l) for l in vector.layers
        ]
    return found


def _null(target: Target, attack: str) -> Row:
    """What the best layer's |cos| of random directions stays under, 999 times in 1,000."""
    layers = len(target.own.layers)
    return target.number(attack, "null", stats.chance_cosine(target.base.arch.D, tries=layers))
