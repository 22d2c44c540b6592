"""Weights in and out: Hugging Face tensors <-> our stacked tree, by the tables of `names.py`.

Layers are stacked on a leading axis. A Hugging Face linear weight is [out, in]; ours is
[in..., out...], so a leaf is the transpose with the head axes split. Families that fuse
projections have one tensor for several of our leaves.

Read but not kept, as nothing computes with them: the buffers of IGNORED. A head that a tied
checkpoint has written out again goes out as it came in, as a copy of the embedding.
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from reptune_jax.console import watched
from reptune_jax.hub.names import (
    AS_TABLED,
    HEADS,
    HFName,
    Spelling,
    Table,
    prefix_and_embedding,
    table,
    wrapper,
)
from reptune_jax.hub.names import TABLE as TABLE  # llama's, for those who know what they have
from reptune_jax.hub.safetensors_io import TensorHandle, finite
from reptune_jax.hub.source import Source
from reptune_jax.model.arch import Arch
from reptune_jax.model.transformer import whole

# buffers that old checkpoints carry and nobody reads
IGNORED = re.compile(
    r"rotary_emb\.inv_freq$|\.masked_bias$|\.attn\.bias$|\.attention\.bias$|\.rope_freqs$"
)


@functools.lru_cache
def abstract_params(arch: Arch) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape of every leaf of the one-segment tree, without making any weight."""
    tokens = jax.ShapeDtypeStruct((1, 1), np.int32)
    tree = jax.eval_shape(whole(arch).init, jax.random.key(0), tokens, tokens)
    return traverse_util.flatten_dict(tree["params"], sep="/")


def spelling(source: Source, arch: Arch) -> Spelling:
    """How `source` names what `arch` has."""
    if source.spelling is not None:
        return source.spelling
    prefix, embed = prefix_and_embedding(table(arch.family))
    head = next((name for name in HEADS if name in source.tensors), "")
    return Spelling(
        bare=prefix + embed not in source.tensors and embed in source.tensors, head=head
    )


def load_params(source: Source, arch: Arch, dtype: Any) -> dict[str, Any]:
    """Reads a checkpoint into numpy arrays of `dtype`, each tensor once.

    Raises:
      ValueError: names every missing, unknown and mis-shaped tensor at once; or every tensor
        with a NaN or an infinity.
    """
    if source.leaves is not None:
        handles = leaves(source, arch, dtype).items()
        bar = watched(handles, "loading weights")
        return traverse_util.unflatten_dict({p: h.read() for p, h in bar}, sep="/")
    names, shapes = _names(arch.family, spelling(source, arch)), abstract_params(arch)
    _check(source, arch, names, shapes)
    flat = {path: np.empty(leaf.shape, dtype) for path, leaf in shapes.items()}
    broken, large = [], []
    tensors = list(_tensors(flat, names))
    for name, parts in watched(tensors, "loading weights"):
        tensor = source.tensors[name].read()
        if not finite(tensor):
            broken.append(name)
        with np.errstate(over="ignore"):  # what overflows is named below
            _split(tensor, parts)
        if dtype == np.float16 and not all(finite(leaf) for leaf, _ in parts):
            large.append(name)
    if broken:
        raise _not_finite(source, broken)
    if large:
        raise _too_large(source, large)
    return traverse_util.unflatten_dict(flat, sep="/")


def leaves(source: Source, arch: Arch, dtype: Any = None) -> dict[str, TensorHandle]:
    """Path -> handle of every stacked leaf, of `dtype` or as stored; read one at a time.

    Raises:
      ValueError: names every missing, unknown and mis-shaped tensor at once; on reading, the
        tensor that has a NaN or an infinity, also one that `dtype` makes.
    """
    shapes = abstract_params(arch)
    if source.leaves is not None:
        _check_leaves(source, shapes)
        return {path: _cast(source, path, dtype) for path in shapes}
    names = _names(arch.family, spelling(source, arch))
    _check(source, arch, names, shapes)
    return {path: _stacked(source, path, names, shapes, dtype) for path in shapes}


def _stacked(
    source: Source,
    path: str,
    names: Table,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    dtype: Any,
) -> TensorHandle:
    """The leaf of all layers; layers stored in different types meet in one that holds them all."""
    shape, row = shapes[path].shape, names[path]
    stacked = "{l}" in row.hf
    tensors = [row.hf.format(l=l) for l in range(shape[0] if stacked else 1)]
    stored = (source.tensors[name].dtype for name in tensors)
    to = np.dtype(dtype or functools.reduce(jnp.promote_types, stored))
    paths = [p for p in names if p in shapes and names[p].hf == row.hf]  # fused with it
    parts = [(shapes[p].shape[1:] if stacked else shapes[p].shape, names[p]) for p in paths]

    def read() -> np.ndarray:
        out = np.empty(shape, to)
        for name, leaf in zip(tensors, out if stacked else [out], strict=True):
            tensor = source.tensors[name].read()
            if not finite(tensor):
                raise _not_finite(source, [name])
            with np.errstate(over="ignore"):  # what overflows is named below
                _outputs_first(leaf, row)[...] = _pieces(tensor, parts)[paths.index(path)]
            if to == np.float16 and not finite(leaf):
                raise _too_large(source, [name])
        return out

    return TensorHandle(shape, to, read)


