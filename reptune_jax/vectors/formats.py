"""Vector files of other tools: one reader and one writer each, in one table, `FORMATS`.

All but our own hold, for each layer, what a dose of 1 adds to the output of that 0-based block.
Where a file can hold a text beside its tensors, ours goes there, so that the way back loses the
class means only. What is unknown after reading is named in `meta["unknown"]`.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType

from reptune_jax.hub.gguf_header import read_header
from reptune_jax.hub.safetensors_io import save_file
from reptune_jax.hub.torch_file import read_torch, write_torch
from reptune_jax.reading import parse_json, reading, short
from reptune_jax.vectors import own_file
from reptune_jax.vectors.own_file import Fields

if TYPE_CHECKING:
    from reptune_jax.vectors.steering_vector import SteeringVector

_ARCH = "controlvector"
_OURS = "reptune"  # where our own text stands in files of others
_AGAIN = "Write the file again with the tool that made it."
_LAYER = re.compile(
    r"(?:[A-Za-z_./ -]*(?:[_./ -]|layer))?(\d{1,5})"
)  # 15, layer_15, model.layers.15
_FILE_LAYER = re.compile(r"(?:^|_)layer_?(\d{1,5})(?![0-9])")  # vec_layer_13_Llama-2.pt
_HOOK = re.compile(r"(?:.*\.)?(?:layers|h)\.(\d{1,5})")
_PLAIN = (None, "pt", "np")  # what safetensors files say who are no format of their own
_PERSONA = re.compile(r".*_(response|prompt)_(avg|last)_diff")


class Rows(NamedTuple):
    """Layer -> [D] that a dose of 1 adds to its output, and what the file says beside."""

    rows: dict[int, np.ndarray]
    about: Mapping[str, Any] = MappingProxyType({})  # n_layers, residual_norm, meta


class Format(NamedTuple):
    """How vectors are kept by one kind of tool."""

    suffixes: tuple[str, ...]
    about: str
    read: Callable[[Path, int | None], Rows | Fields]
    write: Callable[[Path, "SteeringVector"], None]


def choose(path: Path, format: str = "") -> Format:
    """The format of that name, or the one that a file's ending stands for.

    Raises:
      ValueError: an unknown name, an ending that stands for none, or one of another format.
    """
    if format and format not in FORMATS:
        raise ValueError(f"format: got {format!r}, expected one of {', '.join(FORMATS)}.")
    fits = [f for f in FORMATS.values() if path.suffix in f.suffixes]
    found = FORMATS[format] if format else next(iter(fits), None)
    if found is None or path.suffix not in found.suffixes:
        endings = found.suffixes if found else (s for f in FORMATS.values() for s in f.suffixes)
        raise ValueError(
            f"{path}: got the ending {path.suffix!r}, expected {', '.join(dict.fromkeys(endings))}"
            f"{f' of {format!r}' if format else ''}. The ending says which format is meant."
        )
    return found


def read(path: Path, n_layers: int | None = None) -> Fields:
    """Reads a file of any format; `n_layers` of the model, where the file does not say.

    Without it a vector has no more layers than its last direction needs.

    Raises:
      ValueError: damaged, no vector, or of layers that a model of `n_layers` does not have.
    """
    fits = [f for f in FORMATS.values() if path.suffix in f.suffixes]
    found = (fits[0] if fits else FORMATS["reptune"]).read(path, n_layers)
    if isinstance(found, Rows):
        with reading(path, _AGAIN):
            found = _fields(found, n_layers)
    elif n_layers not in (None, len(found.directions_NxD)):
        raise ValueError(
            f"{path}: got a vector of {len(found.directions_NxD)} layers, expected {n_layers}. "
            "It is of another model."
        )
    return found


def _fields(found: Rows, n_layers: int | None) -> Fields:
    """Layers with a direction, in the shape of a vector of ours."""
    with np.errstate(over="ignore"):  # what overflows is refused by name
        rows = {l: np.asarray(row, np.float32) for l, row in sorted(found.rows.items())}
    shapes = {l: row.shape for l, row in rows.items()}
    if not rows or len(set(shapes.values())) > 1 or len(next(iter(shapes.values()))) != 1:
        raise ValueError(f"got directions of shapes {short(shapes)}, expected [D] at each layer.")
    meta, said = dict(found.about.get("meta", {})), found.about.get("n_layers")
    own_file.check_meta(meta)
    N = n_layers or said or max(rows) + 1
    if type(N) is not int or not max(rows) < N < 2**16 or said not in (None, N):
        raise ValueError(
            f"got directions up to layer {max(rows)}{f' of {said}' if said else ''}, expected a "
            f"model of {short(N)} layers, counted from 0. It is of another model."
        )
    directions_NxD = np.zeros((N, *shapes[min(rows)]), np.float32)
    for l, row in rows.items():
        directions_NxD[l] = row
    norm_N = np.asarray(found.about.get("residual_norm", np.ones(N)), np.float32)
    known = found.about.keys() | ({"n_layers"} if n_layers else set())
    unknown = [part for part in own_file.UNKNOWN if part not in known]
    meta |= {"norm": "raw", "operation": "add", "layer_base": 0, "unknown": unknown}
    layers = tuple(l for l in rows if directions_NxD[l].any())
    return Fields(directions_NxD, norm_N, np.zeros_like(directions_NxD), layers, meta)


def _rows_of(vector: "SteeringVector") -> dict[int, np.ndarray]:
    return {l: np.ascontiguousarray(vector.dose_NxD[l], np.float32) for l in vector.layers}


def _text_of(vector: "SteeringVector") -> str:
    """What is known of a vector beside its directions."""
    about: dict[str, Any] = {"n_layers": len(vector.directions_NxD), "meta": vector.meta}
    if "residual_norm" not in vector.meta.get("unknown", ()):
        about["residual_norm"] = [float(n) for n in vector.residual_norm_N]
    return json.dumps(about)


def _named(tensors: Mapping[Any, Any], about: Mapping[str, Any]) -> Rows:
    """Tensors by the names of their layers."""
    rows: dict[int, np.ndarray] = {}
    for name, tensor in tensors.items():
        match = _LAYER.fullmatch(str(name))
        if not match or not isinstance(tensor, np.ndarray) or int(match[1]) in rows:
            raise ValueError(
                f"got {short(name)}, expected a tensor for each layer, once, named such as "
                "layer_15 or 15."
            )
        rows[int(match[1])] = tensor.reshape(-1) if tensor.shape[:-1] == (1,) else tensor
    return Rows(rows, dict(about))


# ---------------------------------------------------------------- GGUF control vectors


def _read_gguf(path: Path, _: int | None) -> Rows:
    with reading(path, _AGAIN):
        header = read_header(path)
        if (arch := header.metadata.get("general.architecture")) != _ARCH:
            raise ValueError(
                f"{path}: got architecture {arch!r}, expected {_ARCH!r}. This is a GGUF file of "
                "something else, such as a model."
            )
        about = parse_json(header.metadata.get(f"{_ARCH}.{_OURS}", "{}"), path, _AGAIN)
        if not about:
            said = {"model_type": f"{_ARCH}.model_hint", "method": f"{_ARCH}.method"}
            meta = {k: header.metadata[name] for k, name in said.items() if name in header.metadata}
            about = {"meta": meta}
        tensors = {}
        for name, info in header.tensors.items():
            if info.kind != GGMLQuantizationType.F32 or not name.startswith("direction."):
                raise ValueError(f"got {name} ({info.kind.name}), expected direction.N (F32).")
            raw = header.data[info.start : info.start + info.n_bytes]
            tensors[name] = np.array(raw).view("<f4").reshape(info.shape)
        return _named(tensors, about)


def _write_gguf(path: Path, vector: "SteeringVector") -> None:
    if 0 in vector.layers:
        raise ValueError(
            "vector: got a direction at layer 0, expected layers from 1: llama.cpp cannot steer "
            "the first block. Leave it out: vector.at(layers=[...]), or --layers=1-."
        )
    if not (hint := vector.meta.get("model_type")):
        raise ValueError(
            "vector: got one that does not say its model's type, which readers ask for, "
            "expected one, such as llama. Set meta['model_type'], or --model-hint=llama."
        )
    writer = GGUFWriter(path, _ARCH)
    writer.add_string(f"{_ARCH}.model_hint", hint)
    writer.add_uint32(f"{_ARCH}.layer_count", len(vector.layers))
    writer.add_string(f"{_ARCH}.hook", "direction.N is added to the output of 0-based block N")
    writer.add_string(f"{_ARCH}.{_OURS}", _text_of(vector))
    for layer, row_D in _rows_of(vector).items():
        writer.add_tensor(f"direction.{layer}", row_D)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


# ---------------------------------------------------------------- .svec


def _read_svec(path: Path, _: int | None) -> Rows:
    with reading(path, _AGAIN):
        found = parse_json(path.read_bytes(), path, _AGAIN)
        directions = {k: np.asarray(v, np.float32) for k, v in found["directions"].items()}
        about = found.get(_OURS) or {"meta": {"model_type": found["model_type"]}}
        return _named(directions, about)


def _write_svec(path: Path, vector: "SteeringVector") -> None:
    rows = _rows_of(vector)
    found = {
        "model_type": vector.meta.get("model_type", "unknown"),
        "directions": {str(l): [float(x) for x in row_D] for l, row_D in rows.items()},
        "explained_variances": {str(l): 0.0 for l in rows},  # its first reader asks for them
        _OURS: json.loads(_text_of(vector)),
    }
    path.write_text(json.dumps(found), encoding="utf-8")


# ---------------------------------------------------------------- torch files


def _read_torch(path: Path, n_layers: int | None) -> Rows:
    found = read_torch(path)
    with reading(path, _AGAIN):
        if isinstance(found, np.ndarray):
            return _unnamed(path, found, n_layers)
        if not isinstance(found, dict):
            raise ValueError(f"got a {type(found).__name__}, expected a tensor or a dict of them.")
        if all(isinstance(value, dict) for value in found.values()):
            return Rows(dict(_steered(name, spec) for name, spec in found.items()))
        return _named(found, {})


def _steered(name: Any, spec: Mapping[str, Any]) -> tuple[int, np.ndarray]:
    """An entry of the file of lm-eval's model `steered`."""
    match = _HOOK.fullmatch(str(name))
    others = {k: spec.get(k) for k in ("bias", "head_index") if spec.get(k) is not None}
    if not match or spec.get("action") != "add" or others:
        raise ValueError(
            f"got {spec.get('action')!r} at {short(name)}{f' with {others}' if others else ''}, "
            "expected 'add' at layers.N, without bias or head. Other interventions are no vector."
        )
    vector_D = np.asarray(spec["steering_vector"], np.float32).reshape(-1)
    return int(match[1]), vector_D * np.float32(spec.get("steering_coefficient", 1.0))


