"""Safetensors in and out: lazy reading of one or many shards, atomic writing with an index."""

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors import numpy as safetensors_numpy

from reptune_jax.console import note, watched
from reptune_jax.reading import parse_json, reading

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SHARDS = "model-*-of-*.safetensors"
MAX_SHARD_BYTES = 5e9

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


@dataclasses.dataclass(frozen=True)
class TensorHandle:
    """A tensor that stays on disk until `read()`; `dtype` is what `read()` returns."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], np.ndarray] = dataclasses.field(repr=False)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_tensors(folder: Path) -> dict[str, TensorHandle]:
    """Name -> handle of every tensor in an HF folder; reads headers only.

    `model.safetensors` comes before an index that does not name it, as in transformers. A tensor
    comes from the file that the index names, whatever other files hold.

    Raises:
      ValueError: no safetensors, a shard missing, outside the folder, truncated or foreign.
    """
    weight_map = _weight_map(folder) if (folder / INDEX).exists() else {}
    if (folder / SINGLE).exists() and SINGLE not in weight_map.values():
        if weight_map or (stale := sorted(p.name for p in folder.glob(_SHARDS))):
            other = INDEX if weight_map else stale[0]
            note(
                f"{folder}: holds {SINGLE} and {other}, two sources of the weights; reading "
                f"{SINGLE}, as transformers does. Delete the one that is old."
            )
        return read_file(folder / SINGLE)[0]
    if weight_map:
        return _read_sharded(folder, weight_map)
    files = sorted(p for p in folder.glob("*.safetensors") if not p.name.startswith("adapter_"))
    if not files:
        raise ValueError(f"{folder}: found no *.safetensors weights, {_instead(folder)}")
    tensors: dict[str, TensorHandle] = {}
    for path in files:
        shard, _ = read_file(path)
        if both := sorted(tensors.keys() & shard.keys()):
            raise ValueError(
                f"{folder}: {both[0]} is in {path.name} and in another file, and there is no "
                f"{INDEX}. Keep the files of one model only."
            )
        tensors.update(shard)
    return tensors


def _instead(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir())
    if any(name.startswith("adapter_") for name in names):
        return "only an adapter. Name the base model, or merge the adapter into it first."
    if pickles := [name for name in names if name.endswith((".bin", ".pt", ".pth"))]:
        return (
            f"only {pickles[0]}. Pickles are not opened, because they can run code: convert it to "
            "safetensors (transformers: model.save_pretrained)."
        )
    return "expected model.safetensors or shards with an index. Download the weights too."


def _weight_map(folder: Path) -> dict[str, str]:
    """Name -> file, as the index says; every file is one of the folder's own."""
    weight_map = parse_json((folder / INDEX).read_bytes(), folder / INDEX).get("weight_map")
    fits = isinstance(weight_map, dict) and weight_map
    if not fits or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(
            f"{folder / INDEX}: no readable weight_map, expected names of tensors and their files. "
            "Download it again."
        )
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if Path(shard).name != shard or "\\" in shard or shard == "..":
            raise ValueError(
                f"{folder / INDEX}: got shard {shard!r}, expected a file name inside the folder. "
                "Do not trust this checkpoint."
            )
    return weight_map


