"""A training step compiled without weights: from shapes and layouts, the real program."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict, FrozenConfigDict

from reptune_jax import mesh as meshes
from reptune_jax.config import retains
from reptune_jax.data.batches import Batch, Examples, Retention
from reptune_jax.frozen import rounded
from reptune_jax.model import attention
from reptune_jax.model.arch import Arch
from reptune_jax.model.transformer import Decoder, whole
from reptune_jax.tuning import partition
from reptune_jax.tuning import step as steps
from reptune_jax.tuning.objective import goal_layers, make_objective, needs_anchors
from reptune_jax.vectors.steering_vector import SteeringVector


def params(arch: Arch, dtype: Any, mesh: Mesh) -> dict[str, Any]:
    """The whole model's weights as shapes with layouts.

    Raises:
      ValueError: a weight that the mesh does not divide.
    """
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    decoder, key = whole(arch, dtype), jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(decoder.init, key, tokens, tokens)["params"]
    flat = traverse_util.flatten_dict(shapes, sep="/")
    meshes.check_divides({path: leaf.shape for path, leaf in flat.items()}, mesh)
    return _placed({k: jax.ShapeDtypeStruct(v.shape, dtype) for k, v in flat.items()}, mesh)


def step(c: ConfigDict, arch: Arch, dtype: Any, mesh: Mesh, T: int, L: int) -> tuple[Any, tuple]:
    """(the step that training runs, its arguments) for rows of T tokens with L labels each."""
    train = FrozenConfigDict(c.train)
    begin = functools.partial(partition.begin, arch, train=train, seed=c.seed)
    weights = params(arch, dtype, mesh)
    if train.base:
        weights = jax.eval_shape(lambda p: rounded(p, arch, train.base), weights)
        flat = traverse_util.flatten_dict(weights, sep="/")
        meshes.check_divides({path: leaf.shape for path, leaf in flat.items()}, mesh)
    trained, frozen = jax.eval_shape(begin, weights)
    trained = _placed(trained, mesh, nested=False)
    frozen = _placed(traverse_util.flatten_dict(frozen, sep="/"), mesh)
    cuts = partition.segments(arch.N, train.layers)
    platform = mesh.devices.flat[0].platform
    kernel = attention.choose(arch, platform, dtype, mesh=mesh) if train.flash else attention.XLA
    decoder = Decoder(arch, cuts, dtype, train.remat, kernel, meshes.rows_of(mesh))

    state = jax.eval_shape(lambda t: steps.init_state(t, train, mesh), trained)
    state = jax.tree_util.tree_map_with_path(functools.partial(_as_trained, trained, mesh), state)
    zeros_NxD = np.zeros((arch.N, arch.D), np.float32)
    vector = SteeringVector(zeros_NxD, np.ones(arch.N), zeros_NxD, tuple(range(arch.N)), {})
    also = dict.fromkeys(c.loss.also, vector)
    objective = jax.tree.map(
        lambda a: struct(a.shape, a.dtype, mesh, PartitionSpec()),
        make_objective(c, vector, {}, also, stop_ids=(0,)),
    ).replace(frozen=frozen)
    args = (
        state,
        objective,
        batch(c, arch, dtype, mesh, T, L),
        struct((), bool, mesh, PartitionSpec()),
    )
    return steps.make_step(decoder, train, mesh), args


def batch(c: ConfigDict, arch: Arch, dtype: Any, mesh: Mesh, T: int, L: int) -> Batch:
    """A batch of the config's size."""

    def rows(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return struct(shape, dtype, mesh, meshes.BATCH)

    B = c.train.batch + sum(one.batch for one in c.loss.also.values())
    R, P = c.train.retain_batch, c.train.retain_positions
    f32 = jnp.float32
    examples = Examples(
        tokens_BxT=rows(B, T),
        mask_BxT=rows(B, T),
        at_BxL=rows(B, L),
        target_BxLxC=rows(B, L, 1),
        weight_BxLxC=rows(B, L, 1, dtype=f32),
        cosine_BxT=rows(B, T, dtype=f32),
        of_B=rows(B),
        base_BxNxT=rows(B, arch.N, T, dtype=f32) if needs_anchors(c) else None,
        ending_BxL=rows(B, L, dtype=f32) if c.loss.ending else None,
        goes_on_BxL=rows(B, L, dtype=f32) if c.loss.ending else None,
        goal_BxMxLxD=rows(B, len(range(*goal_layers(c))), L, arch.D, dtype=dtype)
        if c.loss.match
        else None,
    )
    if not retains(c):
        return Batch(examples, None)
    first, stop = c.train.layers
    retention = Retention(
        tokens_BxT=rows(R, T),
        mask_BxT=rows(R, T),
        at_BxL=rows(R, P),
        weight_BxL=rows(R, P, dtype=f32),
        hidden_BxLxD=rows(R, P, arch.D, dtype=dtype),
        next_BxL=rows(R, P),
        own_BxL=rows(R, P, dtype=f32),
        residual_BxMxLxD=rows(R, stop - first, P, arch.D, dtype=dtype) if c.loss.l2 else None,
    )
    return Batch(examples, retention)


def gib_per_device(tree: Any) -> float:
    """What the arrays hold on each device."""
    return (
        sum(
            np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )
        / 2**30
    )


def _placed(flat: dict[str, Any], mesh: Mesh, nested: bool = True) -> dict[str, Any]:
    out = {
        path: struct(leaf.shape, leaf.dtype, mesh, meshes.spec(path, leaf.ndim))
        for path, leaf in flat.items()
    }
    return traverse_util.unflatten_dict(out, sep="/") if nested else out


def _as_trained(trained: dict[str, Any], mesh: Mesh, keys: tuple[Any, ...], leaf: Any) -> Any:
    path = getattr(keys[-1], "key", "")
    spec = meshes.spec(path, leaf.ndim) if path in trained else PartitionSpec()
    return struct(leaf.shape, leaf.dtype, mesh, spec)


def struct(
    shape: tuple[int, ...], dtype: Any, mesh: Mesh, spec: PartitionSpec
) -> jax.ShapeDtypeStruct:
    """An array that is not there, with its layout."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
