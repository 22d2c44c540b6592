"""`SteeringVector`: one direction per layer, and everything needed to use it rightly.

Layer l is the output of 0-based block l (Hugging Face `hidden_states[l+1]`).
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from reptune_jax.model.arch import Arch
from reptune_jax.model.intervene import Probe, Steer, steer_all

_FORMAT = "reptune_jax.vector.1"


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

    def __mul__(self, scale: float) -> "SteeringVector":
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

    def at(self, layers: Sequence[int]) -> "SteeringVector":
        """The same vector at these layers only.

        Raises:
          ValueError: a layer that the vector does not have.
        """
        absent = sorted(set(layers) - set(self.layers))
        if absent:
            raise ValueError(f"layers: got {absent}, expected some of {list(self.layers)}.")
        keep_N = np.isin(np.arange(len(self.directions_NxD)), list(layers))
        kept = self._with(self.directions_NxD * keep_N[:, None].astype(np.float32))
        return dataclasses.replace(kept, layers=tuple(sorted(layers)))

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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file whose metadata says all that is known of the vector."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
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
        scratch = path.with_name(path.name + ".tmp")
        try:
            save_file(tensors, scratch, metadata=about)
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "SteeringVector":
        """Reads what `save` wrote.

        Raises:
          ValueError: not a vector file, or a damaged one.
        """
        try:
            with safe_open(path, "numpy") as f:
                about = f.metadata() or {}
                tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        except SafetensorError as e:
            raise ValueError(
                f"{path}: not a readable safetensors file ({e}). Run `extract` again."
            ) from None
        if about.get("format") != _FORMAT:
            raise ValueError(
                f"{path}: got format {about.get('format')!r}, expected {_FORMAT!r}. "
                "This file is not a behavior vector; make one with `python -m reptune_jax.extract`."
            )
        if absent := sorted({"directions", "residual_norm", "mean"} - tensors.keys()):
            raise ValueError(f"{path}: lacks {', '.join(absent)}. Run `extract` again.")
        return cls(
            tensors["directions"],
            tensors["residual_norm"],
            tensors["mean"],
            tuple(json.loads(about["layers"])),
            json.loads(about["meta"]),
        )

    def _with(self, directions_NxD: np.ndarray) -> "SteeringVector":
        return dataclasses.replace(self, directions_NxD=directions_NxD.astype(np.float32))
