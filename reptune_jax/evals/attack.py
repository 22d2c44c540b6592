"""Program: attacks on what tuning did: is the vector found, is the behavior taken away again.

    python -m reptune_jax.evals.attack --workdir=runs/sentiment

Attacks (`attack.names`) on the arms of `attack.arms` that the folder has, the untuned model being
what they are compared with. Measured by the study's primary measure on `attack.prompts` test items.
Writes `results/attack_<attack>_<condition>.parquet`; what is there with the same settings is not
done again.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from ml_collections import ConfigDict

from reptune_jax import distributed, program
from reptune_jax.config import ATTACKS, CONTRASTS, TUNED_ARMS
from reptune_jax.console import say
from reptune_jax.data import behavior as behaviors
from reptune_jax.data import neutral
from reptune_jax.data.behavior import Behavior
from reptune_jax.evals import capability, results
from reptune_jax.evals.attacks import (
    counter,
    edits,
    paraphrase,
    prompting,
    recovery,
    target,
    words,
)
from reptune_jax.evals.attacks.controls import CONTROL
from reptune_jax.evals.attacks.target import Lab, Target
from reptune_jax.evals.attacks.verdicts import Attacks
from reptune_jax.evals.bench import prepare
from reptune_jax.evals.capability import Planned
from reptune_jax.evals.results import Row, write_parquet
from reptune_jax.folder import RunName, Study
from reptune_jax.lm import Model
from reptune_jax.roles import digest
from reptune_jax.vectors.steering_vector import SteeringVector

TUNED = (*TUNED_ARMS, *CONTRASTS)  # weights that differ from the base's
INTACT = "intact"  # what the others are compared with


class Attack(NamedTuple):
    """What is done, to which arms, and what its result depends on: who changes it, changes that."""

    rows: Callable[[Target], list[Row]]
    arms: tuple[str, ...]
    keys: tuple[str, ...]  # of `attack`
    # What is tried of a sign (0: the base, which is asked for both), each as JSON can write it.
    tried: Callable[[ConfigDict, Behavior, int], Sequence[Any]]


def _always(*tried: Any) -> Callable[[ConfigDict, Behavior, int], Sequence[Any]]:
    return lambda *_: tried


_MEASURED = ("prompts", "documents")
_ANY = ("base", "steer", *TUNED)
_PLACES = recovery.PLACES, recovery.DRAWS, recovery.TOKENS
KNOWN: dict[str, Attack] = {
    INTACT: Attack(target.intact, _ANY, _MEASURED, _always(INTACT)),
    "weights": Attack(recovery.from_weights, TUNED, (), _always(*recovery.RANKS)),
    "activations": Attack(
        recovery.from_activations, ("steer", *TUNED), ("texts",), _always(*_PLACES)
    ),
    "again": Attack(recovery.read_again, ("base", *TUNED), ("pairs",), _always()),
    "function": Attack(
        recovery.function, TUNED, (*_MEASURED, "texts", "layer"), _always(*recovery.WAYS)
    ),
    "removal": Attack(edits.removal, TUNED, _MEASURED, _always(*edits.REMOVALS)),
    "scale": Attack(edits.scale, TUNED, _MEASURED, lambda c, *_: c.attack.scales),
    "counter": Attack(counter.counter, _ANY, (*_MEASURED, "layer"), counter.tried),
    "rounding": Attack(edits.rounding, ("base", *TUNED), _MEASURED, _always(*edits.ROUNDED)),
    "prompts": Attack(prompting.prompts, _ANY, ("prompts",), prompting.tried),
    "paraphrase": Attack(paraphrase.paraphrase, _ANY, ("prompts",), paraphrase.tried),
}
assert {INTACT, *ATTACKS} == set(KNOWN)


def run(
    c: ConfigDict,
    workdir: Path,
    model: Model | None = None,
    attacks: Mapping[str, Attack] | None = None,
) -> list[Path]:
    """Does what is missing and prints the verdicts; the files of the results.

    `attacks`, by name, are those of `attack.names` unless given.

    Raises:
      ValueError: no attacks are named, or the folder has nothing to attack.
    """
    attacks = {name: KNOWN[name] for name in c.attack.names} if attacks is None else attacks
    if not attacks:
        raise ValueError(f"attack.names: got none, expected some of {', '.join(ATTACKS)}.")
    study = Study(workdir)
    study.check(c)
    planned = list(_planned(c, study))
    if len(planned) < 2 or not distributed.exists(study.vector):
        raise ValueError(
            f"workdir {workdir}: got no vector with a finished run of {', '.join(c.attack.arms)}, "
            "expected something to attack. Run the study first."
        )
    lab, about = cache(lambda: Lab.of(prepare(c, study, model))), _about(c, study)
    paths, missing = [], dict[Planned, list[tuple[str, Attack, Path, str]]]()
    for one in planned:
        for name, attack in {INTACT: KNOWN[INTACT], **attacks}.items():
            path = study.attack(name, one.name)
            if _setting(one)[0] not in attack.arms:
                continue
            paths.append(path)
            asked = _digest(c, about, attack, one)
            if _there(path) == {asked}:
                say(f"{path}: already there")
            else:
                missing.setdefault(one, []).append((name, attack, path, asked))
    if missing:
        say(_cost(c, {one: [attack for _, attack, *_ in of] for one, of in missing.items()}))
    for one, of in missing.items():
        made = cache(lambda one=one: _target(study, one, lab()))
        for name, attack, path, asked in of:
            with study.writing():
                study.claim(c)
                rows = attack.rows(made())
                write_parquet(path, [dataclasses.replace(r, config_sha=asked) for r in rows])
            say(f"{name}: {len(rows)} rows -> {path}")
    found = pd.concat([results.read(path) for path in paths], ignore_index=True)
    for verdict in words.said(Attacks.of(found, c.attack.max_kl)):
        say(str(verdict))
    return paths


def _planned(c: ConfigDict, study: Study) -> Iterator[Planned]:
    """The conditions of `attack.arms`, of each arm and sign the first `attack.seeds` seeds."""
    kept: dict[tuple[str, int], int] = {}
    arms: Iterable[str] = ("base", *(arm for arm in c.attack.arms if arm != "base"))
    for one in capability.conditions(c, study, arms):
        if name := RunName.parse(one.name):
            kept[name.arm, name.sign] = kept.get((name.arm, name.sign), 0) + 1
            if c.attack.seeds and kept[name.arm, name.sign] > c.attack.seeds:
                continue
        yield one


def _setting(one: Planned) -> tuple[str, int]:
    """(arm, sign) of a condition, by its name."""
    if name := RunName.parse(one.name):
        return name.arm, name.sign
    arm = one.name.partition("+")[0].partition("-")[0]
    return arm, {"": 0, "+": 1, "-": -1}[one.name[len(arm) :][:1]]


def _target(study: Study, one: Planned, lab: Lab) -> Target:
    cond, file = one.make(lab.bench.base), study.run(one.name).vector
    own = SteeringVector.load(file) if distributed.exists(file) else lab.bench.vector
    return Target(lab, cond, own)


def _cost(c: ConfigDict, missing: Mapping[Planned, Sequence[Attack]]) -> str:
    """What is to be done: how often the items are measured, and how often for the control alone."""
    behavior = behaviors.load(c.behavior)
    times = {
        one: sum(len(a.tried(c, behavior, _setting(one)[1])) for a in of if "prompts" in a.keys)
        for one, of in missing.items()
    }
    control = sum(n for one, n in times.items() if _setting(one)[0] == CONTROL)
    without = f", {control} of them of the control {CONTROL}, which attack.arms may leave out"
    items = f"{c.attack.prompts or 'all'} items"
    all_of_them = sum(times.values())
    return f"attack: up to {all_of_them} measurements of {items}{without if control else ''}"


def _about(c: ConfigDict, study: Study) -> dict[str, Any]:
    """What the results of all attacks depend on, besides the study itself."""
    keys = ("new_tokens", "templates", "judge", "rubric", "scale")
    texts = [neutral.load_neutral(*of) for of in product(("prose", "chats"), ("test", "val"))]
    return {
        "eval": {key: c.eval[key] for key in keys},
        "primary": c.study.primary,
        "behavior": behaviors.load(c.behavior).digest,
        "vector": SteeringVector.load(study.vector).digest,
        "neutral": digest({"texts": texts}),
    }


def _digest(c: ConfigDict, about: dict[str, Any], attack: Attack, one: Planned) -> str:
    """Identifies what an attack's result depends on, what is tried included."""
    tried = attack.tried(c, behaviors.load(c.behavior), _setting(one)[1])
    own = {"attack": {key: c.attack[key] for key in attack.keys}, "tried": list(tried)}
    return digest(about | own | ({"scale": one.scale} if one.scale else {}))


def _there(path: Path) -> set[str]:
    return set(results.read(path).config_sha) if distributed.exists(path) else set()


if __name__ == "__main__":
    program.main(run, __doc__, of_study=True)
