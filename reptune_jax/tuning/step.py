"""One training step: the combined loss over micro-batches, its gradient, the update.

Everything that differs between arms and signs (directions, loss weights, targets) is data, so a
study compiles this once.
"""

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import FrozenConfigDict

from reptune_jax import mesh as meshes
from reptune_jax.data.batches import Batch
from reptune_jax.model import lora
from reptune_jax.model.intervene import Probe
from reptune_jax.model.transformer import Decoder, collect, unembed
from reptune_jax.tuning import losses
from reptune_jax.tuning.partition import Flat, merge

LOSSES = ("token", "cosine", "retain")  # the order of every [3] array here


@flax.struct.dataclass
class State:
    """What a step changes and a checkpoint holds."""

    step: jax.Array
    trained: Flat  # float32 masters
    opt: optax.OptState


@flax.struct.dataclass
class Task:
    """What a step reads and never changes."""

    frozen: dict[str, Any]
    probe: Probe
    cosine: losses.CosineLoss
    weight_3: jax.Array  # of LOSSES
    scale: jax.Array | float = 1.0  # of adapters


def schedule(train: FrozenConfigDict) -> optax.Schedule:
    """Linear warm-up to `lr`, then the chosen decay to zero at `steps`."""
    peak = train.lr
    rest = max(train.steps - train.warmup, 1)
    decay = {
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "none": optax.constant_schedule(peak),
    }[train.decay]
    # From peak/warmup rather than 0: a first step that changes nothing is a step wasted.
    warm = optax.linear_schedule(peak / max(train.warmup, 1), peak, max(train.warmup - 1, 1))
    return optax.join_schedules([warm, decay], [train.warmup]) if train.warmup else decay


def make_optimizer(train: FrozenConfigDict) -> optax.GradientTransformation:
    """AdamW with a learning rate per path: the longest pattern of `lr_by_path` that matches wins.

    An AdamW update, decay included, is proportional to its rate, so a path's own rate is a factor.
    """
    patterns = sorted(train.lr_by_path, key=len, reverse=True)
    factor = {pattern: train.lr_by_path[pattern] / train.lr for pattern in patterns}

    def of_path(path: str) -> float:
        return next((f for pattern, f in factor.items() if re.search(pattern, path)), 1.0)

    return optax.chain(
        optax.clip_by_global_norm(train.clip or jnp.inf),
        optax.adamw(
            schedule(train), train.b1, train.b2, train.eps, weight_decay=train.weight_decay
        ),
        optax.stateless(lambda updates, _: {p: of_path(p) * u for p, u in updates.items()}),
    )


def sums(
    decoder: Decoder, trained: Flat, task: Task, batch: Batch
) -> tuple[list[losses.Sum], jax.Array]:
    """The unreduced LOSSES of a batch, and each layer's summed cosine [N].

    Behavior rows and retention rows go through the layers together, in one scan.
    """
    params = merge(trained, task.frozen, decoder.dtype)
    b, keep = batch.behavior, batch.keep
    tokens, mask = b.tokens_BxT, b.mask_BxT
    if keep is not None:
        tokens = jnp.concatenate([tokens, keep.tokens_BxT])
        mask = jnp.concatenate([mask, keep.mask_BxT])
    variables = {"params": params, **lora.variables(trained, task.scale, "tuned", decoder.dtype)}
    with lora.applied():
        (hidden, _), sown = decoder.apply(
            variables, tokens, mask, probe=task.probe, mutable=["intermediates"]
        )
    B = b.tokens_BxT.shape[0]
    cosine_NxBxT = collect(sown["intermediates"], decoder.segments, "cosine")[:, :B]

    logits = functools.partial(unembed, decoder, params)
    at_label = losses.take(hidden[:B], b.at_BxL)
    out = [
        losses.token_loss(logits, at_label, b.target_BxLxC, b.weight_BxLxC),
        losses.cosine_loss(cosine_NxBxT, b.cosine_BxT, task.cosine),
    ]
    if keep is not None:
        at_keep = losses.take(hidden[B:], keep.at_BxL)
        out.append(losses.retention_loss(logits, at_keep, keep.hidden_BxLxD, keep.weight_BxL))
    return out, jnp.einsum("nbt,bt->n", cosine_NxBxT, b.cosine_BxT)


def counts(batch: Batch) -> jax.Array:
    """How much each of LOSSES averages over; known before any forward, so micro-batches add up."""
    keep = batch.keep.weight_BxL.sum() if batch.keep is not None else 1.0
    n_3 = jnp.stack([batch.behavior.weight_BxLxC.sum(), batch.behavior.cosine_BxT.sum(), keep])
    return jnp.maximum(n_3, 1e-6)


