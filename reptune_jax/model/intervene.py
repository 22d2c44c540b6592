"""What is done to, and read from, the residual stream. Interventions are data, not code:

every row of a batch carries its own dose at every layer, its own operation and its own tokens,
so a whole layer x dose sweep is one compiled program.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from reptune_jax.model.arch import Arch
from reptune_jax.model.precision import in_float32

_EPS = 1e-8
_PARALLEL = 1e-6  # of a residual's length: with less beside v there is no plane to turn in

OPERATIONS = ("add", "ablate", "clamp", "rescale", "rotate")
_RULES = "all, prompt, generated, answer, last:N or generated:FIRST-STOP"


@flax.struct.dataclass
class Steer:
    """Edits the output h of every block, in this order, where its tokens are 1.

    Ablation, h - c (h.u) u; addition, h + a v; a turn toward v in the plane of h and v, by at most
    the angle between them (and toward -v, where it is negative); the length that h had at first.
    Here v is the layer's direction and u = v / |v|. A row or layer with zeros is left untouched.
    """

    direction_NxD: jax.Array  # one direction per layer, raw length
    add_NxB: jax.Array  # a: multiples of v added
    ablate_NxB: jax.Array  # c: share of the component along v removed (1 = all)
    token_BxT: jax.Array  # 1 where the edit applies
    turn_NxB: jax.Array | None = None  # radians; None: no row turns, and nothing is computed
    keep_NxB: jax.Array | None = None  # 1 where the length is kept; None: nowhere

    @property
    def by_layer(self) -> tuple[Any, ...]:
        """What is scanned along with the layers, in the order of `apply_steer`."""
        return self.direction_NxD, self.add_NxB, self.ablate_NxB, self.turn_NxB, self.keep_NxB


Steers = tuple[Steer, ...]  # of one batch, done one after the other at every layer


@dataclasses.dataclass(frozen=True)
class Rows:
    """The batch that is steered, for interventions that are not the same at all of its tokens."""

    place_BxT: Any  # from the answer's first token, 0; the prompt's last is -1
    prompt_BxT: Any  # 1 at the prompt's tokens but the first (unless it is the only one)
    cosine: Callable[["Probe"], Any]  # [N, B, T] where nothing is done

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T); T counts tokens that are still to come."""
        B, T = self.place_BxT.shape
        return B, T


def rows(
    mask_BxT: Any, cosine: Callable[["Probe"], Any], start_B: Any = None, new: int = 0
) -> Rows:
    """Rows whose answers begin at their `start_B`-th real token; by default behind the last one.

    `new` further columns are tokens that are generated behind them.
    """
    xp = np if isinstance(mask_BxT, np.ndarray) else jnp
    nth_BxT, real_Bx1 = xp.cumsum(mask_BxT, axis=1) - 1, mask_BxT.sum(axis=1, keepdims=True)
    start_Bx1 = real_Bx1 if start_B is None else xp.asarray(start_B)[:, None]
    prompt_BxT = (mask_BxT > 0) & (nth_BxT < start_Bx1)
    prompt_BxT &= (nth_BxT > 0) | (xp.minimum(start_Bx1, real_Bx1) == 1)
    to_come_BxM = xp.broadcast_to(xp.arange(new), (len(mask_BxT), new)) + real_Bx1 - start_Bx1
    place_BxT = xp.concatenate([nth_BxT - start_Bx1, to_come_BxM], axis=1)
    return Rows(place_BxT, prompt_BxT, cosine)


def span(rule: str) -> tuple[float, float]:
    """[first, stop) of the places that a rule means, counted from the answer's first token, 0.

    all; prompt; generated: the answer's tokens; answer: those and the prompt's last one, which is
    every token that something of the answer is predicted from; last:3, of the prompt;
    generated:0-8, the answer's first eight; generated:8-, those behind them.

    Raises:
      ValueError: no such rule.
    """
    places = {"all": (-np.inf, np.inf), "prompt": (-np.inf, 0), "generated": (0, np.inf)}
    places["answer"] = (-1, np.inf)
    if rule in places:
        return places[rule]
    if (found := re.fullmatch(r"last:(\d+)", rule)) and int(found[1]):
        return -int(found[1]), 0
    if found := re.fullmatch(r"generated:(\d+)-(\d*)", rule):
        first, stop = int(found[1]), float(found[2] or np.inf)
        if first < stop:
            return first, stop
    raise ValueError(f"tokens: got {rule!r}, expected {_RULES}. Example: generated:0-8")


class Steerable(Protocol):
    """What `steer=` accepts besides a ready `Steer`: a SteeringVector, an Intervention, or several.

    `shares_prompt = False` says that not all of a prompt's tokens but the last are steered alike.
    """

    def steer(self, arch: Arch, rows: Rows) -> Steers: ...


