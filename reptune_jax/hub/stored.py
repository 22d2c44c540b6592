"""What two folders store, byte against byte: the part of `convert --verify` without the loader.

A loader that takes the wrong one of two sources takes it on both sides of a comparison of
predictions. So the source's files are read here once more, in a few lines of their own.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from reptune_jax.hub import orbax_io, side_files, weights
from reptune_jax.hub.names import HEADS, prefix_and_embedding, table
from reptune_jax.hub.source import Source
from reptune_jax.model import families

Tensors = Mapping[str, Callable[[], np.ndarray]]  # name -> reads it
_DTYPES: dict[str, Any] = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": ml_dtypes.bfloat16}
_DTYPES |= {"I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1", "U8": "u1", "BOOL": "?"}  # buffers
_OF_STORAGE = {"dtype", "torch_dtype"}  # keys of a config that say how its weights are stored


def differences(
    source: Source, to: Path, dtype: str = "", tuned: Collection[str] = ()
) -> list[str]:
    """What `to` stores otherwise than `source` does, a line each.

    `tuned` are names, ours or theirs, of what a run has changed; `dtype` is the type that weights
    were cast to, "" for none. An Orbax side is compared under its Hugging Face names.
    """
    config = json.loads((to / "config.json").read_text())
    out = _config_differences(source, config)
    for name, got, want in _pairs(source, to, config["model_type"]):
        if name in tuned or weights.IGNORED.search(name):
            continue
        if problem := _difference(got, want, dtype):
            out.append(f"{name} {problem}")
    return out


def _config_differences(source: Source, config: Mapping[str, Any]) -> list[str]:
    """Keys of the two config.json; "tied" is wrong where two different embeddings are stored."""
    given = side_files.spelled_for_all({"dtype": "", **source.config})
    if source.folder is not None:
        given = json.loads((source.folder / "config.json").read_text())
    given = {k: v for k, v in given.items() if not side_files.is_local(k, v)}
    of = {key for key in given.keys() | config.keys() if given.get(key) != config.get(key)}
    if source.leaves is None and _heads_differ(_stored(source), config["model_type"]):
        of.discard("tie_word_embeddings")
        if families.is_tied(config):
            return ["config.json ties the embeddings, of which two different ones are stored"]
    return [
        f"config.json has {key} = {config.get(key)!r}, expected {given.get(key)!r}"
        for key in sorted(of - _OF_STORAGE)
    ]


def _heads_differ(tensors: Tensors, family: str) -> bool:
    embed = next((name for name in _embeddings(family) if name in tensors), None)
    heads = [name for name in HEADS if name in tensors]
    return embed is not None and any(
        not np.array_equal(tensors[head](), tensors[embed]()) for head in heads
    )


def _embeddings(family: str) -> tuple[str, str]:
    prefix, embed = prefix_and_embedding(table(family))
    return prefix + embed, embed


Pair = tuple[str, np.ndarray | None, np.ndarray | None]  # name, what is there, what should be


def _pairs(source: Source, to: Path, family: str) -> Iterator[Pair]:
    if not orbax_io.is_model(to):
        stored, got = _stored(source), _safetensors(to)
        made: Iterable[tuple[str, np.ndarray]] = ((name, read()) for name, read in stored.items())
        if source.leaves is not None and source.spelling is not None:
            made = weights.to_hf(source.leaves, family, source.spelling)
        yield from ((name, there, should) for name, should, there in _beside(made, got))
        return
    leaves, spelling = orbax_io.read_leaves(to)
    if source.leaves is not None:
        want = {path: leaf.read for path, leaf in source.leaves.items()}
        yield from _beside(((path, leaf.read()) for path, leaf in leaves.items()), want)
    else:
        yield from _beside(weights.to_hf(leaves, family, spelling), _stored(source))


def _stored(source: Source) -> Tensors:
    """The source's tensors; of a file that is no folder's, as its reader gives them."""
    if source.folder is None or source.leaves is not None:
        return {name: tensor.read for name, tensor in source.tensors.items()}
    found = dict(_safetensors(source.folder))
    names = _embeddings(source.config["model_type"])
    heads = [name for name in HEADS if name in found]
    if heads and not any(name in found for name in names):  # tied: one is both
        found[names[0]] = found[heads[0]]
    return found


def _safetensors(folder: Path) -> Tensors:
    """A whole file before an index that does not name it; a tensor from where the index says."""
    index, single = folder / "model.safetensors.index.json", "model.safetensors"
    names = json.loads(index.read_text())["weight_map"] if index.exists() else {}
    if (folder / single).exists() and single not in names.values():
        names = dict.fromkeys(_header(folder / single)[0], single)
    if not names:
        files = (p for p in folder.glob("*.safetensors") if not p.name.startswith("adapter_"))
        names = {name: path.name for path in files for name in _header(path)[0]}
    headers = {file: _header(folder / file) for file in set(names.values())}

    def reader(name: str, file: str) -> Callable[[], np.ndarray]:
        (entries, base), where = headers[file], folder / file
        entry = entries[name]
        start, stop = entry["data_offsets"]

        def read() -> np.ndarray:
            with where.open("rb") as opened:
                opened.seek(base + start)
                raw = opened.read(stop - start)
            return np.frombuffer(raw, _DTYPES[entry["dtype"]]).reshape(entry["shape"])

        return read

    return {name: reader(name, file) for name, file in names.items()}


def _header(path: Path) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    return {k: v for k, v in entries.items() if k != "__metadata__"}, 8 + length


def _beside(made: Iterable[tuple[str, np.ndarray]], others: Tensors) -> Iterator[Pair]:
    """(name, the first side's, the other's), then those that only the other has."""
    seen = set()
    for name, array in made:
        seen.add(name)
        yield name, array, others[name]() if name in others else None
    for name in others.keys() - seen:
        yield name, None, others[name]()


def _difference(got: np.ndarray | None, want: np.ndarray | None, dtype: str) -> str:
    if got is None:
        return "is missing"
    if want is None:
        return "is stored, and not in the source"
    # Layers stored in different types meet in one that holds them all.
    to = np.dtype(dtype) if dtype else np.dtype(jnp.promote_types(got.dtype, want.dtype))
    if got.dtype != to:
        return f"has type {got.dtype}, expected {to}"
    if got.shape != want.shape:
        return f"has shape {list(got.shape)}, expected {list(want.shape)}"
    same = got.tobytes() == want.astype(to).tobytes()
    return "" if same else f"has other values, the largest by {_largest(got, want):.1e}"


def _largest(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got.astype(np.float64) - want.astype(np.float64)).max(initial=0.0))
