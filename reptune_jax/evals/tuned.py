"""Program: a tuned model, read from its Orbax checkpoint.

    python -m reptune_jax.evals.tuned --config=configs/sentiment.py --workdir=runs/sentiment \\
        --config.arm=dual --config.sign=-1 --config.seed=0

Writes `<workdir>/<arm><sign>_s<seed>/results/tuned.parquet`; skips it where it is there.
"""

from pathlib import Path

from ml_collections import ConfigDict

from reptune_jax import distributed, program
from reptune_jax.evals import arms
from reptune_jax.evals.bench import Bench, prepare
from reptune_jax.evals.results import write_parquet


def run(c: ConfigDict, workdir: Path, bench: Bench | None = None) -> Path:
    """Measures the best checkpoint of the run that the config names."""
    folder = workdir / program.run_name(c)
    path = folder / "results" / "tuned.parquet"
    if distributed.exists(path):
        program.say(f"{path}: already there")
        return path
    bench = bench or prepare(c, workdir)
    rows = bench.rows(arms.tuned(bench.base, folder))
    write_parquet(path, rows)
    program.say(f"{folder.name}: {len(rows)} rows -> {path}")
    return path


if __name__ == "__main__":
    program.main(run, __doc__)
