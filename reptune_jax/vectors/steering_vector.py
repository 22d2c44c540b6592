"""`SteeringVector`: one direction per layer, and everything needed to use it rightly.

Layer l is the output of 0-based block l (Hugging Face `hidden_states[l+1]`).
"""

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from reptune_jax import ending
from reptune_jax.console import note
from reptune_jax.model.arch import Arch
from reptune_jax.model.intervene import Probe, Rows, Steers, steer_all
from reptune_jax.reading import reading
from reptune_jax.vectors import formats, own_file

if TYPE_CHECKING:
    from reptune_jax.lm import Model

# Not said of a sum, unless both say it
MADE_OF = ("behavior", "behavior_sha", "data_sha", "pairs", "agreement", "quality", "sign")


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
        if not isinstance(other, SteeringVector):
            return NotImplemented
        self.check_shape(*other.directions_NxD.shape)
        units = [v.meta.get("norm", "raw") for v in (self, other)]
        if units[0] != units[1]:
            raise ValueError(
                f"vector: got doses in {units[0]} and in {units[1]} units, expected the same. "
                "Add `v.unit() + w.unit()`, or two raw vectors."
            )
        layers = tuple(sorted({*self.layers, *other.layers}))
        about = {k: v for k, v in self.meta.items() if k not in MADE_OF or other.meta.get(k) == v}
        both = dataclasses.replace(self, layers=layers, meta=about)
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
        """Every layer's direction at length 1; a dose is then relative to the residual norm.

        Raises:
          ValueError: the norms are unknown, as those of most files of other tools are.
        """
        self._need("residual_norm")
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

    def steer(self, arch: Arch, rows: Rows) -> Steers:
        """Adds this vector once, at its layers, at every token of the batch."""
        self.check_shape(arch.N, arch.D)
        self.note_everywhere()
        return (steer_all(jnp.asarray(self.dose_NxD), jnp.ones(arch.N), *rows.shape),)

    def note_everywhere(self) -> None:
        """Says so where it is added at all of several layers, as it is when just extracted."""
        if 1 < len(self.layers) == len(self.directions_NxD):
            note(
                f"steer: the vector has all {len(self.layers)} layers, and its full dose is added "
                f"at each of them. One is usual: vec.at(layers=[{len(self.layers) // 2}])."
            )

    def probe(self, center: bool = False) -> Probe:
        """For cosines with this vector: of the raw residual (the paper), or from the class mean."""
        if center:
            self._need("mean")
        origin = self.mean_NxD if center else np.zeros_like(self.mean_NxD)
        return Probe(jnp.asarray(self.directions_NxD), jnp.asarray(origin))

    def _need(self, part: str) -> None:
        if part in self.meta.get("unknown", ()):
            raise ValueError(
                f"vector: got one whose {part} is unknown, as it was read from another tool's "
                "file, expected it known. Use the vector raw, or extract it on the model."
            )

    def check_shape(self, N: int, D: int) -> None:
        """Raises ValueError where the vector is not of a model of N layers and width D."""
        if self.directions_NxD.shape != (N, D):
            padded = "n_layers" in self.meta.get("unknown", ()) and len(self.directions_NxD) < N
            if padded and self.directions_NxD.shape[1] == D:
                raise ValueError(
                    f"vector: got one from a file that does not say how many layers its model has, "
                    f"expected {N}. Load it with n_layers={N}."
                )
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

    def note_model(self, model: "Model") -> None:
        """Says so where `check_model` would refuse: in the library the same shape is enough."""
        made_on = self.meta.get("model_sha")
        if made_on and made_on != model.sha:
            note(
                f"vector: made on {self.meta.get('model')} ({made_on}), used on {model.name} "
                f"({model.sha}), which has other weights: there it may mean nothing. Extract it on "
                "this model, unless the two differ in how they are stored only."
            )

    def check_directions(self, name: str) -> None:
        """Raises ValueError where one of its layers has no direction: that would steer nothing."""
        zero = [l for l in self.layers if not np.any(self.directions_NxD[l])]
        if zero or not self.layers:
            raise ValueError(
                f"{name}: got no direction at layers {zero or 'at all'}, expected one at every "
                "layer that the vector names. A dose of 0 is for steering; keep the vector itself."
            )

    def save(self, path: str | os.PathLike[str], format: str = "") -> None:
        """Writes the file of one of `formats.FORMATS`; without `format`, as the name's end says.

        `.safetensors` holds all that is known of the vector. Others hold what a dose of 1 adds:
        `.gguf` for llama.cpp and repeng, `.svec`, `.pt` for lm-eval, `.npz` a tensor a layer.

        Raises:
          ValueError: a zero direction, which `load` would refuse; an unknown ending; in a `.gguf`
            layer 0, or a vector that does not say its model's type.
        """
        self.check_directions(f"{path}")
        path = Path(path)
        chosen = formats.choose(path, format)
        with ending.whole(path) as scratch:
            chosen.write(scratch, self)

    @classmethod
    def load(cls, path: str | os.PathLike[str], n_layers: int | None = None) -> "SteeringVector":
        """Reads a vector file of any of `formats.FORMATS`.

        Those of other tools do not say how many layers their model has: `n_layers` does.

        Raises:
          ValueError: not a vector file, a damaged one, one of other norms than today's; numbers
            that are not finite, or a zero direction; layers that the model does not have.
        """
        path = Path(path)
        fields = formats.read(path, n_layers)
        with reading(path, "Run `extract` again."):
            vector = cls(*fields)
            own_file.check_arrays(fields)
        vector.check_directions(f"{path}")
        return vector

    def _with(self, directions_NxD: np.ndarray) -> "SteeringVector":
        return dataclasses.replace(self, directions_NxD=directions_NxD.astype(np.float32))
