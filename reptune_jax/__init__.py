"""Representation tuning in JAX: read a behavior vector, steer with it, tune it into the weights."""

import os

# transformers is used for tokenizers only, which need no torch; do not advise installing it.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from reptune_jax import ending as ending  # first: what follows takes seconds
from reptune_jax.folder import version
from reptune_jax.hub.export import save_hf
from reptune_jax.lm import Model, load, load_adapter
from reptune_jax.vectors.bake import bake
from reptune_jax.vectors.intervention import Intervention, When
from reptune_jax.vectors.pairs import extract, load_pairs
from reptune_jax.vectors.steering_vector import SteeringVector
from reptune_jax.vectors.sweep import Sweep, sweep

__version__ = version()
__all__ = [
    "Intervention",
    "Model",
    "SteeringVector",
    "Sweep",
    "When",
    "__version__",
    "bake",
    "extract",
    "load",
    "load_adapter",
    "load_pairs",
    "save_hf",
    "sweep",
]


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