def _cast(source: Source, path: str, dtype: Any) -> TensorHandle:
    leaf = (source.leaves or {})[path]
    to = np.dtype(dtype or leaf.dtype)

    def read() -> np.ndarray:
        out = leaf.read().astype(to, copy=False)
        if to == np.float16 and not finite(out):
            raise _too_large(source, [path])
        return out

    return TensorHandle(leaf.shape, to, read)


def _not_finite(source: Source, broken: Sequence[str]) -> ValueError:
    return ValueError(
        f"{source.name}: {len(broken)} tensors have NaN or infinite weights, expected finite "
        f"ones: {', '.join(broken[:10])}{', …' if len(broken) > 10 else ''}. "
        "The checkpoint is damaged or its training diverged; use another."
    )


def _too_large(source: Source, found: Sequence[str]) -> ValueError:
    return ValueError(
        f"{source.name}: {len(found)} tensors have weights beyond float16's 65,504, expected "
        f"smaller ones: {', '.join(found[:10])}{', …' if len(found) > 10 else ''}. Use "
        "dtype bfloat16 or float32."
    )


def hf_specs(
    found: Mapping[str, TensorHandle], family: str, spelling: Spelling = AS_TABLED
) -> dict[str, TensorHandle]:
    """Name -> shape and type of every tensor that `to_hf` makes of these leaves, in its order."""
    names, specs = _names(family, spelling), {}
    flat = _with_head(found, spelling)
    for paths in _groups(flat, names):
        blank = {p: np.broadcast_to(np.int8(0), flat[p].shape) for p in paths}
        for name, parts in _tensors(blank, names):
            shape, first = _hf_shape(parts), flat[paths[0]]
            specs[name] = TensorHandle(shape, first.dtype, first.read)
    return specs