def _unnamed(path: Path, tensor: np.ndarray, n_layers: int | None) -> Rows:
    """One tensor: a layer that the file's name says, or all layers."""
    match = _FILE_LAYER.search(path.stem)
    if match and (tensor.ndim == 1 or tensor.shape[:-1] == (1,)):
        return Rows({int(match[1]): tensor.reshape(-1)})
    if tensor.ndim == 2:
        blocks = len(tensor) - 1 if _PERSONA.fullmatch(path.stem) else n_layers
        if blocks and len(tensor) - blocks in (0, 1):  # with the embeddings as row 0, or without
            return Rows(dict(enumerate(tensor[len(tensor) - blocks :])), {"n_layers": blocks})
    raise ValueError(
        f"got a tensor {list(tensor.shape)} that does not say its layers, expected [D] in a file "
        "named such as layer_15.pt, or [layers, D] or [layers + 1, D] (hidden states) and the "
        "model's number of layers. Say it: n_layers=, or --model or --n-layers."
    )


def _write_torch(path: Path, vector: "SteeringVector") -> None:
    place = "h" if vector.meta.get("model_type") == "gpt2" else "layers"
    add = {"steering_coefficient": 1.0, "action": "add", "bias": None, "head_index": None}
    rows = _rows_of(vector).items()
    write_torch(path, {f"{place}.{l}": {"steering_vector": row_D, **add} for l, row_D in rows})


