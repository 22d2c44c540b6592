"""One training step: the combined loss over micro-batches, its gradient, the update."""

import functools
import re
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import FrozenConfigDict

from reptune_jax import mesh as meshes
from reptune_jax.data.batches import Batch
from reptune_jax.model.lora import Flat
from reptune_jax.model.transformer import Decoder
from reptune_jax.tuning.objective import Objective, cosine_sums, counts, sums, weights_at
from reptune_jax.watch import cosines


@flax.struct.dataclass
class State:
    """What a step changes and a checkpoint holds."""

    step: jax.Array
    trained: Flat  # float32 masters
    opt: optax.OptState


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


def gradient(
    decoder: Decoder,
    trained: Flat,
    objective: Objective,
    batch: Batch,
    weight_J: jax.Array,
    accumulate: int,
    mesh: Mesh | None = None,
) -> tuple[Flat, tuple[jax.Array, jax.Array]]:
    """(gradient of the weighted sum of mean losses, (mean losses [J], mean cosines [K, N]))."""
    n_J, n_K = counts(batch, objective.probe.direction_NxD.shape[1])

    def weighted(trained: Flat, micro: Batch):
        parts, cosine_NxBxT = sums(decoder, trained, objective, micro)
        cosine_KxN = cosine_sums(cosine_NxBxT, micro.examples, len(n_K))
        mean_J = parts.total / n_J
        return jnp.sum(weight_J * mean_J), (mean_J, cosine_KxN / n_K[:, None])

    def micro_step(carry, micro: Batch):
        grads, aux = jax.grad(weighted, has_aux=True)(trained, micro)
        grads = _as_weights(grads, mesh)
        return jax.tree.map(jnp.add, carry, (grads, aux)), None

    # Every accumulate-th row, so that a micro-batch is spread over the devices as its batch is.
    micros = jax.tree.map(lambda a: a.reshape(-1, accumulate, *a.shape[1:]).swapaxes(0, 1), batch)
    aux = jnp.zeros(n_J.shape), jnp.zeros((*n_K.shape, decoder.arch.N))
    return jax.lax.scan(micro_step, (jax.tree.map(jnp.zeros_like, trained), aux), micros)[0]


@functools.lru_cache
def make_step(
    decoder: Decoder, train: FrozenConfigDict, mesh: Mesh | None = None
) -> jax.stages.Wrapped:
    """`step(state, objective, batch, measure) -> (state, metrics)`: `update`, the state donated."""
    step = functools.partial(update, decoder, train, mesh)
    return jax.jit(step, donate_argnums=0)


def update(
    decoder: Decoder,
    train: FrozenConfigDict,
    mesh: Mesh | None,
    state: State,
    objective: Objective,
    batch: Batch,
    measure: jax.Array,
    due_J: jax.Array | None = None,
) -> tuple[State, dict[str, jax.Array]]:
    """One step: (new state, metrics).

    `measure` (a bool array) also computes the gradient norm of each loss alone and the cosine
    between the token's and the cosine's gradient: three more backward passes, so not every step.
    `due_J`: which losses, besides the first three; those that have a weight, unless it is given.
    """

    def grad_of(weight_J):
        return gradient(decoder, state.trained, objective, batch, weight_J, train.accumulate, mesh)

    weight_J = weights_at(objective, state.step, train.steps)
    grads, (mean_J, cosine_KxN) = grad_of(weight_J)
    norm_J, conflict = jax.lax.cond(
        measure,
        lambda: _each_loss(grad_of, state.trained, weight_J != 0 if due_J is None else due_J),
        lambda: (jnp.zeros_like(weight_J), jnp.float32(0)),
    )
    updates, opt = make_optimizer(train).update(grads, state.opt, state.trained)
    metrics = {
        "loss": jnp.sum(weight_J * mean_J),
        "mean_J": mean_J,
        "cosine_KxN": cosine_KxN,
        "grad_norm": optax.global_norm(grads),
        "norm_J": norm_J,
        "conflict": conflict,
        "lr": schedule(train)(state.step),
    }
    trained = optax.apply_updates(state.trained, updates)
    return _laid_out(State(state.step + 1, trained, opt), mesh), metrics


def _each_loss(grad_of: Callable, trained: Flat, due_J: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gradient norm of each loss alone [J]; cosine between the token and the cosine gradient.

    The first three are measured whatever they weigh, so that arms compare; others if they count.
    """
    zeros, J = jax.tree.map(jnp.zeros_like, trained), len(due_J)

    def one(before: Flat, j: jax.Array) -> tuple[Flat, tuple[jax.Array, jax.Array]]:
        due = (j < 3) | due_J[j]
        grad = jax.lax.cond(due, lambda: grad_of(jax.nn.one_hot(j, J))[0], lambda: zeros)
        dot = sum(jnp.vdot(before[path], grad[path]) for path in grad)
        return grad, (optax.global_norm(grad), jnp.float32(dot))

    norm_J, with_last_J = jax.lax.scan(one, zeros, jnp.arange(J))[1]
    return norm_J, with_last_J[1] / jnp.maximum(norm_J[0] * norm_J[1], 1e-12)


@functools.lru_cache
def make_evaluate(decoder: Decoder) -> jax.stages.Wrapped:
    """`evaluate(trained, objective, batch)`, to be added up over batches.

    Returns (sums and counts of the losses [J], summed cosines [K, N], how those of the main
    behavior are spread).
    """

    @jax.jit
    def evaluate(trained: Flat, objective: Objective, batch: Batch):
        parts, cosine_NxBxT = sums(decoder, trained, objective, batch)
        examples, K = batch.examples, objective.probe.direction_NxD.shape[1]
        weight_BxT = examples.cosine_BxT * (examples.of_B == 0)[:, None]
        spread = cosines.spread(cosine_NxBxT, weight_BxT)
        return parts, cosine_sums(cosine_NxBxT, examples, K), spread

    return evaluate


def init_state(trained: Flat, train: FrozenConfigDict, mesh: Mesh | None = None) -> State:
    """Step 0; every moment is laid out on the mesh as its weight is.

    Raises:
      ValueError: a pattern of `lr_by_path` that matches no trained weight.
    """
    for pattern in train.lr_by_path:
        if not any(re.search(pattern, path) for path in trained):
            raise ValueError(
                f"train.lr_by_path: {pattern!r} matches no trained weight, expected a pattern of "
                f"one of {', '.join(trained)}."
            )
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
