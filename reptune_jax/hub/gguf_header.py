"""The header of a GGUF file: metadata, and where each tensor lies.

`gguf.GGUFReader` makes a numpy array per vocabulary string (4 s for 49k tokens) and fails on a
truncated file without saying so; this reads the same header in 0.1 s and checks every size.
"""

import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

_SCALARS = {
    GGUFValueType.UINT8: "u1",
    GGUFValueType.INT8: "i1",
    GGUFValueType.UINT16: "u2",
    GGUFValueType.INT16: "i2",
    GGUFValueType.UINT32: "u4",
    GGUFValueType.INT32: "i4",
    GGUFValueType.FLOAT32: "f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "u8",
    GGUFValueType.INT64: "i8",
    GGUFValueType.FLOAT64: "f8",
}


class TensorInfo(NamedTuple):
    """Where a tensor lies; `shape` is row-major, as in HF: (out, in)."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int  # bytes from the start of the file
    n_bytes: int


class Header(NamedTuple):
    """Everything before the weights, and the bytes to read them from."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    data: np.ndarray  # uint8, the whole file, memory-mapped


def read_header(path: Path) -> Header:
    """Reads and checks the header; the tensors' bytes are not touched.

    Raises:
      ValueError: not a GGUF file, an unknown version or quantization, or a truncated file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ValueError(
            f"{path}: got {size:,} bytes starting with {magic!r}, expected b'GGUF'. "
            "This is not a GGUF file; a hub download may have saved an error page or a pointer."
        )
    data = np.memmap(path, np.uint8, "r")
    cursor = _Cursor(path, data)
    cursor.version()
    n_tensors, n_fields = cursor.number("u8"), cursor.number("u8")
    metadata = {cursor.string(): cursor.value() for _ in range(n_fields)}
    raw = [cursor.tensor() for _ in range(n_tensors)]
    align = metadata.get("general.alignment", 32)
    if type(align) is not int or not 0 < align < 2**31:
        raise ValueError(f"{path}: got general.alignment {align!r}, expected a power of two.")
    base = -(-cursor.offset // align) * align
    tensors = {name: _locate(path, name, shape, kind, base + at) for name, shape, kind, at in raw}
    if len(tensors) < len(raw):
        raise ValueError(f"{path}: has a tensor twice, expected each once. Convert the file again.")
    end = max((info.start + info.n_bytes for info in tensors.values()), default=base)
    if end > size:
        raise ValueError(
            f"{path}: got {size:,} bytes, expected {end:,}. "
            "The file is truncated; download it again."
        )
    return Header(metadata, tensors, data)


def _locate(path: Path, name: str, shape: tuple[int, ...], kind_id: int, start: int) -> TensorInfo:
    try:
        kind = GGMLQuantizationType(kind_id)
    except ValueError:
        raise ValueError(
            f"{path}: {name} has quantization {kind_id}, which is unknown. "
            "Upgrade the gguf package, or use another quantization of the model (Q8_0, F16)."
        ) from None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if not shape or shape[-1] % block:
        raise ValueError(
            f"{path}: {name} has shape {list(shape)}, expected rows in blocks of "
            f"{block} ({kind.name}). The file is damaged; download it again."
        )
    elements = 1
    for dim in shape:
        elements *= dim
    return TensorInfo(shape, kind, start, elements // block * block_bytes)


class _Cursor:
    """Reads forward through the header, never past the end."""

    def __init__(self, path: Path, data: np.ndarray):
        self.path = path
        self.buffer = memoryview(data)  # type: ignore[arg-type]  # slices of it copy nothing
        self.offset = 4

    def take(self, n_bytes: int) -> memoryview:
        end = self.offset + n_bytes
        if end > len(self.buffer):
            raise ValueError(
                f"{self.path}: got {len(self.buffer):,} bytes, but the header alone needs {end:,}. "
                "The file is truncated; download it again."
            )
        part = self.buffer[self.offset : end]
        self.offset = end
        return part

    def number(self, code: str) -> Any:
        return self.array(code, 1)[0]

    def array(self, code: str, count: int) -> list[Any]:
        dtype = np.dtype("<" + code if code != "?" else "?")
        return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()

    def string(self) -> str:
        (length,) = struct.unpack("<Q", self.take(8))
        return str(self.take(length), "utf-8")

    def version(self) -> None:
        version = self.number("u4")
        if version not in (2, 3):
            big = " (a big-endian file)" if version & 0xFFFF == 0 else ""
            raise ValueError(
                f"{self.path}: got GGUF version {version}{big}, expected 2 or 3. "
                "Convert the file again."
            )

    def value(self) -> Any:
        kind = self.number("u4")
        if kind != GGUFValueType.ARRAY:
            return self.items(kind, 1)[0]
        return self.items(self.number("u4"), self.number("u8"))

    def items(self, kind: int, count: int) -> list[Any]:
        if kind == GGUFValueType.STRING:
            return [self.string() for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(
                f"{self.path}: got metadata of type {kind}, expected a GGUF type up to 12."
            )
        return self.array(_SCALARS[GGUFValueType(kind)], count)

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        dims = self.array("u8", self.number("u4"))
        return name, tuple(reversed(dims)), self.number("u4"), self.number("u8")
