"""Program: the untuned model, plain and under a persona prompt.

    python -m reptune_jax.evals.baseline --config=sentiment --workdir=runs/sentiment

Writes `results/baseline.parquet`; skips it where it is there.
"""

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from reptune_jax import distributed, program
from reptune_jax.console import say
from reptune_jax.data.contrast import has_personas
from reptune_jax.evals import arms
from reptune_jax.evals.arms import Condition
from reptune_jax.evals.bench import Bench, prepare
from reptune_jax.evals.results import write_parquet
from reptune_jax.folder import Study


def run(c: ConfigDict, workdir: Path, bench: Bench | None = None) -> Path:
    """Measures `base`, and `prompt` in both signs."""
    study = Study(workdir)
    with study.writing():
        if distributed.exists(study.baseline):
            say(f"{study.baseline}: already there")
            return study.baseline
        bench = bench or prepare(c, study)
        untuned = Condition(bench.base, "base")
        rows = bench.rows(untuned) + bench.judge_rows(untuned)
        if "prompt" in c.study.arms and not has_personas(bench.behavior.items):
            say(f"prompt: left out, {bench.behavior.name} has no personas")
        elif "prompt" in c.study.arms:
            for sign in c.study.signs:
                rows += bench.rows(best_prompt(bench, sign))
        write_parquet(study.baseline, rows)
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