def as_steer(steer: Steerable | Steer | None, arch: Arch, rows: Rows) -> Steers | None:
    """Every way to say "steer" becomes the same data.

    A ready `Steer` may have one column for all tokens to come.

    Raises:
      ValueError: something else, or a `Steer` of another model or batch.
    """
    if steer is None:
        return None
    if not isinstance(steer, Steer):
        if not callable(getattr(steer, "steer", None)):
            raise ValueError(
                f"steer: got {str(steer)[:40]!r} ({type(steer).__name__}), expected a "
                "SteeringVector, such as 3 * vec.at(layers=[15]), or an Intervention."
            )
        return steer.steer(arch, rows)
    B, T = rows.shape
    one = min(rows.prompt_BxT.shape[1] + 1, T)  # column for all that is to come, if anything is
    width = T if jnp.shape(steer.token_BxT) == (B, T) else one
    shapes = {"direction_NxD": (arch.N, arch.D), "add_NxB": (arch.N, B), "ablate_NxB": (arch.N, B)}
    shapes |= {"token_BxT": (B, width), "turn_NxB": (arch.N, B), "keep_NxB": (arch.N, B)}
    for name, shape in shapes.items():
        value = getattr(steer, name)
        if value is not None and (found := jnp.shape(value)) != shape:
            raise ValueError(
                f"steer.{name}: got shape {list(found)}, expected {list(shape)} for this model "
                "and batch."
            )
    return (steer,)


def steer_all(direction_NxD: jax.Array, dose_N: jax.Array, B: int, T: int) -> Steer:
    """The common case: add `dose_N` times each layer's vector at every token of every row."""
    N = direction_NxD.shape[0]
    dose_NxB = jnp.broadcast_to(jnp.asarray(dose_N, jnp.float32)[:, None], (N, B))
    return Steer(direction_NxD, dose_NxB, jnp.zeros((N, B)), jnp.ones((B, T)))


def listed(steer: Steer | Steers | None) -> Steers:
    """One, several or none, as a tuple."""
    return () if steer is None else (steer,) if isinstance(steer, Steer) else steer


def apply_steer(
    x_BxTxD: jax.Array,
    token_BxT: jax.Array,
    v_D: jax.Array,
    add_B: jax.Array,
    ablate_B: jax.Array,
    turn_B: jax.Array | None = None,
    keep_B: jax.Array | None = None,
) -> jax.Array:
    """One layer of `Steer`, in float32 because a small dose on a large residual is lost in bf16."""
    x = x_BxTxD.astype(jnp.float32)
    v = v_D.astype(jnp.float32)
    u = v / jnp.maximum(jnp.linalg.norm(v), _EPS)
    along_BxT = in_float32("btd,d->bt", x, u)
    x = x - (ablate_B[:, None] * token_BxT * along_BxT)[..., None] * u
    x = x + (add_B[:, None] * token_BxT)[..., None] * v
    if turn_B is not None:
        x = _turn(x, u, turn_B[:, None] * token_BxT)
    if keep_B is not None:
        had_BxT, has_BxT = (jnp.linalg.norm(h.astype(jnp.float32), axis=-1) for h in (x_BxTxD, x))
        kept_BxT = jnp.where(
            keep_B[:, None] * token_BxT > 0, had_BxT / jnp.maximum(has_BxT, _EPS), 1.0
        )
        x = x * kept_BxT[..., None]
    return x.astype(x_BxTxD.dtype)


def _turn(x: jax.Array, u: jax.Array, angle_BxT: jax.Array) -> jax.Array:
    """x turned toward the unit vector u; untouched where it lies along u, which gives no plane."""
    along_BxT = in_float32("btd,d->bt", x, u)
    beside = x - along_BxT[..., None] * u
    beside_BxT, length_BxT = jnp.linalg.norm(beside, axis=-1), jnp.linalg.norm(x, axis=-1)
    to_u_BxT = jnp.clip(jnp.arctan2(beside_BxT, along_BxT) - angle_BxT, 0.0, jnp.pi)
    beside = beside / jnp.maximum(beside_BxT, _EPS)[..., None]
    unit = jnp.cos(to_u_BxT)[..., None] * u + jnp.sin(to_u_BxT)[..., None] * beside
    turns_BxT = (angle_BxT != 0) & (beside_BxT > _PARALLEL * length_BxT) & jnp.any(u != 0)
    return jnp.where(turns_BxT[..., None], length_BxT[..., None] * unit, x)


@flax.struct.dataclass
class Probe:
    """Directions to take the cosine with, and a point to take it from (zeros: the paper's).

    Both [N, D], or [N, B, D] where every row has its own.
    """

    direction_NxD: jax.Array
    center_NxD: jax.Array


def cosine(x_BxTxD: jax.Array, v_D: jax.Array, center_D: jax.Array) -> jax.Array:
    """cos(h - center, v) at every token, float32 [B, T]; 0 where v is zero (paper section 3).

    v and center may be [B, D].
    """
    x, v = x_BxTxD.astype(jnp.float32) - center_D[..., None, :], v_D.astype(jnp.float32)
    dot_BxT = in_float32("btd,d->bt" if v.ndim == 1 else "btd,bd->bt", x, v)
    norm_BxT = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(v, axis=-1)[..., None]
    return dot_BxT / jnp.maximum(norm_BxT, _EPS)
