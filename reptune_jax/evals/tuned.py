"""Program: a tuned model, read from its Orbax checkpoint.

    python -m reptune_jax.evals.tuned --config=sentiment --workdir=runs/sentiment \\
        --config.arm=dual --config.sign=-1 --config.seed=0

Writes `<workdir>/<arm><sign>_s<seed>/results/tuned.parquet`; skips it where it is there.
"""

from pathlib import Path

from ml_collections import ConfigDict

from reptune_jax import distributed, program
from reptune_jax.console import say
from reptune_jax.evals import arms
from reptune_jax.evals.bench import Bench, prepare
from reptune_jax.evals.results import write_parquet
from reptune_jax.folder import RunName, Study


def run(c: ConfigDict, workdir: Path, bench: Bench | None = None) -> Path:
    """Measures the best checkpoint of the run that the config names."""
    study = Study(workdir)
    tuned = study.run(RunName.of(c))
    with tuned.writing():
        if distributed.exists(tuned.results):
            say(f"{tuned.results}: already there")
            return tuned.results
        bench = bench or prepare(c, study)
        rows = bench.rows(arms.tuned(bench.base, tuned.path))
        write_parquet(tuned.results, rows)
    say(f"{tuned.path.name}: {len(rows)} rows -> {tuned.results}")
    return tuned.results


if __name__ == "__main__":
    program.main(run, __doc__)