# ---------------------------------------------------------------- plain tensors


def _read_safetensors(path: Path, _: int | None) -> Rows | Fields:
    tensors, about = own_file.open_tensors(path)
    if tensors and all(map(_LAYER.fullmatch, tensors)) and about.get("format") in _PLAIN:
        with reading(path, _AGAIN):
            return _named(tensors, parse_json(about.get(_OURS, "{}"), path, _AGAIN))
    return own_file.read(path, tensors, about)


def _write_layers(path: Path, vector: "SteeringVector") -> None:
    rows = {f"layer_{l}": row_D for l, row_D in _rows_of(vector).items()}
    if path.name.removesuffix(".tmp").endswith(".npz"):
        with path.open("wb") as file:
            np.savez(file, allow_pickle=False, **{_OURS: np.array(_text_of(vector)), **rows})
    else:
        save_file(rows, path, {_OURS: _text_of(vector)})


def _read_npz(path: Path, _: int | None) -> Rows:
    with path.open("rb") as file, reading(path, _AGAIN):
        try:
            found = np.load(file, allow_pickle=False)
            tensors = {name: found[name] for name in found.files}
        except ValueError as e:
            if "pickle" in str(e):  # numpy advises to load it nevertheless
                raise ValueError("holds pickled objects, expected arrays of numbers.") from None
            raise
        about = parse_json(str(tensors.pop(_OURS, "{}")), path, _AGAIN)
        return _named(tensors, about)


FORMATS = {
    "reptune": Format((".safetensors",), "all there is to know", _read_safetensors, own_file.write),
    "gguf": Format((".gguf",), "control vector: llama.cpp, repeng", _read_gguf, _write_gguf),
    "svec": Format((".svec",), "activation-steering, AISteer360", _read_svec, _write_svec),
    "steered": Format((".pt", ".pth"), "lm-eval --model steered", _read_torch, _write_torch),
    "layers": Format((".npz", ".safetensors"), "a tensor a layer", _read_npz, _write_layers),
}
