"""Weights in and out: Hugging Face tensors <-> our stacked tree, by the tables of `names.py`.

Layers are stacked on a leading axis. A Hugging Face linear weight is [out, in]; ours is
[in..., out...], so a leaf is the transpose with the head axes split. Families that fuse
projections have one tensor for several of our leaves.

Read but not kept, as nothing computes with them: the buffers of _IGNORED. A head that a tied
checkpoint has written out again goes out as it came in, as a copy of the embedding.
"""

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from flax import traverse_util
from tqdm import tqdm

from reptune_jax.hub.names import TABLE as TABLE  # llama's, for those who know what they have
from reptune_jax.hub.names import Row, Table, table
from reptune_jax.hub.source import Source
from reptune_jax.model.arch import Arch
from reptune_jax.model.transformer import whole

# buffers that old checkpoints carry and nobody reads
_IGNORED = re.compile(
    r"rotary_emb\.inv_freq$|\.masked_bias$|\.attn\.bias$|\.attention\.bias$|\.rope_freqs$"
)
_HEADS = ("lm_head.weight", "embed_out.weight")  # GPT-NeoX's output embedding has either name


class Spelling(NamedTuple):
    """Where a checkpoint departs from the table; kept, so that it goes out as it came in."""

    bare: bool = False  # names lack the model's prefix: "h.0…" for "transformer.h.0…"
    head: str = ""  # its name for the output embedding, if it has one (a tied one: a copy)


AS_TABLED = Spelling()


@functools.lru_cache
def abstract_params(arch: Arch) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape of every leaf of the one-segment tree, without making any weight."""
    tokens = jax.ShapeDtypeStruct((1, 1), np.int32)
    tree = jax.eval_shape(whole(arch).init, jax.random.key(0), tokens, tokens)
    return traverse_util.flatten_dict(tree["params"], sep="/")


def spelling(source: Source, arch: Arch) -> Spelling:
    """How `source` names what `arch` has."""
    prefix, embed = _prefix(table(arch.family))
    head = next((name for name in _HEADS if name in source.tensors), "")
    return Spelling(
        bare=prefix + embed not in source.tensors and embed in source.tensors, head=head
    )


def load_params(source: Source, arch: Arch, dtype: Any) -> dict[str, Any]:
    """Reads a checkpoint into numpy arrays of `dtype`, each tensor once.

    Raises:
      ValueError: names every missing, unknown and mis-shaped tensor at once; or every tensor
        with a NaN or an infinity.
    """
    names, leaves = _names(arch.family, spelling(source, arch)), abstract_params(arch)
    _check(source, arch, names, leaves)
    flat = {path: np.empty(leaf.shape, dtype) for path, leaf in leaves.items()}
    broken = []
    tensors = list(_tensors(flat, names))
    for name, parts in tqdm(tensors, desc="loading weights", delay=2, leave=False):
        tensor = source.tensors[name].read()
        if not _finite(tensor):
            broken.append(name)
        _split(tensor, parts)
    if broken:
        raise ValueError(
            f"{source.name}: {len(broken)} tensors have NaN or infinite weights, expected finite "
            f"ones: {', '.join(broken[:10])}{', …' if len(broken) > 10 else ''}. "
            "The checkpoint is damaged or its training diverged; use another."
        )
    return traverse_util.unflatten_dict(flat, sep="/")


def to_hf(
    params: Mapping[str, Any], family: str, spelling: Spelling = AS_TABLED, dtype: Any = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (Hugging Face name, array) for every tensor, in the table's order."""
    names, flat = _names(family, spelling), traverse_util.flatten_dict(params, sep="/")
    if spelling.head and "head/embedding" not in flat:
        flat["head/embedding"] = flat["embed/embedding"]
    # Only paths here: fetching all leaves from the devices at once would need their size again.
    for path in names:
        parts = [p for p in names if names[p].hf == names[path].hf and p in flat]
        if not parts or parts[0] != path:
            continue
        leaves = {p: np.asarray(flat[p]) for p in parts}
        for name, found in _tensors(leaves, names):
            out = _join(found)
            yield name, out if dtype is None else out.astype(dtype)


