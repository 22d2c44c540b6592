"""The device mesh, and the one table that says how every array is laid out on it.

Axes: `data` replicates the weights, `fsdp` shards them over the residual axis, `tensor` over heads
and MLP columns; a batch is split over `data` and `fsdp`.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from reptune_jax.console import watched

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))

# path -> layout of the unstacked leaf; a stacked layer axis in front is never split
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"(embed|head)/embedding$", PartitionSpec("tensor", "fsdp")),  # [V, D]
    (r"positions/embedding$", PartitionSpec(None, "fsdp")),  # [positions, D]
    (r"attn/[qkv]/kernel$", PartitionSpec("fsdp", "tensor", None)),  # [D, H, Dh]
    (r"attn/[qkv]/bias$", PartitionSpec("tensor", None)),  # [H, Dh]
    (r"attn/o/kernel$", PartitionSpec("tensor", None, "fsdp")),  # [H, Dh, D]
    (r"mlp/(gate|up)/kernel$", PartitionSpec("fsdp", "tensor")),  # [D, F]
    (r"mlp/(gate|up)/bias$", PartitionSpec("tensor")),  # [F]
    (r"mlp/down/kernel$", PartitionSpec("tensor", "fsdp")),  # [F, D]
    (r"(scale|norm/bias|attn/o/bias|mlp/down/bias)$", PartitionSpec(None)),  # [D], [Dh], [H*Dh]
    # Kernels as integers, [inputs, outputs], and their steps, of which there may be one an output.
    (r"(attn/[qkv]|mlp/(gate|up))/codes$", PartitionSpec("fsdp", "tensor")),
    (r"(attn/[qkv]|mlp/(gate|up))/step$", PartitionSpec(None, "tensor")),
    (r"(attn/o|mlp/down)/codes$", PartitionSpec("tensor", "fsdp")),
    (r"(attn/o|mlp/down)/step$", PartitionSpec(None, "fsdp")),
    # Adapters: inputs and outputs lie as those of their kernel, the rank is never split.
    (r"(attn/[qkv]|mlp/(gate|up))/lora_a$", PartitionSpec("fsdp", None)),  # [D, R]
    (r"attn/[qkv]/lora_b$", PartitionSpec(None, "tensor", None)),  # [R, H, Dh]
    (r"attn/o/lora_a$", PartitionSpec("tensor", None, None)),  # [H, Dh, R]
    (r"mlp/(gate|up)/lora_b$", PartitionSpec(None, "tensor")),  # [R, F]
    (r"mlp/down/lora_a$", PartitionSpec("tensor", None)),  # [F, R]
    (r"(attn/o|mlp/down)/lora_b$", PartitionSpec(None, "fsdp")),  # [R, D]
)


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh over all devices, or the given ones; one size may be -1 and takes what is left.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes, n = [data, fsdp, tensor], len(devices)
    shape = dict(zip(AXES, sizes, strict=True))
    if -1 in sizes:
        sizes[sizes.index(-1)] = n // max(int(np.prod([s for s in sizes if s != -1])), 1)
    if min(sizes) < 1 or int(np.prod(sizes)) != n:
        raise ValueError(
            f"mesh: got {shape}, expected sizes whose product is the {n} devices. Set one to -1."
        )
    # Auto axes: flax.linen modules fail under Explicit ones, which are make_mesh's default.
    auto = (AxisType.Auto,) * 3
    return jax.make_mesh(tuple(sizes), AXES, axis_types=auto, devices=devices)


def spec(path: str, ndim: int) -> PartitionSpec:
    """The rule for a leaf; axes in front of it (stacked layers, optimizer factors) stay whole."""
    for pattern, rule in RULES:
        if re.search(pattern, path):
            return PartitionSpec(*(None,) * (ndim - len(rule)), *rule)
    raise ValueError(f"{path}: no sharding rule matches it. Add one to RULES in mesh.py.")


def check_divides(shapes: dict[str, tuple[int, ...]], mesh: Mesh) -> None:
    """Raises one ValueError naming every array axis that a mesh axis does not divide.

    jax itself silently replicates such an array inside a constraint.
    """
    problems = []
    for path, shape in shapes.items():
        for dim, axis in zip(shape, spec(path, len(shape)), strict=True):
            if axis is not None and dim % mesh.shape[axis]:
                problems.append(f"{path} {list(shape)}: {dim} over {axis}={mesh.shape[axis]}")
    if problems:
        raise ValueError("mesh: these do not divide evenly:\n  " + "\n  ".join(problems))


def put_params(host: dict[str, Any], mesh: Mesh | None) -> dict[str, Any]:
    """Numpy weights to the devices, each leaf born in its layout."""
    flat = traverse_util.flatten_dict(host, sep="/")
    if mesh is None:
        placed = {path: jax.device_put(leaf) for path, leaf in flat.items()}
    else:
        check_divides({path: leaf.shape for path, leaf in flat.items()}, mesh)
        placed = {
            path: _shard(leaf, NamedSharding(mesh, spec(path, leaf.ndim)))
            for path, leaf in flat.items()
        }
    return traverse_util.unflatten_dict(placed, sep="/")


def put_batch(batch: Any, mesh: Mesh | None) -> Any:
    """Rows over (data, fsdp); leaves must have the batch on their first axis.

    Raises:
      ValueError: the rows cannot be shared out evenly.
    """
    if mesh is None:
        return jax.device_put(batch)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    for rows in {len(leaf) for leaf in jax.tree.leaves(batch)}:
        if rows % ways:
            raise ValueError(
                f"batch: got {rows} rows, expected a multiple of mesh data x fsdp = {ways}. "
                "Change train.batch and train.retain_batch, or the mesh."
            )
    return jax.tree.map(lambda leaf: _shard(leaf, NamedSharding(mesh, BATCH)), batch)


def put_rows(batch: Any, mesh: Mesh | None) -> Any:
    """For inference: rows over (data, fsdp) where they divide evenly, else whole everywhere."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, batch)
    rows = {len(leaf) for leaf in jax.tree.leaves(batch)}
    even = all(n % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0 for n in rows)
    return put_batch(batch, mesh) if even else replicate(batch, mesh)


