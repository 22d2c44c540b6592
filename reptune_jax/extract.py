"""Program: contrastive data to a behavior vector, and the texts that tuning will learn from.

    python -m reptune_jax.extract --config=sentiment --workdir=runs/sentiment

Writes `vector.safetensors` and `targets.jsonl` into the work folder; skips what is there.
"""

import functools
from pathlib import Path

from ml_collections import ConfigDict

from reptune_jax import program
from reptune_jax.folder import Study
from reptune_jax.vectors import extraction, pairs
from reptune_jax.vectors.steering_vector import SteeringVector


def run(c: ConfigDict, workdir: Path) -> SteeringVector:
    """Makes what is missing; the model is loaded only for that."""
    load = functools.cache(lambda: program.load_model(c, for_tuning=True))
    return extraction.run(c, Study(workdir), load)


if __name__ == "__main__":
    program.main(run, __doc__)
else:
    program.is_also(pairs.extract, __name__)
