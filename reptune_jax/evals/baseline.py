"""Program: the untuned model, plain and under a persona prompt.

    python -m reptune_jax.evals.baseline --config=sentiment --workdir=runs/sentiment

Writes `results/baseline.parquet`; skips it where it is there, with all that is asked for.
"""

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from reptune_jax import program
from reptune_jax.console import say
from reptune_jax.data.contrast import has_personas
from reptune_jax.evals import arms
from reptune_jax.evals.arms import Condition
from reptune_jax.evals.bench import Bench, prepare
from reptune_jax.evals.results import to_make, write_parquet
from reptune_jax.folder import Study


def run(c: ConfigDict, workdir: Path, bench: Bench | None = None) -> Path:
    """Measures `base`, and `prompt` in both signs."""
    study = Study(workdir)
    with study.writing():
        signs = list(c.study.signs) if "prompt" in c.study.arms else []
        made_for = to_make(study.baseline, {"prompt": signs})
        if made_for is None:
            return study.baseline
        bench = bench or prepare(c, study)
        untuned = Condition(bench.base, "base")
        rows = bench.rows(untuned) + bench.judge_rows(untuned)
        if made_for["prompt"] and not has_personas(bench.behavior.items):
            say(f"prompt: left out, {bench.behavior.name} has no personas")
        else:
            for sign in made_for["prompt"]:
                rows += bench.rows(best_prompt(bench, sign))
        write_parquet(study.baseline, rows, made_for)
    say(f"baseline: {len(rows)} rows -> {study.baseline}")
    return study.baseline


def best_prompt(bench: Bench, sign: int) -> Condition:
    """The persona that moves the validation prompts most, of the first `eval.personas`."""
    label = 1 if sign > 0 else 0
    personas = [p for p in bench.behavior.select(format="persona") if p.label == label]
    conditions = [arms.prompted(bench.base, p, sign) for p in personas[: bench.c.eval.personas]]
    if len(conditions) == 1:
        return conditions[0]
    effects = [sign * bench.effect(bench.primary_rows(cond, "val")) for cond in conditions]
    return conditions[int(np.argmax(np.nan_to_num(effects, nan=-np.inf)))]


if __name__ == "__main__":
    program.main(run, __doc__)
