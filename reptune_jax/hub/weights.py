"""One table of weight names, used in both directions: Hugging Face tensors <-> our stacked tree.

Layers are stacked on a leading axis. A Hugging Face linear weight is [out, in]; ours is
[in..., out...], so a leaf is the transpose with the head axes split.
"""

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from tqdm import tqdm

from reptune_jax.hub.safetensors_io import TensorHandle
from reptune_jax.hub.source import Source
from reptune_jax.model.arch import Arch
from reptune_jax.model.transformer import whole


class Row(NamedTuple):
    """Where a leaf of ours is in a checkpoint."""

    hf: str  # name in the checkpoint, {l} is the layer
    inputs: int  # leading axes of our leaf that are inputs; 0 = stored as it is


# our path within a layer (or at the top) -> Hugging Face name; llama and qwen2 share it
TABLE: dict[str, Row] = {
    "embed/embedding": Row("model.embed_tokens.weight", 0),  # [V, D]
    "head/embedding": Row("lm_head.weight", 0),  # [V, D]
    "final_norm/scale": Row("model.norm.weight", 0),  # [D]
    "blocks/attn_norm/scale": Row("model.layers.{l}.input_layernorm.weight", 0),
    "blocks/mlp_norm/scale": Row("model.layers.{l}.post_attention_layernorm.weight", 0),
    "blocks/attn/q/kernel": Row("model.layers.{l}.self_attn.q_proj.weight", 1),  # [D, H, Dh]
    "blocks/attn/k/kernel": Row("model.layers.{l}.self_attn.k_proj.weight", 1),  # [D, K, Dh]
    "blocks/attn/v/kernel": Row("model.layers.{l}.self_attn.v_proj.weight", 1),  # [D, K, Dh]
    "blocks/attn/o/kernel": Row("model.layers.{l}.self_attn.o_proj.weight", 2),  # [H, Dh, D]
    "blocks/mlp/gate/kernel": Row("model.layers.{l}.mlp.gate_proj.weight", 1),  # [D, F]
    "blocks/mlp/up/kernel": Row("model.layers.{l}.mlp.up_proj.weight", 1),  # [D, F]
    "blocks/mlp/down/kernel": Row("model.layers.{l}.mlp.down_proj.weight", 1),  # [F, D]
    "blocks/attn/q/bias": Row("model.layers.{l}.self_attn.q_proj.bias", 0),  # [H, Dh]
    "blocks/attn/k/bias": Row("model.layers.{l}.self_attn.k_proj.bias", 0),
    "blocks/attn/v/bias": Row("model.layers.{l}.self_attn.v_proj.bias", 0),
    "blocks/attn/o/bias": Row("model.layers.{l}.self_attn.o_proj.bias", 0),  # [D]
    "blocks/mlp/gate/bias": Row("model.layers.{l}.mlp.gate_proj.bias", 0),
    "blocks/mlp/up/bias": Row("model.layers.{l}.mlp.up_proj.bias", 0),
    "blocks/mlp/down/bias": Row("model.layers.{l}.mlp.down_proj.bias", 0),
}

# buffers that old checkpoints carry and nobody reads
_IGNORED = re.compile(r"rotary_emb\.inv_freq$|\.masked_bias$|\.attn\.bias$")