def to_hf(
    params: Mapping[str, Any], family: str, spelling: Spelling = AS_TABLED, dtype: Any = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (Hugging Face name, array) for every tensor; leaves of larger types come first.

    Leaves may be handles: each is read when its turn comes, and let go after it.
    """
    names = _names(family, spelling)
    flat = _with_head(traverse_util.flatten_dict(params, sep="/"), spelling)
    for paths in _groups(flat, names):
        leaves = ((p, flat[p]) for p in paths)
        found = {p: a.read() if isinstance(a, TensorHandle) else np.asarray(a) for p, a in leaves}
        for name, parts in _tensors(found, names):
            out = _join(parts)
            yield name, out if dtype is None else out.astype(dtype)
        del found, parts, out  # else two groups are held while the next is read


def _with_head(flat: Mapping[str, Any], spelling: Spelling) -> dict[str, Any]:
    """With the copy of the embedding that a tied checkpoint had written out."""
    if spelling.head and "head/embedding" not in flat:
        return {**flat, "head/embedding": flat["embed/embedding"]}
    return dict(flat)


def _groups(flat: Mapping[str, Any], names: Table) -> list[list[str]]:
    """Paths that make up the same tensors, in the table's order.

    Larger types first, which keeps a file's data aligned.
    """
    groups: dict[str, list[str]] = {}
    for path in (p for p in names if p in flat):
        groups.setdefault(names[path].hf, []).append(path)
    return sorted(groups.values(), key=lambda paths: -flat[paths[0]].dtype.itemsize)


def _names(family: str, spelling: Spelling) -> Table:
    """The family's table, as a checkpoint spells it."""
    names = dict(table(family))
    prefix, _ = prefix_and_embedding(names)
    if spelling.bare:
        names = {p: row._replace(hf=row.hf.removeprefix(prefix)) for p, row in names.items()}
    if spelling.head:
        names["head/embedding"] = HFName(spelling.head)
    return names


# ------------------------------------------------------------------ one tensor and its parts

Parts = list[tuple[np.ndarray, HFName]]  # unstacked leaves of ours that one tensor holds


def _tensors(flat: Mapping[str, Any], names: Table) -> Iterator[tuple[str, Parts]]:
    """(name, its parts) for every tensor in a checkpoint, layer by layer within a row."""
    for paths in _groups(flat, names):
        hf = names[paths[0]].hf
        rows = [names[path] for path in paths]
        if "{l}" not in hf:
            yield hf, [(flat[path], row) for path, row in zip(paths, rows, strict=True)]
            continue
        for layer in range(flat[paths[0]].shape[0]):
            leaves = [flat[path][layer] for path in paths]
            yield hf.format(l=layer), list(zip(leaves, rows, strict=True))


def _join(parts: Parts) -> np.ndarray:
    """Our leaves -> the tensor."""
    row = parts[0][1]
    laid = [_outputs_first(leaf, row) for leaf, row in parts]
    if row.by_head:  # [H, Dh, …] each: q, k and v of a head, then of the next
        out = np.concatenate(laid, axis=1)
        out = out.reshape(-1, *out.shape[2:])
    else:
        flat = [part.reshape(_flat_shape(part.shape, row)) for part in laid]
        out = flat[0] if len(flat) == 1 else np.concatenate(flat)
    return np.ascontiguousarray(out.T if row.conv1d else out)


def _split(tensor: np.ndarray, parts: Parts) -> None:
    """The tensor -> into our leaves."""
    pieces = _pieces(tensor, [(leaf.shape, row) for leaf, row in parts])
    for (leaf, row), piece in zip(parts, pieces, strict=True):
        _outputs_first(leaf, row)[...] = piece  # a view of the leaf: writing here fills it


def _pieces(
    tensor: np.ndarray, parts: Sequence[tuple[tuple[int, ...], HFName]]
) -> list[np.ndarray]:
    """The tensor -> its part for each leaf of these shapes, laid outputs first."""
    row, start, out = parts[0][1], 0, []
    laid = [_moved(shape, row) for shape, row in parts]
    if row.conv1d:
        tensor = tensor.T
    if row.by_head:
        tensor = tensor.reshape(laid[0][0], -1, *tensor.shape[1:])
    for shape in laid:
        size = shape[1] if row.by_head else _flat_shape(shape, row)[0]
        piece = tensor[:, start : start + size] if row.by_head else tensor[start : start + size]
        out.append(piece.reshape(shape))
        start += size
    return out


def _outputs_first(leaf: np.ndarray, row: HFName) -> np.ndarray:
    """[in…, out…] -> [out…, in…], a view."""
    axes = range(leaf.ndim)
    return leaf.transpose(*axes[row.inputs :], *axes[: row.inputs])


def _flat_shape(laid: tuple[int, ...], row: HFName) -> tuple[int, ...]:
    """[out…, in…] -> [out, in]; a bias [H, Dh] -> [H*Dh]; what is stored as it is stays."""
    if row.inputs:
        outs = len(laid) - row.inputs
        return int(np.prod(laid[:outs])), int(np.prod(laid[outs:]))
    return (int(np.prod(laid)),) if row.hf.endswith("bias") else laid


def _hf_shape(parts: Parts) -> tuple[int, ...]:
    """What `_join` would give, from shapes alone."""
    row = parts[0][1]
    flat = [_flat_shape(_moved(leaf.shape, row), row) for leaf, row in parts]
    shape = (sum(s[0] for s in flat), *flat[0][1:])
    return shape[::-1] if row.conv1d else shape


def matrix_shape(family: str, path: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """(out, in) of our (unstacked) kernel."""
    row = table(family)[path]
    out, inputs = _flat_shape(_moved(shape, row), row)
    return out, inputs


def output_parts(
    family: str, shapes: Mapping[str, tuple[int, ...]], matrix_OxR: np.ndarray
) -> list[np.ndarray]:
    """The rows of a matrix on a module's outputs, for each of the (unstacked) kernels in it."""
    R, rows = matrix_OxR.shape[1], table(family)
    parts = [
        ((R, *shape[rows[path].inputs :]), rows[path]._replace(inputs=1, conv1d=False))
        for path, shape in shapes.items()
    ]
    return [piece.reshape(-1, R) for piece in _pieces(matrix_OxR, parts)]


def _moved(shape: tuple[int, ...], row: HFName) -> tuple[int, ...]:
    return (*shape[row.inputs :], *shape[: row.inputs])


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


def _check(
    source: Source, arch: Arch, names: Table, leaves: Mapping[str, jax.ShapeDtypeStruct]
) -> None:
    # Zero bytes of memory, however large the shape: only shapes are looked at.
    blank = {p: np.broadcast_to(np.int8(0), leaf.shape) for p, leaf in leaves.items()}
    expected = {name: _hf_shape(parts) for name, parts in _tensors(blank, names)}
    found = {name for name in source.tensors if not IGNORED.search(name)}
    if arch.tied:  # some exporters write the tied copy too
        found -= set(HEADS)
    problems = [
        f"missing {name} {list(expected[name])}" for name in sorted(expected.keys() - found)
    ]
    problems += [f"unknown {name}" for name in sorted(found - expected.keys())]
    for name in sorted(expected.keys() & found):
        shape = tuple(source.tensors[name].shape)
        if shape != expected[name]:
            problems.append(f"{name}: got shape {list(shape)}, expected {list(expected[name])}")
    if problems and (whose := wrapper(found, expected.keys())):
        raise ValueError(f"{source.name}: {whose}.")
    if problems:
        more = [f"… and {len(problems) - 40} more"] if len(problems) > 40 else []
        shown = "\n  ".join(problems[:40] + more)
        raise ValueError(
            f"{source.name}: {len(problems)} weights do not fit config.json ({arch.family}):\n"
            f"  {shown}\nCheck that config.json belongs to these weights."
        )
