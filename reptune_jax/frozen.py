"""The base as tuning holds it where `train.base` asks for integers.

The kernels of the blocks are held so (`model/integers.py`). Embeddings and head stay in the model's
type: their rows are looked up, and they tell one model from another; norms and biases are small.
Nothing is evaluated so: a tuned run's adapters are merged into the base as it was loaded.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from ml_collections import ConfigDict

from reptune_jax import lm
from reptune_jax import mesh as meshes
from reptune_jax.console import watched
from reptune_jax.hub import weights
from reptune_jax.hub.safetensors_io import TensorHandle
from reptune_jax.hub.source import Source
from reptune_jax.lm import Model
from reptune_jax.model import integers, lora
from reptune_jax.model.arch import Arch


def load(source: Source, c: ConfigDict, mesh: Mesh | None) -> Model:
    """`lm.load`, with the kernels as integers: devices never have others, a host one at a time.

    Raises:
      ValueError: as `lm.load`; or an axis that the mesh does not divide.
    """
    dtype = jnp.dtype(c.dtype or lm.default_dtype())

    def read(arch: Arch) -> dict[str, Any]:
        return _tree(weights.leaves(source, arch, dtype), arch, c.train.base, mesh)

    return lm.bind(source, dtype, read, mesh, c.train.base)


def hold(model: Model, c: ConfigDict) -> Model:
    """A loaded model as `train.base` says; itself where that is nothing, or done."""
    if not c.train.base or model.held:
        return model
    leaves = {
        path: TensorHandle(leaf.shape, leaf.dtype, functools.partial(meshes.fetch, leaf))
        for path, leaf in traverse_util.flatten_dict(model.params, sep="/").items()
    }
    params = meshes.put_params(_tree(leaves, model.arch, c.train.base, model.mesh), model.mesh)
    return dataclasses.replace(model, params=params, held=c.train.base)


def rounded(params: Mapping[str, Any], arch: Arch, how: str) -> dict[str, Any]:
    """The one-segment tree, its kernels as integers: what a plan asks for the shapes of."""
    flat: dict[str, Any] = {}
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        inputs = _inputs(path, arch)
        flat |= _named(path, integers.hold(leaf, inputs, 1, how)) if inputs else {path: leaf}
    return traverse_util.unflatten_dict(flat, sep="/")


def _tree(
    leaves: Mapping[str, TensorHandle], arch: Arch, how: str, mesh: Mesh | None
) -> dict[str, Any]:
    """On the host; rounded layer by layer, or a kernel of all would be there in float32."""
    if mesh is not None:
        meshes.check_divides({path: leaf.shape for path, leaf in leaves.items()}, mesh)
    flat: dict[str, np.ndarray] = {}
    for path, leaf in watched(leaves.items(), "rounding weights"):
        inputs, whole = _inputs(path, arch), leaf.read()
        if not inputs:
            flat[path] = whole
            continue
        layers = [jax.tree.map(np.asarray, _hold(layer, inputs, 0, how)) for layer in whole]
        flat |= _named(path, jax.tree.map(lambda *l: np.stack(l), *layers))
    return traverse_util.unflatten_dict(flat, sep="/")


_hold = jax.jit(integers.hold, static_argnums=(1, 2, 3))


def _inputs(path: str, arch: Arch) -> int:
    """How many axes of a block's kernel are inputs; 0: it is none."""
    kernels = {f"blocks/{name}/kernel": n for name, n in lora.input_axes(arch).items()}
    return kernels.get(path, 0)


def _named(path: str, leaves: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{path.removesuffix('kernel')}{name}": leaf for name, leaf in leaves.items()}