def _prefix(names: Table) -> tuple[str, str]:
    """("transformer.", "wte.weight"): the prefix that bare checkpoints lack, the embedding."""
    prefix, _, embed = names["embed/embedding"].hf.partition(".")
    return f"{prefix}.", embed


def _names(family: str, spelling: Spelling) -> Table:
    """The family's table, as a checkpoint spells it."""
    names = dict(table(family))
    prefix, _ = _prefix(names)
    if spelling.bare:
        names = {p: row._replace(hf=row.hf.removeprefix(prefix)) for p, row in names.items()}
    if spelling.head:
        names["head/embedding"] = Row(spelling.head)
    return names


# ------------------------------------------------------------------ one tensor and its parts

Parts = list[tuple[np.ndarray, Row]]  # unstacked leaves of ours that one tensor holds


def _tensors(flat: Mapping[str, Any], names: Table) -> Iterator[tuple[str, Parts]]:
    """(name, its parts) for every tensor in a checkpoint, layer by layer within a row."""
    whole: dict[str, list[str]] = {}
    for path in names:  # the table's order is that of the parts
        if path in flat:
            whole.setdefault(names[path].hf, []).append(path)
    for hf, paths in whole.items():
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
        flat = [_flat_outputs(part, row) for part in laid]
        out = flat[0] if len(flat) == 1 else np.concatenate(flat)
    return np.ascontiguousarray(out.T if row.conv1d else out)


def _split(tensor: np.ndarray, parts: Parts) -> None:
    """The tensor -> into our leaves."""
    row, start = parts[0][1], 0
    if row.conv1d:
        tensor = tensor.T
    if row.by_head:
        H = _outputs_first(*parts[0]).shape[0]
        tensor = tensor.reshape(H, -1, *tensor.shape[1:])
    for leaf, row in parts:
        laid = _outputs_first(leaf, row)  # a view of the leaf: writing here fills it
        size = laid.shape[1] if row.by_head else _flat_shape(laid.shape, row)[0]
        piece = tensor[:, start : start + size] if row.by_head else tensor[start : start + size]
        laid[...] = piece.reshape(laid.shape)
        start += size


def _outputs_first(leaf: np.ndarray, row: Row) -> np.ndarray:
    """[in…, out…] -> [out…, in…], a view."""
    axes = range(leaf.ndim)
    return leaf.transpose(*axes[row.inputs :], *axes[: row.inputs])


def _flat_outputs(laid: np.ndarray, row: Row) -> np.ndarray:
    return laid.reshape(_flat_shape(laid.shape, row))


def _flat_shape(laid: tuple[int, ...], row: Row) -> tuple[int, ...]:
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


def _moved(shape: tuple[int, ...], row: Row) -> tuple[int, ...]:
    return (*shape[row.inputs :], *shape[: row.inputs])


def _finite(tensor: np.ndarray) -> bool:
    if tensor.dtype == ml_dtypes.bfloat16:  # numpy has no fast way: look at the exponent's bits
        return not bool(((tensor.view(np.uint16) & 0x7F80) == 0x7F80).any())
    return bool(np.isfinite(tensor).all())


def _check(
    source: Source, arch: Arch, names: Table, leaves: Mapping[str, jax.ShapeDtypeStruct]
) -> None:
    # Zero bytes of memory, however large the shape: only shapes are looked at.
    blank = {p: np.broadcast_to(np.int8(0), leaf.shape) for p, leaf in leaves.items()}
    expected = {name: _hf_shape(parts) for name, parts in _tensors(blank, names)}
    found = {name for name in source.tensors if not _IGNORED.search(name)}
    if arch.tied:  # some exporters write the tied copy too
        found -= set(_HEADS)
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
