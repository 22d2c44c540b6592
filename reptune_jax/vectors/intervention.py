"""What is done with a vector, where, and when: more than adding it at every token.

`Intervention` is a SteeringVector with an operation, a rule for tokens and perhaps a condition;
`one + other` does both. docs/steering.md says what each means, once.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Union

import jax.numpy as jnp
import numpy as np

from reptune_jax.model.arch import Arch
from reptune_jax.model.intervene import OPERATIONS, Rows, Steer, Steers, span
from reptune_jax.vectors.steering_vector import SteeringVector

if TYPE_CHECKING:
    from reptune_jax.lm import Model


@dataclasses.dataclass(frozen=True, eq=False)
class When:
    """Only rows whose prompt is about something: cosine with `vector` at `layer` above a threshold.

    The cosine is the mean over the prompt's tokens but the first, of the model where nothing is
    done to it (after CAST, arXiv 2409.05907). For "below", take `-vector` and minus the threshold.
    """

    vector: SteeringVector
    layer: int
    above: float

    def __post_init__(self) -> None:
        if self.layer not in self.vector.layers:
            raise ValueError(
                f"when.layer: got {self.layer}, expected one of the condition's vector: "
                f"{list(self.vector.layers)}."
            )
        if not -1 <= self.above <= 1:
            raise ValueError(f"when.above: got {self.above!r}, expected a cosine from -1 to 1.")

    def rows(self, rows: Rows) -> Any:
        """Which rows it is true of, bool [B]."""
        cosine_BxT = rows.cosine(self.vector.at(self.layer).probe())[self.layer]
        weight_BxT = rows.prompt_BxT
        return (cosine_BxT * weight_BxT).sum(1) / weight_BxT.sum(1) > self.above


@dataclasses.dataclass(frozen=True, eq=False)
class Intervention:
    """One thing that is done to the residual stream; `steer=` takes it.

    `dose` is for all of the vector's layers, or a mapping from layers to doses:
    add      h + dose v
    ablate   h less `dose` times its component along v; 1 removes it
    clamp    that component set to dose |v|
    rescale  as add, then the length that h had
    rotate   h turned toward v by `dose` degrees at most, away where negative; its length stays
    `tokens` is all, prompt, generated, answer, last:N or generated:FIRST-STOP.

    Raises:
      ValueError: no such operation, rule or layer; or a dose that is not finite.
    """

    vector: SteeringVector
    dose: float | Mapping[int, float] = 1.0
    operation: str = "add"
    tokens: str = "all"
    when: When | None = None

    def __post_init__(self) -> None:
        if self.operation not in OPERATIONS:
            raise ValueError(
                f"operation: got {self.operation!r}, expected one of {', '.join(OPERATIONS)}."
            )
        span(self.tokens)
        if absent := [l for l in self.doses if l not in self.vector.layers]:
            raise ValueError(
                f"dose: got layers {absent}, expected some of {list(self.vector.layers)}."
            )
        if not all(map(math.isfinite, self.doses.values())):
            raise ValueError(f"dose: got {self.dose!r}, expected finite numbers.")

    @property
    def doses(self) -> dict[int, float]:
        """By layer."""
        if isinstance(self.dose, Mapping):
            return {int(l): float(dose) for l, dose in self.dose.items()}
        return dict.fromkeys(self.vector.layers, float(self.dose))

    @property
    def shares_prompt(self) -> bool:
        """Whether all of a prompt's tokens but the last are steered alike, in every row."""
        return self.when is None and not self.tokens.startswith("last:")

    def __add__(self, other: Union[SteeringVector, "Intervention", "Interventions"]) -> Any:
        return Interventions((self,)) + other

    def __radd__(self, vector: SteeringVector) -> "Interventions":
        return Interventions((Intervention(vector), self))

    def note_model(self, model: "Model") -> None:
        """As that of its vectors."""
        for vector in (self.vector, *([self.when.vector] if self.when else [])):
            vector.note_model(model)

    def steer(self, arch: Arch, rows: Rows) -> Steers:
        """As data, for a batch. Operations that keep lengths share a program, the others one."""
        self.vector.check_shape(arch.N, arch.D)
        if not isinstance(self.dose, Mapping) and self.operation in ("add", "rescale"):
            self.vector.note_everywhere()
        dose_NxB = np.zeros((arch.N, rows.shape[0]), np.float32)
        on_NxB = np.zeros_like(dose_NxB)
        dose_NxB[list(self.doses)], on_NxB[list(self.doses)] = (
            np.array([*self.doses.values()], np.float32)[:, None],
            1,
        )
        return (self.by_rows(arch, rows, dose_NxB, on_NxB),)

    def by_rows(self, arch: Arch, rows: Rows, dose_NxB: np.ndarray, on_NxB: np.ndarray) -> Steer:
        """With a dose of its own for each row at each layer, where it is on (1); else nothing."""
        first, stop = span(self.tokens)
        token_BxT = (rows.place_BxT >= first) & (rows.place_BxT < stop)
        if self.when is not None:
            self.when.vector.check_shape(arch.N, arch.D)
            token_BxT = token_BxT & self.when.rows(rows)[:, None]
        none_NxB = np.zeros_like(on_NxB)
        add, ablate, turn, keep = {
            "add": (dose_NxB, none_NxB, none_NxB, none_NxB),
            "ablate": (none_NxB, dose_NxB, none_NxB, none_NxB),
            "clamp": (dose_NxB, on_NxB, none_NxB, none_NxB),
            "rescale": (dose_NxB, none_NxB, none_NxB, on_NxB),
            "rotate": (none_NxB, none_NxB, np.deg2rad(dose_NxB), none_NxB),
        }[self.operation]
        keeps_length = self.operation in ("rescale", "rotate")
        return Steer(
            jnp.asarray(self.vector.dose_NxD),
            jnp.asarray(add),
            jnp.asarray(ablate),
            jnp.asarray(token_BxT, jnp.float32),
            jnp.asarray(turn) if keeps_length else None,
            jnp.asarray(keep) if keeps_length else None,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Interventions:
    """Several, done one after the other at every layer; additions alone come to their sum."""

    parts: tuple[Intervention, ...]

    @property
    def shares_prompt(self) -> bool:
        return all(part.shares_prompt for part in self.parts)

    def __add__(self, other: Union[SteeringVector, Intervention, "Interventions"]) -> Any:
        if isinstance(other, SteeringVector):
            other = Intervention(other)
        if not isinstance(other, Intervention | Interventions):
            return NotImplemented
        more = other.parts if isinstance(other, Interventions) else (other,)
        return Interventions((*self.parts, *more))

    def __radd__(self, vector: SteeringVector) -> "Interventions":
        return Interventions((Intervention(vector), *self.parts))

    def note_model(self, model: "Model") -> None:
        for part in self.parts:
            part.note_model(model)

    def steer(self, arch: Arch, rows: Rows) -> Steers:
        return tuple(steer for part in self.parts for steer in part.steer(arch, rows))