def _read_sharded(folder: Path, weight_map: Mapping[str, str]) -> dict[str, TensorHandle]:
    shards: dict[str, dict[str, TensorHandle]] = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).exists():
            raise ValueError(f"{folder / INDEX}: names {shard}, which is missing. Download it.")
        shards[shard] = read_file(folder / shard)[0]
    holders: dict[str, list[str]] = {}
    for shard, found in shards.items():
        for name in found:
            holders.setdefault(name, []).append(shard)
    wrong = sorted(name for name, shard in weight_map.items() if name not in shards[shard])
    if wrong:
        elsewhere = f" but in {holders[wrong[0]][0]}" if wrong[0] in holders else ""
        raise ValueError(
            f"{folder / INDEX}: {wrong[0]} is not in {weight_map[wrong[0]]}{elsewhere} "
            f"({len(wrong)} such). Index and shards belong to different models."
        )
    twice = sorted(name for name in weight_map if len(holders[name]) > 1)
    if twice:
        name, others = twice[0], [s for s in holders[twice[0]] if s != weight_map[twice[0]]]
        note(
            f"{folder}: {name} is in {weight_map[name]} and in {', '.join(others)} "
            f"({len(twice)} such tensors); reading that in {weight_map[name]}, which {INDEX} names."
        )
    if unnamed := sorted(holders.keys() - weight_map.keys()):
        note(
            f"{folder}: {unnamed[0]} is in {holders[unnamed[0]][0]} ({len(unnamed)} such tensors), "
            f"but {INDEX} does not name it; leaving it out."
        )
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def read_file(path: Path) -> tuple[dict[str, TensorHandle], dict[str, str]]:
    """(name -> handle, metadata) of one file; reads its header only."""
    try:
        with safe_open(path, framework="numpy"):  # checks the header against the file's size
            pass
    except SafetensorError as error:
        raise ValueError(
            f"{path}: got {path.stat().st_size:,} bytes, expected {_expected_bytes(path)} "
            f"({error}). The file is truncated or no safetensors file; download it again."
        ) from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = parse_json(file.read(length), path)
    metadata = entries.pop("__metadata__", None) or {}
    with reading(path):
        tensors = {name: _handle(path, name, entry, 8 + length) for name, entry in entries.items()}
    return tensors, metadata


def _expected_bytes(path: Path) -> str:
    raw = path.read_bytes() if path.stat().st_size < 8 else path.open("rb").read(8)
    length = int.from_bytes(raw, "little")
    if len(raw) < 8 or length > min(path.stat().st_size, 100_000_000):
        return "a whole header first"
    with path.open("rb") as file:
        file.seek(8)
        try:
            entries = json.loads(file.read(length))
            ends = [e["data_offsets"][1] for k, e in entries.items() if k != "__metadata__"]
            return f"{8 + length + max(ends, default=0):,}"
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return "a JSON header"


def _handle(path: Path, name: str, entry: Mapping[str, Any], base: int) -> TensorHandle:
    if entry["dtype"] not in _DTYPES:
        raise ValueError(
            f"{path}: {name} has dtype {entry['dtype']}, expected one of {', '.join(_DTYPES)}. "
            "Quantized checkpoints are not read: use the unquantized model, or a GGUF file."
        )
    shape, dtype = tuple(entry["shape"]), _DTYPES[entry["dtype"]]
    start, stop = entry["data_offsets"]

    def read() -> np.ndarray:
        # Not memory-mapped: pages of a map stay with the process until the whole file is in it.
        raw = np.fromfile(path, np.uint8, stop - start, offset=base + start)
        return raw.view(dtype).reshape(shape)

    return TensorHandle(shape, dtype, read)


def finite(tensor: np.ndarray) -> bool:
    """Whether no number is NaN or infinite."""
    if tensor.dtype == ml_dtypes.bfloat16:  # numpy has no fast way: look at the exponent's bits
        return not bool(((tensor.view(np.uint16) & 0x7F80) == 0x7F80).any())
    return not np.issubdtype(tensor.dtype, np.floating) or bool(np.isfinite(tensor).all())


def check_written(name: str, array: np.ndarray) -> None:
    """Raises ValueError for what a reader would refuse, such as numbers beyond float16's 65,504."""
    if not finite(array):
        raise ValueError(
            f"{name}: got numbers that are not finite in {array.dtype.name}, expected finite ones: "
            "nobody could load them. Write bfloat16 or float32 where float16 is too small for "
            "them; else the model is damaged, or its training diverged."
        )


def save_file(tensors: Mapping[str, np.ndarray], path: Path, metadata: dict[str, str]) -> None:
    """A file of a mode that follows the umask: the library's own is for its user alone."""
    path.touch()
    mode = path.stat().st_mode
    try:
        safetensors_numpy.save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as e:  # which knows neither the file nor the machine's number of it
        number = re.search(r"os error (\d+)", str(e))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    path.chmod(mode)


