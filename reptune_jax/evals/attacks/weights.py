"""What tuning changed in the weights, and edits of that which need no training."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from reptune_jax import mesh as meshes
from reptune_jax.hub.names import table
from reptune_jax.lm import Model
from reptune_jax.model import integers

WRITERS = ("blocks/attn/o/kernel", "blocks/mlp/down/kernel")  # to the residual: last axis D
GROUP = integers.KINDS["int4"].group  # inputs that share an int4 step


class Spectrum(NamedTuple):
    """Directions that a change writes along, the strongest first."""

    right_KxD: np.ndarray
    energy_K: np.ndarray  # shares of the squared norm; 1 / the first is the stable rank


def unit(directions_NxD: np.ndarray) -> np.ndarray:
    """Every row at length 1; zeros stay zeros."""
    lengths_Nx1 = np.linalg.norm(directions_NxD, axis=1, keepdims=True)
    return directions_NxD / np.where(lengths_Nx1 > 0, lengths_Nx1, 1)


def flat(model: Model) -> dict[str, jax.Array]:
    """Every leaf by its path."""
    return traverse_util.flatten_dict(model.params, sep="/")


def changed(base: Model, model: Model) -> list[str]:
    """The leaves that differ, of two models with the same ones."""
    before = flat(base)
    return [
        path
        for path, leaf in flat(model).items()
        if leaf is not before[path] and bool((leaf != before[path]).any())
    ]


def written(base: Model, model: Model) -> np.ndarray | None:
    """What was changed in all that writes to the residual, [N, R, D]; None: nothing was."""
    before, after = flat(base), flat(model)
    rows = [
        meshes.fetch(after[path].astype(jnp.float32) - before[path].astype(jnp.float32))
        for path in changed(base, model)
        if path in WRITERS
    ]
    return np.concatenate([r.reshape(len(r), -1, r.shape[-1]) for r in rows], 1) if rows else None


def spectrum(rows_RxD: np.ndarray, most: int = 8) -> Spectrum:
    """The first right singular vectors, by the eigenvectors of the D x D Gram matrix."""
    rows = rows_RxD[rows_RxD.any(1)].astype(np.float64)
    values_D, vectors_DxD = np.linalg.eigh(rows.T @ rows)
    order = np.argsort(-values_D)[:most]
    return Spectrum(vectors_DxD[:, order].T, values_D[order] / max(values_D.sum(), 1e-300))


def scaled(base: Model, model: Model, scale: float) -> Model:
    """base + scale (model - base)."""
    return _edited(base, model, lambda before, change: before + scale * change)


def projected(base: Model, model: Model, directions_NxD: np.ndarray) -> Model:
    """Without what tuning writes along a layer's direction; where that is zero nothing is done."""
    unit_NxD = jnp.asarray(unit(directions_NxD))

    def edit(before: jax.Array, change: jax.Array) -> jax.Array:
        u = unit_NxD.reshape(len(unit_NxD), *[1] * (change.ndim - 2), -1)
        return before + change - jnp.sum(change * u, -1, keepdims=True) * u

    return _edited(base, model, edit, WRITERS)


def _edited(
    base: Model,
    model: Model,
    edit: Callable[[jax.Array, jax.Array], jax.Array],
    only: tuple[str, ...] = (),
) -> Model:
    """edit(before, change) of the changed leaves, in float32."""
    before, after = flat(base), flat(model)
    for path in changed(base, model):
        if not only or path in only:
            old = before[path].astype(jnp.float32)
            after[path] = edit(old, after[path].astype(jnp.float32) - old).astype(after[path].dtype)
    return _with(model, after)


def rounded(model: Model, how: str) -> Model:
    """With every kernel of the blocks rounded to nearest, one of `ROUND`; the rest as it is."""
    leaves, of = flat(model), table(model.arch.family)
    for path, leaf in leaves.items():
        if path.startswith("blocks/") and path.endswith("/kernel"):
            w_NxIxO = _matrices(leaf, of[path].inputs)
            leaves[path] = ROUND[how](w_NxIxO)[0].reshape(leaf.shape).astype(leaf.dtype)
    return _with(model, leaves)


def crossed(base: Model, model: Model, how: str) -> float:
    """Of the kernels' weights that tuning changed, the share that moved by over half a step."""
    before, after, of = flat(base), flat(model), table(base.arch.family)
    over = total = 0
    for path in changed(base, model):
        if path.startswith("blocks/") and path.endswith("/kernel"):
            old, new = (_matrices(leaf[path], of[path].inputs) for leaf in (before, after))
            moved, step = jnp.abs(new - old), ROUND[how](old)[1]
            over += int((moved > step / 2).sum())
            total += int((moved > 0).sum())
    return over / total if total else np.nan


def _matrices(leaf: jax.Array, inputs: int) -> jax.Array:
    """A stacked kernel in float32 as [N, inputs, outputs]."""
    width = int(np.prod(leaf.shape[1 : 1 + inputs]))
    return leaf.astype(jnp.float32).reshape(len(leaf), width, -1)


def _to_integers(w_NxIxO: jax.Array, kind: integers.Kind) -> tuple[jax.Array, jax.Array]:
    """(rounded, each weight's step)."""
    N, I, O = w_NxIxO.shape
    codes, step = integers.nearest(w_NxIxO, kind, jnp.dtype(jnp.float32))
    near, steps = codes * step, jnp.broadcast_to(step, codes.shape)
    return near.reshape(N, -1, O)[:, :I], steps.reshape(N, -1, O)[:, :I]


def _to_bfloat16(w_NxIxO: jax.Array) -> tuple[jax.Array, jax.Array]:
    _, exponent = jnp.frexp(w_NxIxO)
    near = w_NxIxO.astype(jnp.bfloat16).astype(jnp.float32)
    return near, jnp.ldexp(jnp.ones_like(w_NxIxO), exponent - 8)  # 8 bits: .1xxxxxxx


ROUND: dict[str, Callable[[jax.Array], tuple[jax.Array, jax.Array]]] = {
    "bfloat16": _to_bfloat16,
    **{how: functools.partial(_to_integers, kind=kind) for how, kind in integers.KINDS.items()},
}


def _with(model: Model, leaves: dict[str, Any]) -> Model:
    return dataclasses.replace(model, params=traverse_util.unflatten_dict(leaves, sep="/"))
