"""An Orbax model folder: config.json and tokenizer as in a Hugging Face folder, weights in Orbax.

Orbax saves and restores a tree as a whole, and needs three times its size to save it (measured:
1 GiB of weights, 3 GiB at the peak, whatever the chunks; 2 GiB to restore it unless chunked). So
every leaf of the one-segment tree is saved in pieces of a few rows of its first axis, each an Orbax
checkpoint of its own, `params/<path>/<piece>`: one leaf and three pieces is all that is held.
"""

import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from reptune_jax import ending
from reptune_jax.hub.names import HEADS, Spelling
from reptune_jax.hub.safetensors_io import TensorHandle, check_written
from reptune_jax.reading import parse_json, reading

INDEX = "orbax_model.json"  # shape, type and checksum of every leaf
_FORMAT = "reptune_jax.orbax.1"
_PIECE_BYTES = 128 << 20
_AGAIN = "Convert the model again."
_DTYPES = ("float64", "float32", "float16", "bfloat16")
_CHUNK_BYTES = 32 << 20  # what Orbax reads and writes at once


def is_model(folder: Path) -> bool:
    """Whether `write_leaves` made this folder."""
    return (folder / INDEX).exists()


def write_leaves(
    folder: Path,
    leaves: Mapping[str, TensorHandle],
    spelling: Spelling,
    progress: Callable[[int], Any],
) -> None:
    """Reads and writes one leaf after the other, then the index; `progress` is told of bytes."""
    index = {}
    for path, handle in leaves.items():
        leaf = handle.read()
        check_written(path, leaf)
        for k, (start, stop) in enumerate(_pieces(leaf.shape, leaf.dtype)):
            _save(folder / "params" / _name(path) / str(k), leaf[start:stop])
        index[path] = {"shape": leaf.shape, "dtype": leaf.dtype.name, "crc32": _checksum(leaf)}
        progress(leaf.nbytes)
        del leaf  # else two leaves are held while the next is read
    about = {"format": _FORMAT, "spelling": spelling._asdict(), "leaves": index}
    text = json.dumps(about, indent=1)
    (folder / INDEX).write_text(text + "\n")


def read_leaves(folder: Path) -> tuple[dict[str, TensorHandle], Spelling]:
    """(path -> handle of every leaf, how the Hugging Face folder it was made from named them).

    Raises:
      ValueError: an index that is damaged or of another format.
    """
    stored = parse_json((folder / INDEX).read_bytes(), folder / INDEX, _AGAIN)
    if (found := stored.get("format")) != _FORMAT:
        raise ValueError(
            f"{folder / INDEX}: got format {found!r}, expected {_FORMAT!r}. Convert it again."
        )
    with reading(folder / INDEX, _AGAIN):
        spelling = Spelling(**stored["spelling"])
        if type(spelling.bare) is not bool or spelling.head not in ("", *HEADS):
            raise ValueError(f"got spelling {spelling}, expected a flag and the name of a head")
        leaves = stored["leaves"].items()
        return {path: _handle(folder, path, entry) for path, entry in leaves}, spelling


def _handle(folder: Path, path: str, entry: Mapping[str, Any]) -> TensorHandle:
    where = folder / "params" / _name(path)
    shape, crc = tuple(entry["shape"]), entry["crc32"]
    if not all(type(n) is int and 0 < n < 2**31 for n in shape) or type(crc) is not int:
        raise ValueError(f"{path}: got shape {list(shape)} and crc32 {crc!r}, expected numbers")
    if entry["dtype"] not in _DTYPES or any(part in ("", "..") for part in path.split("/")):
        expected = f"{', '.join(_DTYPES)} at a path"
        raise ValueError(f"{path!r}: got dtype {entry['dtype']!r}, expected one of {expected}")
    dtype = np.dtype(entry["dtype"])

    def read() -> np.ndarray:
        leaf = np.empty(shape, dtype)
        for k, (start, stop) in enumerate(_pieces(shape, dtype)):
            if not (where / str(k)).is_dir():
                raise ValueError(f"{where / str(k)}: is missing. Convert the model again.")
            with reading(where / str(k), _AGAIN):
                leaf[start:stop] = _restore(where / str(k), leaf[start:stop])
        if _checksum(leaf) != crc:  # Orbax restores flipped bytes without a word
            raise ValueError(f"{where}: is damaged (checksum). Convert the model again.")
        return leaf

    return TensorHandle(shape, dtype, read)


def _pieces(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Iterator[tuple[int, int]]:
    """[start, stop) of the first axis, of about `_PIECE_BYTES` each."""
    row = math.prod(shape[1:]) * dtype.itemsize
    rows = max(1, _PIECE_BYTES // max(row, 1))
    yield from ((start, min(start + rows, shape[0])) for start in range(0, shape[0], rows))


def _save(where: Path, leaf: np.ndarray) -> None:
    import orbax.checkpoint as ocp

    args = ocp.args.PyTreeSave(
        {"leaf": leaf}, save_args={"leaf": ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES)}
    )
    with ocp.Checkpointer(_handler()) as checkpointer:
        try:
            checkpointer.save(where.absolute(), args=args)
        except Exception as e:  # of its own kinds, without the machine's number
            if (number := ending.number_of(e)) is None:
                raise
            raise OSError(number, os.strerror(number), str(where)) from e


def _restore(where: Path, like: np.ndarray) -> np.ndarray:
    import orbax.checkpoint as ocp

    restore = {"leaf": ocp.RestoreArgs(restore_type=np.ndarray)}
    with ocp.Checkpointer(_handler()) as checkpointer:
        args = ocp.args.PyTreeRestore(restore_args=restore)
        found = checkpointer.restore(where.absolute(), args=args)["leaf"]
    if (found.shape, found.dtype) != (like.shape, like.dtype):
        raise ValueError(
            f"got {found.dtype} {list(found.shape)}, expected {like.dtype} {list(like.shape)}"
        )
    return found


def _handler() -> Any:
    import orbax.checkpoint as ocp

    return ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True)


def _name(path: str) -> str:
    return path.replace("/", ".")


def _checksum(leaf: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
