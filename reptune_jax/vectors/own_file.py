"""The file a `SteeringVector` keeps everything in: `.safetensors` with metadata."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from reptune_jax.hub.safetensors_io import save_file
from reptune_jax.reading import parse_json, reading, short

if TYPE_CHECKING:
    from reptune_jax.vectors.steering_vector import SteeringVector

FORMAT = "reptune_jax.vector.2"
_AGAIN = "Run `extract` again."
_BEFORE = "reptune_jax.vector.1"  # position `all` counted the first token, and so did its norms
_TEXTS = (
    "model", "model_sha", "model_type", "method", "position", "template", "operation", "hook",
    "behavior_sha", "data_sha",
)  # fmt: skip
UNKNOWN = ("residual_norm", "mean", "n_layers")  # in the files of other tools


class Fields(NamedTuple):
    """What a `SteeringVector` is made of, as a file says it."""

    directions_NxD: np.ndarray
    residual_norm_N: np.ndarray
    mean_NxD: np.ndarray
    layers: tuple[int, ...]
    meta: dict[str, Any]


def write(path: Path, vector: "SteeringVector") -> None:
    """Tensors and, as metadata, all that is known of the vector."""
    tensors = {
        "directions": np.ascontiguousarray(vector.directions_NxD, np.float32),
        "residual_norm": np.ascontiguousarray(vector.residual_norm_N, np.float32),
        "mean": np.ascontiguousarray(vector.mean_NxD, np.float32),
    }
    about = {
        "format": FORMAT,
        "layers": json.dumps(vector.layers),
        "meta": json.dumps(vector.meta),
    }
    save_file(tensors, path, about)


def open_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(tensors, metadata) of a safetensors file.

    Raises:
      ValueError: it is none, or of a type that numpy does not have.
    """
    try:
        with safe_open(path, "numpy") as f:
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
            return tensors, f.metadata() or {}
    except (SafetensorError, TypeError, ValueError) as e:
        raise ValueError(
            f"{path}: not a readable safetensors file ({e}). Run `extract` again."
        ) from None


def read(path: Path, tensors: dict[str, np.ndarray], about: dict[str, str]) -> Fields:
    """What `write` wrote.

    Raises:
      ValueError: not a vector file, a damaged one, or one of other norms than today's.
    """
    if about.get("format") not in (FORMAT, _BEFORE):
        raise ValueError(
            f"{path}: got format {about.get('format')!r}, expected {FORMAT!r}. "
            "This file is not a behavior vector; make one with `python -m reptune_jax.extract`."
        )
    if absent := sorted({"directions", "residual_norm", "mean"} - tensors.keys()):
        raise ValueError(f"{path}: lacks {', '.join(absent)}. Run `extract` again.")
    with reading(path, _AGAIN):
        meta, layers = parse_json(about["meta"], path, _AGAIN), json.loads(about["layers"])
        check_meta(meta)
        if not isinstance(layers, list) or any(type(layer) is not int for layer in layers):
            raise ValueError(f"got layers {short(layers)}, expected numbers of layers.")
        if sorted(set(layers)) != layers:
            raise ValueError(f"got layers {short(layers)}, expected each once, in order.")
    if about["format"] == _BEFORE and meta.get("position") == "all":
        raise ValueError(
            f"{path}: got a vector of an earlier version whose norms and directions hold the "
            "first token, many times as long as others, expected one without it. Run "
            "`extract` again."
        )
    arrays = tensors["directions"], tensors["residual_norm"], tensors["mean"]
    return Fields(*arrays, tuple(layers), meta)


def check_meta(meta: dict[str, Any]) -> None:
    """Raises ValueError where what is read of it later is not as `write` writes it."""
    agreement, given = meta.get("agreement"), meta.get("template_arguments", {})
    quality, sign, unknown = meta.get("quality", {}), meta.get("sign", {}), meta.get("unknown", [])
    fits = {
        "norm": meta.get("norm", "raw") in ("raw", "unit"),
        "agreement": agreement is None or _column(agreement, below=2),
        "quality": isinstance(quality, dict) and all(map(_column, quality.values())),
        "sign": isinstance(sign, dict) and _column(sign.get("share", [])),
        "template_arguments": isinstance(given, dict),
        "unknown": isinstance(unknown, list) and all(part in UNKNOWN for part in unknown),
        "model, method or position": all(isinstance(meta.get(key, ""), str) for key in _TEXTS),
    }
    if wrong := [key for key, good in fits.items() if not good]:
        raise ValueError(f"got other values of {wrong[0]} in its meta than `extract` writes.")


def _column(values: Any, below: float = math.inf) -> bool:
    """Whether it is a list of numbers, None where one is unknown."""
    return isinstance(values, list) and all(
        v is None or (type(v) in (int, float) and abs(v) < below) for v in values
    )


def check_arrays(fields: Fields) -> None:
    """Raises ValueError for other types, and for lengths that no model's residuals have."""
    arrays = fields.directions_NxD, fields.residual_norm_N, fields.mean_NxD
    if any(array.dtype != np.float32 for array in arrays):
        found = ", ".join(array.dtype.name for array in arrays)
        raise ValueError(f"got {found}, expected float32 directions, norms and means.")
    with np.errstate(over="ignore", invalid="ignore"):
        for what, array in (("directions", arrays[0]), ("means", arrays[2])):
            if array.ndim == 2 and np.isinf(np.square(array).sum(1)).any():
                raise ValueError(f"got {what} whose length float32 cannot hold, expected smaller.")
    if (fields.residual_norm_N <= 0).any():
        raise ValueError("got a residual norm that is not above 0, expected means of lengths.")
