"""Program: relearning: how little training toward the opposite undoes what a run was tuned to.

    python -m reptune_jax.relearn --workdir=runs/sentiment

Goes on from every tuned run of `attack.arms` with the token loss alone toward the other sign, on
the study's own targets, over `attack.lr` x `attack.steps`; measures what is left as `attack` does.
Writes `results/attack_relearn_<condition>.parquet`; what is there with the same settings is not
done again.
"""

import dataclasses
import itertools
import shutil
from functools import partial
from pathlib import Path

from ml_collections import ConfigDict

from reptune_jax import distributed, program, train
from reptune_jax.data.behavior import Behavior
from reptune_jax.evals import arms, attack
from reptune_jax.evals.arms import Condition
from reptune_jax.evals.attack import Attack
from reptune_jax.evals.attacks.target import Target
from reptune_jax.evals.results import Row
from reptune_jax.folder import RunName, Study
from reptune_jax.lm import Model


def run(c: ConfigDict, workdir: Path, model: Model | None = None) -> list[Path]:
    """Does what is missing and prints the verdicts; the files of the results.

    Raises:
      ValueError: the folder has nothing to attack, or its targets are of several behaviors.
    """
    if c.loss.also:
        raise ValueError(
            f"loss.also: got {', '.join(c.loss.also)}, expected one behavior. A run of several is "
            "not trained back."
        )
    keys = ("prompts", "documents")
    again = Attack(partial(relearned, Study(workdir)), attack.TUNED, keys, tried)
    return attack.run(c, workdir, model, {"relearn": again})


def relearned(study: Study, target: Target) -> list[Row]:
    """What is left after so many steps at each rate; a run of its own for each."""
    found, cond, bench = [], target.cond, target.lab.bench
    for lr, steps in tried(bench.c, bench.behavior, cond.sign):
        c = _opposite(bench.c, cond, lr, steps)
        own = study.trial(f"relearn_{RunName(cond.arm, cond.sign, cond.seed)}_{lr:g}_{steps}")
        distributed.once(partial(study.share, own))
        model = arms.tuned(cond.model, train.run(c, own.path, cond.model)).model
        distributed.once(partial(shutil.rmtree, own.path))
        back = dataclasses.replace(cond, model=model)
        found += target.measure(f"relearn:{lr:g}", back, steps)
    return found


def tried(c: ConfigDict, behavior: Behavior, sign: int) -> list[tuple[float, int]]:
    """(learning rate, steps) of every run."""
    return [*itertools.product(c.attack.lr, c.attack.steps)]


def _opposite(c: ConfigDict, cond: Condition, lr: float, steps: int) -> ConfigDict:
    """Token loss alone, toward the other sign, at one rate: an attacker retains nothing."""
    out = c.copy_and_resolve_references()
    out.arm, out.sign, out.seed = "token", -cond.sign, cond.seed
    for loss in ("retain", "l2", "own", "ending"):
        out.loss[loss] = 0.0
    out.train.lr, out.train.steps, out.train.eval_every = float(lr), steps, steps
    out.train.lr_by_path, out.train.decay, out.train.warmup = ConfigDict(), "none", 0
    out.train.patience = out.train.measure_every = out.train.save_every = 0
    out.train.profile = (0, 0)
    return out


if __name__ == "__main__":
    program.main(run, __doc__, of_study=True)
