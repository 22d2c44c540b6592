"""Program: the untuned model, plain and under a persona prompt.

    python -m reptune_jax.evals.baseline --config=configs/sentiment.py --workdir=runs/sentiment

Writes `results/baseline.parquet`; skips it where it is there.
"""

from pathlib import Path

from ml_collections import ConfigDict

from reptune_jax import distributed, program
from reptune_jax.data.schema import select
from reptune_jax.evals import arms, generation
from reptune_jax.evals.arms import Condition
from reptune_jax.evals.bench import Bench, prepare
from reptune_jax.evals.results import write_parquet


def run(c: ConfigDict, workdir: Path, bench: Bench | None = None) -> Path:
    """Measures `base`, and `prompt` in both signs."""
    path = workdir / "results" / "baseline.parquet"
    if distributed.exists(path):
        program.say(f"{path}: already there")
        return path
    bench = bench or prepare(c, workdir)
    untuned = Condition(bench.base, "base")
    rows = bench.rows(untuned) + bench.judge_rows(untuned)
    if "prompt" in c.study.arms:
        for sign in c.study.signs:
            rows += bench.rows(best_prompt(bench, sign))
    write_parquet(path, rows)
    program.say(f"baseline: {len(rows)} rows -> {path}")
    return path


def best_prompt(bench: Bench, sign: int) -> Condition:
    """The persona that moves the validation prompts most, of the first `eval.personas`."""
    label = 1 if sign > 0 else 0
    personas = [p for p in select(bench.items, format="persona") if p.label == label]
    conditions = [arms.prompted(bench.base, p, sign) for p in personas[: bench.c.eval.personas]]
    prompts = bench.prompts("val")
    if len(conditions) == 1 or not prompts or not generation.has_judge(bench.c):
        return conditions[0]
    return max(conditions, key=lambda cond: sign * generation.mean_score(bench.c, cond, prompts))


if __name__ == "__main__":
    program.main(run, __doc__)