def in_batches(
    compute: Callable[..., Any], inputs: tuple[np.ndarray, ...], batch: int, mesh: Mesh | None
) -> Any:
    """`compute(*inputs)` for all rows, `batch` at a time; the results on the host."""
    found, B = [], len(inputs[0])
    for start in watched(range(0, B, batch), "reading texts"):
        rows_B = np.resize(np.arange(start, min(start + batch, B)), batch)
        rows = put_rows(tuple(a[rows_B] for a in inputs), mesh)
        found.append(fetch(compute(*rows)))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:B], *found)


def cache_sharding(mesh: Mesh, B: int, K: int) -> NamedSharding:
    """Of a [N, B, K, S, Dh] cache: rows as `put_rows` lays them, heads over tensor."""
    even_B = B % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0
    even_K = K % mesh.shape["tensor"] == 0
    rows, heads = BATCH[0] if even_B else None, "tensor" if even_K else None
    return NamedSharding(mesh, PartitionSpec(None, rows, heads))


def rows_of(mesh: Mesh | None) -> NamedSharding | None:
    """How a [B, T, D] residual stream lies: `Decoder.rows`."""
    return None if mesh is None else NamedSharding(mesh, BATCH)


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that arrays lie on; None on one device."""
    mesh = getattr(jax.tree.leaves(tree)[0].sharding, "mesh", None)
    return mesh if isinstance(mesh, Mesh) else None


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """The same value on every device of the mesh."""
    if mesh is None:
        return jax.device_put(tree)
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: _shard(np.asarray(leaf), whole), tree)


def fetch(tree: Any) -> Any:
    """Numpy, also where the shards lie on other hosts; all processes must call it together."""
    return jax.tree.map(_fetch, tree)


def _fetch(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        return multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


def _shard(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """Every host has the whole array and gives its devices their slices."""
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])
