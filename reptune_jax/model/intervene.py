"""What is done to, and read from, the residual stream. Interventions are data, not code:

every row of a batch carries its own dose at every layer, its own operation and its own tokens,
so a whole layer x dose sweep is one compiled program.
"""

from typing import Protocol

import flax.struct
import jax
import jax.numpy as jnp

from reptune_jax.model.arch import Arch
from reptune_jax.model.precision import in_float32

_EPS = 1e-8


@flax.struct.dataclass
class Steer:
    """Edits the output of every block: first ablation, h - c (h.u) u, then addition, h + a v.

    Here v is the layer's direction and u = v / |v|. A zero dose leaves a row or layer untouched.
    """

    direction_NxD: jax.Array  # one direction per layer, raw length
    add_NxB: jax.Array  # a: multiples of v added
    ablate_NxB: jax.Array  # c: share of the component along v removed (1 = all)
    token_BxT: jax.Array  # 1 where the edit applies


class Steerable(Protocol):
    """What `steer=` accepts besides a ready `Steer`: a SteeringVector."""

    def steer(self, arch: Arch, B: int, T: int) -> Steer: ...


def as_steer(steer: Steerable | Steer | None, arch: Arch, B: int, T: int) -> Steer | None:
    """Every way to say "steer" becomes the same data.

    Raises:
      ValueError: something else, or a `Steer` of another model or batch.
    """
    if steer is None:
        return None
    if not isinstance(steer, Steer):
        if not callable(getattr(steer, "steer", None)):
            raise ValueError(
                f"steer: got {str(steer)[:40]!r} ({type(steer).__name__}), expected a "
                "SteeringVector, such as 3 * vec.at(layers=[15])."
            )
        return steer.steer(arch, B, T)
    fields = ("direction_NxD", "add_NxB", "ablate_NxB", "token_BxT")
    shapes = ((arch.N, arch.D), (arch.N, B), (arch.N, B), (B, T))
    for name, shape in zip(fields, shapes, strict=True):
        if (found := jnp.shape(getattr(steer, name))) != shape:
            raise ValueError(
                f"steer.{name}: got shape {list(found)}, expected {list(shape)} for this model "
                "and batch."
            )
    return steer


def steer_all(direction_NxD: jax.Array, dose_N: jax.Array, B: int, T: int) -> Steer:
    """The common case: add `dose_N` times each layer's vector at every token of every row."""
    N = direction_NxD.shape[0]
    dose_NxB = jnp.broadcast_to(jnp.asarray(dose_N, jnp.float32)[:, None], (N, B))
    return Steer(direction_NxD, dose_NxB, jnp.zeros((N, B)), jnp.ones((B, T)))


def apply_steer(
    x_BxTxD: jax.Array, v_D: jax.Array, add_B: jax.Array, ablate_B: jax.Array, token_BxT: jax.Array
) -> jax.Array:
    """One layer of `Steer`, in float32 because a small dose on a large residual is lost in bf16."""
    x = x_BxTxD.astype(jnp.float32)
    v = v_D.astype(jnp.float32)
    u = v / jnp.maximum(jnp.linalg.norm(v), _EPS)
    along_BxT = in_float32("btd,d->bt", x, u)
    x = x - (ablate_B[:, None] * token_BxT * along_BxT)[..., None] * u
    x = x + (add_B[:, None] * token_BxT)[..., None] * v
    return x.astype(x_BxTxD.dtype)


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
