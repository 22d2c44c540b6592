"""The tensors of a torch `.pt` file, read and written without torch and without running anything.

Such a file is a zip: a pickle that says what there is, and the bytes of each storage. A pickle
names functions to call. Only those that rebuild a tensor of floats or an ordered dict are known
here; another name is refused before it is looked up.
"""

import collections
import io
import math
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from reptune_jax.reading import reading, short

_STORAGES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
}
_REBUILD = ("torch._utils", "_rebuild_tensor_v2")
_MAX_PICKLE = 1 << 24  # bytes, which hold the names of 100,000 tensors
_INSTEAD = "Save the tensors as safetensors, or as a plain dict by torch.save."


def read_torch(path: Path) -> Any:
    """What was saved: dicts, lists, numbers and texts, with numpy arrays for tensors.

    Raises:
      ValueError: not such a file, a damaged one, one that would call something, or tensors of
        other types than floats.
    """
    with reading(path, _INSTEAD):
        if not zipfile.is_zipfile(path):
            raise ValueError(
                f"{path}: got no zip file, expected what torch.save writes since torch 1.6. "
                f"{_INSTEAD}"
            )
        with zipfile.ZipFile(path) as archive:
            found = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(found) != 1:
                raise ValueError(f"got {len(found)} files data.pkl, expected one.")
            return _Reader(archive, found[0]).load()


class _Reader(pickle.Unpickler):
    """Knows the names that are allowed, and no others."""

    def __init__(self, archive: zipfile.ZipFile, name: str):
        self._archive, self._folder = archive, name.removesuffix("data.pkl")
        if archive.getinfo(name).file_size > _MAX_PICKLE:
            raise ValueError(f"got a pickle of more than {_MAX_PICKLE:,} bytes, expected less.")
        super().__init__(io.BytesIO(archive.read(name)))

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == _REBUILD:
            return _tensor
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        raise ValueError(
            f"holds {module}.{name}, expected tensors of {', '.join(_STORAGES)} in dicts and "
            f"lists. Nothing of it was run. {_INSTEAD}"
        )

    def persistent_load(self, pid: Any) -> np.ndarray:
        _, dtype, key, _, length = pid
        info = self._archive.getinfo(f"{self._folder}data/{key}")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != length * dtype.itemsize:
            raise ValueError(f"got {info.file_size:,} bytes of {key}, expected {length} {dtype}.")
        return np.frombuffer(self._archive.read(info), dtype)


def _tensor(
    storage: np.ndarray, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
) -> np.ndarray:
    """A copy of a view of a storage, within its bounds."""
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"got a tensor of shape {short(shape)} and strides {short(strides)}.")
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if math.prod(shape) > storage.size or (0 not in shape and last >= storage.size):
        raise ValueError(f"got a tensor of shape {short(shape)} beyond its storage's end.")
    item = storage.dtype.itemsize
    view = np.lib.stride_tricks.as_strided(storage[offset:], shape, [s * item for s in strides])
    return np.array(view)


def write_torch(path: Path, value: Mapping[str, Any]) -> None:
    """Dicts, numbers, texts, None and float32 arrays, as `torch.load(weights_only=True)` reads."""
    arrays: list[np.ndarray] = []
    text = b"\x80\x02" + _pickled(value, arrays) + b"."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", text)
        archive.writestr("archive/byteorder", "little")
        for key, array in enumerate(arrays):
            archive.writestr(f"archive/data/{key}", array.astype("<f4").tobytes())
        archive.writestr("archive/version", "3\n")


def _pickled(value: Any, arrays: list[np.ndarray]) -> bytes:
    """The opcodes that build it; python's own pickler would import torch to name its function."""
    if value is None:
        return b"N"
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, tuple):
        return b"(" + b"".join(_pickled(item, arrays) for item in value) + b"t"
    if isinstance(value, Mapping):
        pairs = (_pickled(part, arrays) for pair in value.items() for part in pair)
        return b"}(" + b"".join(pairs) + b"u"
    arrays.append(np.ascontiguousarray(value, np.float32))
    array, key = arrays[-1], f"{len(arrays) - 1}"
    strides = tuple(s // array.itemsize for s in array.strides)
    storage = b"(" + _pickled("storage", arrays) + b"ctorch\nFloatStorage\n"
    storage += b"".join(_pickled(part, arrays) for part in (key, "cpu", array.size)) + b"tQ"
    view = b"".join(_pickled(part, arrays) for part in (0, array.shape, strides, False))
    hooks = b"ccollections\nOrderedDict\n)R"
    return b"c%b\n%b\n(" % tuple(s.encode() for s in _REBUILD) + storage + view + hooks + b"tR"
