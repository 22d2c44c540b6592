"""`SteeringVector`: one direction per layer, and everything needed to use it rightly.

Layer l is the output of 0-based block l (Hugging Face `hidden_states[l+1]`).
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from reptune_jax import ending
from reptune_jax.hub.safetensors_io import save_file
from reptune_jax.model.arch import Arch
from reptune_jax.model.intervene import Probe, Steer, steer_all
from reptune_jax.reading import parse_json, reading, short

_FORMAT = "reptune_jax.vector.2"
_AGAIN = "Run `extract` again."
_BEFORE = "reptune_jax.vector.1"  # position `all` counted the first token, and so did its norms


@dataclasses.dataclass(frozen=True, eq=False)
class SteeringVector:
    """Directions with their provenance; supports `2 * v`, `-v`, `v + w` and `v.at(layers=[15])`.

    A dose of 1.0 is one class-mean difference where `meta["norm"] == "raw"`, and one mean residual
    norm of the base model where it is "unit".
    """

    directions_NxD: np.ndarray  # float32; zero at layers that are not used
    residual_norm_N: np.ndarray  # mean |h| of the base model at the positions that were read
    mean_NxD: np.ndarray  # mean h over both classes, the centre of the contrast
    layers: tuple[int, ...]
    meta: dict[str, Any]

    def __post_init__(self) -> None:
        N, D = np.shape(self.directions_NxD) if np.ndim(self.directions_NxD) == 2 else (0, 0)
        for name, shape in (
            ("directions_NxD", (N, D)),
            ("residual_norm_N", (N,)),
            ("mean_NxD", (N, D)),
        ):
            found = np.asarray(getattr(self, name))
            if found.shape != shape or not N:
                raise ValueError(
                    f"vector.{name}: got shape {list(found.shape)}, expected "
                    f"{list(shape) if N else '[layers, width]'}."
                )
            if not (rows := np.isfinite(found.astype(np.float32)).reshape(N, -1).all(1)).all():
                raise ValueError(
                    f"vector.{name}: got numbers that are not finite at layers "
                    f"{np.flatnonzero(~rows).tolist()}, expected finite ones. Use a smaller dose, "
                    "or extract it again from a model in bfloat16 or float32."
                )
        if wrong := [l for l in self.layers if not 0 <= l < N]:
            raise ValueError(f"vector.layers: got {wrong}, expected layers from 0 to {N - 1}.")

    def __repr__(self) -> str:
        N, D = self.directions_NxD.shape
        known = [a for a in self.meta.get("agreement") or () if a is not None]
        agreement = f"{min(known):.2f} to {max(known):.2f}" if known else "unknown"
        about = (f"{k} {self.meta[k]}" for k in ("method", "position", "pairs") if k in self.meta)
        where = f"{len(self.layers)} of {N} layers, width {D}"
        return (
            f"SteeringVector({self.meta.get('model', 'of no model')!s}, {where}, norm "
            f"{self.meta.get('norm', 'raw')}, {', '.join((*about, f'agreement {agreement}'))})"
        )

    def __mul__(self, scale: float) -> "SteeringVector":
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused by name
            return self._with(self.directions_NxD * np.float32(scale))

    __rmul__ = __mul__

    def __neg__(self) -> "SteeringVector":
        return self * -1.0

    def __add__(self, other: "SteeringVector") -> "SteeringVector":
        self.check_shape(*other.directions_NxD.shape)
        units = [v.meta.get("norm", "raw") for v in (self, other)]
        if units[0] != units[1]:
            raise ValueError(
                f"vector: got doses in {units[0]} and in {units[1]} units, expected the same. "
                "Add `v.unit() + w.unit()`, or two raw vectors."
            )
        layers = tuple(sorted({*self.layers, *other.layers}))
        both = dataclasses.replace(self, layers=layers)
        return both._with(self.directions_NxD + other.directions_NxD)

    def at(self, layers: int | Sequence[int]) -> "SteeringVector":
        """The same vector at this layer, or these layers, only.

        Raises:
          ValueError: a layer that the vector does not have.
        """
        asked: list[Any] = list(layers) if isinstance(layers, Iterable) else [layers]
        absent = [l for l in asked if not isinstance(l, int | np.integer) or l not in self.layers]
        if absent:
            raise ValueError(f"layers: got {absent}, expected some of {list(self.layers)}.")
        kept = tuple(sorted({int(l) for l in asked}))
        keep_N = np.isin(np.arange(len(self.directions_NxD)), kept)
        directions_NxD = np.where(keep_N[:, None], self.directions_NxD, np.float32(0))
        return dataclasses.replace(self._with(directions_NxD), layers=kept)

    def unit(self) -> "SteeringVector":
        """Every layer's direction at length 1; a dose is then relative to the residual norm."""
        norm_N = np.linalg.norm(self.directions_NxD, axis=1, keepdims=True)
        unit = self._with(self.directions_NxD / np.where(norm_N > 0, norm_N, 1))
        return dataclasses.replace(unit, meta={**self.meta, "norm": "unit"})

    def random_like(self, seed: int) -> "SteeringVector":
        """The control: a random direction of the same length at every layer."""
        noise = np.random.default_rng(seed).standard_normal(self.directions_NxD.shape)
        noise /= np.linalg.norm(noise, axis=1, keepdims=True)
        noise *= np.linalg.norm(self.directions_NxD, axis=1, keepdims=True)
        control = self._with(noise.astype(np.float32))
        return dataclasses.replace(control, meta={**self.meta, "method": f"random:{seed}"})

    @property
    def dose_NxD(self) -> np.ndarray:
        """What a dose of 1.0 adds to the residual stream."""
        unit = self.meta.get("norm") == "unit"
        return self.directions_NxD * (self.residual_norm_N[:, None] if unit else 1.0)

    @property
    def digest(self) -> str:
        """Identifies the numbers, whatever the file is called."""
        return hashlib.sha256(np.ascontiguousarray(self.directions_NxD).tobytes()).hexdigest()[:16]

    def steer(self, arch: Arch, B: int, T: int) -> Steer:
        """Adds this vector once, at its layers, at every token of a [B, T] batch."""
        self.check_shape(arch.N, arch.D)
        return steer_all(jnp.asarray(self.dose_NxD), jnp.ones(arch.N), B, T)

    def probe(self, center: bool = False) -> Probe:
        """For cosines with this vector: of the raw residual (the paper), or from the class mean."""
        origin = self.mean_NxD if center else np.zeros_like(self.mean_NxD)
        return Probe(jnp.asarray(self.directions_NxD), jnp.asarray(origin))

    def check_shape(self, N: int, D: int) -> None:
        if self.directions_NxD.shape != (N, D):
            raise ValueError(
                f"vector: got {list(self.directions_NxD.shape)} [layers, width] made on "
                f"{self.meta.get('model', 'another model')}, expected [{N}, {D}]. "
                "Extract it on this model."
            )

    def check_model(self, model_sha: str, name: str) -> None:
        """Raises ValueError where the vector was read from a model with other weights."""
        made_on = self.meta.get("model_sha")
        if made_on and made_on != model_sha:
            raise ValueError(
                f"vector: got one made on {self.meta.get('model')} ({made_on}), expected one made "
                f"on {name} ({model_sha}). Extract it on this model."
            )

    def check_directions(self, name: str) -> None:
        """Raises ValueError where one of its layers has no direction: that would steer nothing."""
        zero = [l for l in self.layers if not np.any(self.directions_NxD[l])]
        if zero or not self.layers:
            raise ValueError(
                f"{name}: got no direction at layers {zero or 'at all'}, expected one at every "
                "layer that the vector names. A dose of 0 is for steering; keep the vector itself."
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file whose metadata says all that is known of the vector.

        Raises:
          ValueError: a zero direction, which `load` would refuse.
        """
        self.check_directions(f"{path}")
        path = Path(path)
        tensors = {
            "directions": np.ascontiguousarray(self.directions_NxD, np.float32),
            "residual_norm": np.ascontiguousarray(self.residual_norm_N, np.float32),
            "mean": np.ascontiguousarray(self.mean_NxD, np.float32),
        }
        about = {
            "format": _FORMAT,
            "layers": json.dumps(self.layers),
            "meta": json.dumps(self.meta),
        }
        with ending.whole(path) as scratch:
            save_file(tensors, scratch, about)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "SteeringVector":
        """Reads what `save` wrote.

        Raises:
          ValueError: not a vector file, a damaged one, one of other norms than today's; numbers
            that are not finite, or a zero direction.
        """
        try:
            with safe_open(path, "numpy") as f:
                about = f.metadata() or {}
                tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        except (SafetensorError, TypeError, ValueError) as e:
            raise ValueError(
                f"{path}: not a readable safetensors file ({e}). Run `extract` again."
            ) from None
        if about.get("format") not in (_FORMAT, _BEFORE):
            raise ValueError(
                f"{path}: got format {about.get('format')!r}, expected {_FORMAT!r}. "
                "This file is not a behavior vector; make one with `python -m reptune_jax.extract`."
            )
        if absent := sorted({"directions", "residual_norm", "mean"} - tensors.keys()):
            raise ValueError(f"{path}: lacks {', '.join(absent)}. Run `extract` again.")
        with reading(path, _AGAIN):
            meta, layers = parse_json(about["meta"], path, _AGAIN), json.loads(about["layers"])
            _check_meta(meta)
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
        with reading(path, _AGAIN):
            vector = cls(*arrays, tuple(layers), meta)
            _check_arrays(*arrays)
        vector.check_directions(f"{path}")
        return vector

    def _with(self, directions_NxD: np.ndarray) -> "SteeringVector":
        return dataclasses.replace(self, directions_NxD=directions_NxD.astype(np.float32))


def _check_meta(meta: dict[str, Any]) -> None:
    """Raises ValueError where what is read of it later is not as `save` writes it."""
    agreement, given = meta.get("agreement"), meta.get("template_arguments", {})
    quality, sign = meta.get("quality", {}), meta.get("sign", {})
    texts = (meta.get(key, "") for key in ("model", "model_sha", "method", "position", "template"))
    fits = {
        "norm": meta.get("norm", "raw") in ("raw", "unit"),
        "agreement": agreement is None or _column(agreement, below=2),
        "quality": isinstance(quality, dict) and all(map(_column, quality.values())),
        "sign": isinstance(sign, dict) and _column(sign.get("share", [])),
        "template_arguments": isinstance(given, dict),
        "model, method or position": all(isinstance(text, str) for text in texts),
    }
    if wrong := [key for key, good in fits.items() if not good]:
        raise ValueError(f"got other values of {wrong[0]} in its meta than `extract` writes.")


def _column(values: Any, below: float = math.inf) -> bool:
    """Whether it is a list of numbers, None where one is unknown."""
    numbers = isinstance(values, list) and all(
        v is None or (type(v) in (int, float) and abs(v) < below) for v in values
    )
    return numbers


def _check_arrays(
    directions_NxD: np.ndarray, residual_norm_N: np.ndarray, mean_NxD: np.ndarray
) -> None:
    """Raises ValueError for other types, and for lengths that no model's residuals have."""
    arrays = directions_NxD, residual_norm_N, mean_NxD
    if any(array.dtype != np.float32 for array in arrays):
        found = ", ".join(array.dtype.name for array in arrays)
        raise ValueError(f"got {found}, expected float32 directions, norms and means.")
    with np.errstate(over="ignore", invalid="ignore"):
        for what, array in (("directions", directions_NxD), ("means", mean_NxD)):
            if array.ndim == 2 and np.isinf(np.square(array).sum(1)).any():
                raise ValueError(f"got {what} whose length float32 cannot hold, expected smaller.")
    if (residual_norm_N <= 0).any():
        raise ValueError("got a residual norm that is not above 0, expected means of lengths.")
