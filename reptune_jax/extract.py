"""Program: contrastive data to a behavior vector, and the texts that tuning will learn from.

    python -m reptune_jax.extract --config=sentiment --workdir=runs/sentiment

Writes `vector.safetensors` and `targets.jsonl` into the work folder; skips what is there.
"""

import functools
import sys
import types
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from reptune_jax import program
from reptune_jax.folder import Study
from reptune_jax.vectors import extraction, pairs
from reptune_jax.vectors.steering_vector import SteeringVector


def run(c: ConfigDict, workdir: Path) -> SteeringVector:
    """Makes what is missing; the model is loaded only for that."""
    return extraction.run(c, Study(workdir), functools.cache(lambda: program.load_model(c)))


class _Callable(types.ModuleType):
    """Importing this module puts it where the function `reptune_jax.extract` was: it is both."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return pairs.extract(*args, **kwargs)


if __name__ == "__main__":
    program.main(run, __doc__)
else:
    sys.modules[__name__].__class__ = _Callable