def gradient(
    decoder: Decoder,
    trained: Flat,
    task: Task,
    batch: Batch,
    weight_3: jax.Array,
    accumulate: int,
    mesh: Mesh | None = None,
) -> tuple[Flat, tuple[jax.Array, jax.Array]]:
    """(gradient of the weighted sum of mean losses, (mean LOSSES [3], cosine by layer [N]))."""
    n_3 = counts(batch)

    def objective(trained: Flat, micro: Batch):
        parts, cosine_N = sums(decoder, trained, task, micro)
        total_3 = jnp.stack([p.total for p in parts] + [jnp.float32(0)] * (3 - len(parts)))
        return jnp.sum(weight_3 * total_3 / n_3), (total_3 / n_3, cosine_N / n_3[1])

    def micro_step(carry, micro: Batch):
        grads, aux = jax.grad(objective, has_aux=True)(trained, micro)
        grads = _as_weights(grads, mesh)
        return jax.tree.map(jnp.add, carry, (grads, aux)), None

    # Every accumulate-th row, so that a micro-batch is spread over the devices as its batch is.
    micros = jax.tree.map(lambda a: a.reshape(-1, accumulate, *a.shape[1:]).swapaxes(0, 1), batch)
    zeros = jax.tree.map(jnp.zeros_like, trained), (jnp.zeros(3), jnp.zeros(decoder.arch.N))
    return jax.lax.scan(micro_step, zeros, micros)[0]


@functools.lru_cache
def make_step(
    decoder: Decoder, train: FrozenConfigDict, mesh: Mesh | None = None
) -> jax.stages.Wrapped:
    """`step(state, task, batch, measure) -> (state, metrics)`: `update`, the state donated."""
    step = functools.partial(update, decoder, train, mesh)
    return jax.jit(step, donate_argnums=0)


def update(
    decoder: Decoder,
    train: FrozenConfigDict,
    mesh: Mesh | None,
    state: State,
    task: Task,
    batch: Batch,
    measure: jax.Array,
) -> tuple[State, dict[str, jax.Array]]:
    """One step: (new state, metrics).

    `measure` (a bool array) also computes the gradient norm of each loss alone and the cosine
    between the token's and the cosine's gradient: three more backward passes, so not every step.
    """

    def grad_of(weight_3):
        return gradient(decoder, state.trained, task, batch, weight_3, train.accumulate, mesh)

    grads, (mean_3, cosine_N) = grad_of(task.weight_3)
    norm_3, conflict = jax.lax.cond(
        measure, lambda: _each_loss(grad_of), lambda: (jnp.zeros(3), jnp.float32(0))
    )
    updates, opt = make_optimizer(train).update(grads, state.opt, state.trained)
    metrics = {
        "loss": jnp.sum(task.weight_3 * mean_3),
        "mean_3": mean_3,
        "cosine_N": cosine_N,
        "grad_norm": optax.global_norm(grads),
        "norm_3": norm_3,
        "conflict": conflict,
        "lr": schedule(train)(state.step),
    }
    trained = optax.apply_updates(state.trained, updates)
    return _laid_out(State(state.step + 1, trained, opt), mesh), metrics


def _each_loss(grad_of: Callable) -> tuple[jax.Array, jax.Array]:
    """Gradient norm of each loss alone [3]; cosine between the token and the cosine gradient."""
    each = jax.lax.map(lambda weight_3: grad_of(weight_3)[0], jnp.eye(3))
    norm_3 = jax.vmap(optax.global_norm)(each)
    dot = sum(jnp.vdot(g[0], g[1]) for g in jax.tree.leaves(each))
    return norm_3, dot / jnp.maximum(norm_3[0] * norm_3[1], 1e-12)


@functools.lru_cache
def make_evaluate(decoder: Decoder) -> jax.stages.Wrapped:
    """`evaluate(trained, task, batch) -> (summed LOSSES [3], counts [3], summed cosine [N])`."""

    @jax.jit
    def evaluate(trained: Flat, task: Task, batch: Batch):
        parts, cosine_N = sums(decoder, trained, task, batch)
        zero = losses.Sum(jnp.float32(0), jnp.float32(0))
        parts = parts + [zero] * (3 - len(parts))
        return jnp.stack([p.total for p in parts]), jnp.stack([p.n for p in parts]), cosine_N

    return evaluate


def init_state(trained: Flat, train: FrozenConfigDict, mesh: Mesh | None = None) -> State:
    """Step 0; every moment is laid out on the mesh as its weight is.

    Raises:
      ValueError: a pattern of `lr_by_path` that matches no trained weight.
    """
    _check_patterns(train.lr_by_path, trained)
    return _make_init(train, mesh)(trained)


@functools.lru_cache
def _make_init(train: FrozenConfigDict, mesh: Mesh | None) -> jax.stages.Wrapped:
    """Compiled once for all runs of a study."""
    optimizer = make_optimizer(train)
    return jax.jit(
        lambda trained: _laid_out(State(jnp.int32(0), trained, optimizer.init(trained)), mesh)
    )


def _as_weights(grads: Flat, mesh: Mesh | None) -> Flat:
    """Each gradient lies as its weight does, on all devices together rather than on each."""
    if mesh is None:
        return grads
    return {
        path: jax.lax.with_sharding_constraint(g, NamedSharding(mesh, meshes.spec(path, g.ndim)))
        for path, g in grads.items()
    }


def _laid_out(state: State, mesh: Mesh | None) -> State:
    """Weights and moments by the sharding rules; left alone, XLA may choose anew at every step."""
    if mesh is None:
        return state

    def place(keys: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        path = getattr(keys[-1], "key", "")
        spec = meshes.spec(path, leaf.ndim) if path in state.trained else PartitionSpec()
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, state)


def _check_patterns(patterns: Iterable[str], trained: Flat) -> None:
    for pattern in patterns:
        if not any(re.search(pattern, path) for path in trained):
            raise ValueError(
                f"train.lr_by_path: {pattern!r} matches no trained weight, expected a pattern of "
                f"one of {', '.join(trained)}."
            )