def save_tensors(
    folder: Path | str,
    tensors: Mapping[str, np.ndarray] | Iterable[tuple[str, np.ndarray]],
    max_shard_bytes: float = MAX_SHARD_BYTES,
) -> list[Path]:
    """Writes `model.safetensors`, or shards and an index; returns the files, index last.

    Pairs are consumed one at a time, so at most one shard is in memory. Files appear under their
    names only when all of them are complete; weights of an earlier save are removed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
    temporary: list[Path] = []
    names: list[list[str]] = []
    total = 0
    try:
        for shard in watched(_shards(pairs, max_shard_bytes), "writing weights"):
            temporary.append(folder / f".tmp-{os.getpid()}-{len(temporary):05d}.safetensors")
            save_file(shard, temporary[-1], {"format": "pt"})
            names.append(list(shard))
            total += sum(array.nbytes for array in shard.values())
        _reject_duplicates(names)
        return _publish(folder, temporary, names, total)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


def stream_tensors(
    folder: Path,
    specs: Mapping[str, TensorHandle],
    pairs: Iterable[tuple[str, np.ndarray]],
    progress: Callable[[int], Any],
) -> list[Path]:
    """`save_tensors` for arrays whose shapes are known before: one of them in memory at a time.

    `pairs` come in the order of `specs`, whose `read` is not used. Data must be aligned to its
    type, so larger types come first. `progress` is told of bytes.
    """
    shards = _plan(specs, MAX_SHARD_BYTES)
    temporary: list[Path] = []
    source = iter(pairs)
    for names in shards:
        temporary.append(folder / f".tmp-{os.getpid()}-{len(temporary):05d}.safetensors")
        with temporary[-1].open("wb") as file:
            file.write(_header({name: specs[name] for name in names}))
            for expected in names:
                name, array = next(source)
                assert (name, array.shape) == (expected, specs[name].shape), (name, expected)
                assert array.dtype == specs[name].dtype, (name, array.dtype)
                check_written(name, array)
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
                progress(array.nbytes)
                del array  # it may be a view of a leaf, and the next one may be read next
    return _publish(folder, temporary, shards, sum(s.nbytes for s in specs.values()))


def _plan(specs: Mapping[str, TensorHandle], limit: float) -> list[list[str]]:
    """Names in shards of at most `limit` bytes, in order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.nbytes
    return shards


def _header(specs: Mapping[str, TensorHandle]) -> bytes:
    kinds = {dtype: kind for kind, dtype in _DTYPES.items()}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, spec in specs.items():
        entries[name] = {
            "dtype": kinds[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [at, at + spec.nbytes],
        }
        at += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _shards(
    pairs: Iterable[tuple[str, np.ndarray]], limit: float
) -> Iterator[dict[str, np.ndarray]]:
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, tensor in pairs:
        # a transposed view would be written in memory order, not in its own
        array = np.ascontiguousarray(tensor).reshape(np.shape(tensor))
        check_written(name, array)
        if shard and size + array.nbytes > limit:
            yield shard
            shard, size = {}, 0
        if name in shard:
            raise ValueError(f"{name}: given twice, expected once.")
        shard[name] = array
        size += array.nbytes
    yield shard


def _reject_duplicates(names: list[list[str]]) -> None:
    flat = [name for shard in names for name in shard]
    if len(flat) != len(set(flat)):
        twice = next(name for name in flat if flat.count(name) > 1)
        raise ValueError(f"{twice}: given twice, expected once.")


def _publish(folder: Path, temporary: list[Path], names: list[list[str]], total: int) -> list[Path]:
    count = len(temporary)
    final = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    final = [SINGLE] if count == 1 else final
    for source, target in zip(temporary, final, strict=True):
        os.replace(source, folder / target)
    written = [folder / name for name in final]
    if count > 1:
        weight_map = {
            name: file for file, shard in zip(final, names, strict=True) for name in shard
        }
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        sibling = folder / f".tmp-{os.getpid()}-index.json"
        sibling.write_text(json.dumps(index, indent=2) + "\n")
        os.replace(sibling, folder / INDEX)
        written.append(folder / INDEX)
    for stale in {folder / INDEX, folder / SINGLE, *folder.glob(_SHARDS)}:
        if stale not in written:
            stale.unlink(missing_ok=True)
    return written