@functools.lru_cache
def abstract_params(arch: Arch) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape of every leaf of the one-segment tree, without making any weight."""
    tokens = jax.ShapeDtypeStruct((1, 1), np.int32)
    tree = jax.eval_shape(whole(arch).init, jax.random.key(0), tokens, tokens)
    return traverse_util.flatten_dict(tree["params"], sep="/")


def load_params(source: Source, arch: Arch, dtype: Any) -> dict[str, Any]:
    """Reads a checkpoint into numpy arrays of `dtype`, one stacked leaf at a time.

    Raises:
      ValueError: names every missing, unknown and mis-shaped tensor at once.
    """
    flat = {}
    found = leaves(source, arch, dtype)
    for path, leaf in tqdm(found.items(), desc="loading weights", delay=2, leave=False):
        flat[path] = leaf.read()
    return traverse_util.unflatten_dict(flat, sep="/")


def leaves(source: Source, arch: Arch, dtype: Any = None) -> dict[str, TensorHandle]:
    """Path -> handle of every stacked leaf, of `dtype` or as stored; read one at a time.

    Raises:
      ValueError: names every missing, unknown and mis-shaped tensor at once.
    """
    shapes = abstract_params(arch)
    if source.leaves is not None:
        _check_leaves(source, shapes)
        return {path: _cast(source.leaves[path], dtype) for path in shapes}
    _check(source, arch, shapes)
    return {path: _stacked(source, path, leaf.shape, dtype) for path, leaf in shapes.items()}


def _stacked(source: Source, path: str, shape: tuple[int, ...], dtype: Any) -> TensorHandle:
    """The leaf of all layers; layers stored in different types meet in one that holds them all."""
    row = TABLE[path]
    layers = range(shape[0]) if "{l}" in row.hf else range(1)
    stored = (source.tensors[row.hf.format(l=l)].dtype for l in layers)
    to = np.dtype(dtype or functools.reduce(jnp.promote_types, stored))

    def read() -> np.ndarray:
        out = np.empty(shape, to)
        for part, name in _parts(out, path):
            part[...] = _from_hf(source.tensors[name].read(), row, part.shape)
        return out

    return TensorHandle(shape, to, read)


def _cast(leaf: TensorHandle, dtype: Any) -> TensorHandle:
    to = np.dtype(dtype or leaf.dtype)
    return TensorHandle(leaf.shape, to, lambda: leaf.read().astype(to, copy=False))


def hf_specs(found: Mapping[str, TensorHandle]) -> dict[str, TensorHandle]:
    """Name -> shape and type of every tensor that `to_hf` makes of these leaves, in its order."""
    specs = {}
    for path in _ordered(found):
        leaf, name = found[path], TABLE[path].hf
        stacked = "{l}" in name
        shape = hf_shape(path, leaf.shape[1:] if stacked else leaf.shape)
        for layer in range(leaf.shape[0] if stacked else 1):
            specs[name.format(l=layer)] = TensorHandle(shape, leaf.dtype, leaf.read)
    return specs


def _ordered(flat: Mapping[str, Any]) -> list[str]:
    """The table's order; larger types first, which keeps a file's data aligned."""
    return sorted((p for p in TABLE if p in flat), key=lambda p: -flat[p].dtype.itemsize)


def to_hf(params: Mapping[str, Any], dtype: Any = None) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (Hugging Face name, array) for every tensor, in the table's order.

    Leaves may be handles: each is read when its turn comes, and let go after it.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    for path in _ordered(flat):
        given = flat[path]
        leaf = given.read() if isinstance(given, TensorHandle) else np.asarray(given)
        for part, name in _parts(leaf, path):
            out = _to_hf(part, TABLE[path])
            yield name, out if dtype is None else out.astype(dtype)
        del leaf, part, out  # else two leaves are held while the next is read


def hf_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape in the checkpoint of our (unstacked) leaf."""
    inputs = TABLE[path].inputs
    if inputs == 0:
        return shape if len(shape) == 2 and "bias" not in path else (int(np.prod(shape)),)
    return int(np.prod(shape[inputs:])), int(np.prod(shape[:inputs]))


def _parts(leaf: np.ndarray, path: str) -> Iterator[tuple[np.ndarray, str]]:
    name = TABLE[path].hf
    if "{l}" not in name:
        yield leaf, name
        return
    for layer in range(leaf.shape[0]):
        yield leaf[layer], name.format(l=layer)


def _from_hf(tensor: np.ndarray, row: Row, shape: tuple[int, ...]) -> np.ndarray:
    return (tensor.T if row.inputs else tensor).reshape(shape)


def _to_hf(leaf: np.ndarray, row: Row) -> np.ndarray:
    if row.inputs == 0:
        return leaf.reshape(-1) if leaf.ndim == 2 and row.hf.endswith("bias") else leaf
    fan_in = int(np.prod(leaf.shape[: row.inputs]))
    return np.ascontiguousarray(leaf.reshape(fan_in, -1).T)


def _check_leaves(source: Source, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    found = {path: leaf.shape for path, leaf in (source.leaves or {}).items()}
    expected = {path: leaf.shape for path, leaf in shapes.items()}
    wrong = [p for p in found.keys() | expected.keys() if found.get(p) != expected.get(p)]
    if wrong:
        path = min(wrong)
        raise ValueError(
            f"{source.name}: {len(wrong)} leaves do not fit config.json, such as {path}: got shape "
            f"{found.get(path)}, expected {expected.get(path)}. Convert the model again."
        )


def _check(source: Source, arch: Arch, leaves: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    expected = {}
    for path, leaf in leaves.items():
        stacked = "{l}" in TABLE[path].hf
        shape = hf_shape(path, leaf.shape[1:] if stacked else leaf.shape)
        for layer in range(leaf.shape[0] if stacked else 1):
            expected[TABLE[path].hf.format(l=layer)] = shape
    found = {name for name in source.tensors if not _IGNORED.search(name)}
    if arch.tied:  # some exporters write the tied copy too
        found.discard("lm_head.weight")
    problems = [
        f"missing {name} {list(expected[name])}" for name in sorted(expected.keys() - found)
    ]
    problems += [f"unknown {name}" for name in sorted(found - expected.keys())]
    for name in sorted(expected.keys() & found):
        shape = tuple(source.tensors[name].shape)
        if shape != expected[name]:
            problems.append(f"{name}: got shape {list(shape)}, expected {list(expected[name])}")
    if problems:
        more = [f"… and {len(problems) - 40} more"] if len(problems) > 40 else []
        shown = "\n  ".join(problems[:40] + more)
        raise ValueError(
            f"{source.name}: {len(problems)} weights do not fit config.json ({arch.family}):\n"
            f"  {shown}\nCheck that config.json belongs to these weights."
        )
