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
from reptune_jax.data.batches import Batch, Keep, Rows
from reptune_jax.model import lora
from reptune_jax.model.intervene import Probe
from reptune_jax.model.transformer import Decoder, collect, unembed
from reptune_jax.tuning import cosines, losses
from reptune_jax.tuning.partition import Flat, merge

_NONE = 1e-6  # instead of a count of zero
LOSSES = ("token", "cosine", "retain", "l2", "own")  # the order of every [J] array here …


def loss_names(others: Iterable[str] = ()) -> tuple[str, ...]:
    """… and after them the token and the cosine loss of each further behavior."""
    return LOSSES + tuple(f"{name}/{loss}" for name in others for loss in LOSSES[:2])


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
    probe: Probe  # of each behavior, [N, K, D]
    cosine: losses.CosineLoss
    weight_J: jax.Array  # of `loss_names`
    anneal_Jx2: jax.Array  # factors of those at the first and the last step
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


def sums(decoder: Decoder, trained: Flat, task: Task, batch: Batch) -> tuple[losses.Sum, jax.Array]:
    """The unreduced losses of a batch [J], and the cosine at every token of its behavior rows.

    Behavior rows and retention rows go through the layers together, in one scan.
    """
    params = merge(trained, task.frozen, decoder.dtype)
    b, keep, B = batch.behavior, batch.keep, batch.behavior.of_B.shape[0]
    variables = {"params": params, **lora.variables(trained, task.scale, "tuned", decoder.dtype)}
    with lora.applied():
        (hidden, _), sown = decoder.apply(
            variables, **_inputs(task.probe, batch), mutable=["intermediates"]
        )
    cosine_NxBxT = collect(sown["intermediates"], decoder.segments, "cosine")[:, :B]
    if b.below_cosine_BxMxT is not None:  # those layers did not run: nothing in them changes
        below_MxBxT = jnp.swapaxes(b.below_cosine_BxMxT, 0, 1)
        cosine_NxBxT = jnp.concatenate([below_MxBxT, cosine_NxBxT])

    logits, K = functools.partial(unembed, decoder, params), task.probe.direction_NxD.shape[1]
    at_label = logits(losses.take(hidden[:B], b.at_BxL))
    token = losses.token_loss(at_label, b.target_BxLxC, b.weight_BxLxC)
    cosine = losses.cosine_loss(cosine_NxBxT, b.cosine_BxT, task.cosine, b.of_B, b.base_BxNxT)
    kept = [losses.Sum(jnp.zeros(1), jnp.zeros(1))] * 3
    if keep is not None:
        read = sown["intermediates"]["tuned"].get("read")
        kept = _retention(logits, hidden[B:], None if read is None else read[:, B:], keep)
    each = [s.by_behavior(b.of_B, K) for s in (token, cosine)]
    # Of rows or of retention rows: what is summed over never mixes the two.
    total_J, n_J = (_in_order(*parts) for parts in zip(*each, _joined(kept), strict=True))
    return losses.Sum(total_J, n_J), cosine_NxBxT


def cosine_sums(cosine_NxBxT: jax.Array, rows: Rows, K: int) -> jax.Array:
    """[K, N]: over the chosen tokens of each behavior."""
    of_KxB = (jnp.arange(K)[:, None] == rows.of_B).astype(jnp.float32)
    return jnp.einsum("nbt,bt,kb->kn", cosine_NxBxT, rows.cosine_BxT, of_KxB)


def _inputs(probe: Probe, batch: Batch) -> dict[str, Any]:
    """What the decoder takes: all rows, each row's direction, and which residuals are read."""
    b, keep = batch.behavior, batch.keep
    tokens, mask, of, read = b.tokens_BxT, b.mask_BxT, b.of_B, None
    below = b.below_BxTxD
    if keep is not None:
        tokens = jnp.concatenate([tokens, keep.tokens_BxT])
        mask = jnp.concatenate([mask, keep.mask_BxT])
        if below is not None and keep.below_BxTxD is not None:
            below = jnp.concatenate([below, keep.below_BxTxD])
        of = jnp.concatenate([of, jnp.zeros(keep.at_BxL.shape[0], of.dtype)])
        if keep.residual_BxMxLxD is not None:
            at_BxLxT = jax.nn.one_hot(keep.at_BxL, tokens.shape[1])
            read = jnp.pad(at_BxLxT, ((b.of_B.shape[0], 0), (0, 0), (0, 0)))
    alone = probe.direction_NxD.shape[1] == 1  # one direction for all rows needs no copies
    probe = jax.tree.map(lambda a: a[:, 0] if alone else a[:, of], probe)
    return {
        "tokens_BxT": tokens,
        "mask_BxT": mask,
        "probe": probe,
        "read_BxPxT": read,
        "enter": None if below is None else ("tuned", below),
    }


def _retention(
    logits: Callable[[jax.Array], jax.Array], hidden: jax.Array, read: jax.Array | None, keep: Keep
) -> list[losses.Sum]:
    """KL, residuals and own answers, by row."""
    at_keep = logits(losses.take(hidden, keep.at_BxL))
    # The base's distribution is rebuilt from its final hidden states, which are smaller.
    kl = losses.retention_loss(at_keep, logits(keep.hidden_BxLxD), keep.weight_BxL)
    l2 = losses.Sum(jnp.zeros(1), jnp.zeros(1))
    if read is not None and keep.residual_BxMxLxD is not None:
        l2 = losses.residual_loss(read, keep.residual_BxMxLxD, keep.weight_BxL)
    own = losses.token_loss(at_keep, keep.next_BxL[..., None], keep.own_BxL[..., None])
    return [kl, l2, own]


def _joined(kept: Iterable[losses.Sum]) -> losses.Sum:
    whole = [part.over_rows() for part in kept]
    return losses.Sum(jnp.stack([w.total for w in whole]), jnp.stack([w.n for w in whole]))


def _in_order(token_K: jax.Array, cosine_K: jax.Array, kept_3: jax.Array) -> jax.Array:
    """[J], as `loss_names` has it."""
    others = jnp.stack([token_K[1:], cosine_K[1:]], 1).reshape(-1)
    return jnp.concatenate([token_K[:1], cosine_K[:1], kept_3, others])


def counts(batch: Batch, K: int) -> tuple[jax.Array, jax.Array]:
    """How much each loss [J] and each behavior's cosine [K] averages over.

    Known before any forward, so micro-batches add up.
    """
    b, keep = batch.behavior, batch.keep
    of_KxB = (jnp.arange(K)[:, None] == b.of_B).astype(jnp.float32)
    token_K, cosine_K = of_KxB @ b.weight_BxLxC.sum((1, 2)), of_KxB @ b.cosine_BxT.sum(1)
    kept_3 = jnp.ones(3)
    if keep is not None:
        kept_3 = jnp.stack([keep.weight_BxL.sum()] * 2 + [keep.own_BxL.sum()])
    n_J = _in_order(token_K, cosine_K, kept_3)
    return jnp.maximum(n_J, _NONE), jnp.maximum(cosine_K, _NONE)


def weights_at(task: Task, step: jax.Array, steps: int) -> jax.Array:
    """[J]: the losses' weights at an optimizer step, linear between the two ends of `anneal`."""
    done = step / max(steps - 1, 1)
    first_J, last_J = task.anneal_Jx2.T
    return task.weight_J * (first_J + (last_J - first_J) * done)


def gradient(
    decoder: Decoder,
    trained: Flat,
    task: Task,
    batch: Batch,
    weight_J: jax.Array,
    accumulate: int,
    mesh: Mesh | None = None,
) -> tuple[Flat, tuple[jax.Array, jax.Array]]:
    """(gradient of the weighted sum of mean losses, (mean losses [J], mean cosines [K, N]))."""
    n_J, n_K = counts(batch, task.probe.direction_NxD.shape[1])

    def objective(trained: Flat, micro: Batch):
        parts, cosine_NxBxT = sums(decoder, trained, task, micro)
        cosine_KxN = cosine_sums(cosine_NxBxT, micro.behavior, len(n_K))
        mean_J = parts.total / n_J
        return jnp.sum(weight_J * mean_J), (mean_J, cosine_KxN / n_K[:, None])

    def micro_step(carry, micro: Batch):
        grads, aux = jax.grad(objective, has_aux=True)(trained, micro)
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
    due_J: jax.Array | None = None,
) -> tuple[State, dict[str, jax.Array]]:
    """One step: (new state, metrics).

    `measure` (a bool array) also computes the gradient norm of each loss alone and the cosine
    between the token's and the cosine's gradient: three more backward passes, so not every step.
    `due_J`: which losses, besides the first three; those that have a weight, unless it is given.
    """

    def grad_of(weight_J):
        return gradient(decoder, state.trained, task, batch, weight_J, train.accumulate, mesh)

    weight_J = weights_at(task, state.step, train.steps)
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
    """`evaluate(trained, task, batch)`, to be added up over batches.

    Returns (sums and counts of the losses [J], summed cosines [K, N], how those of the main
    behavior are spread).
    """

    @jax.jit
    def evaluate(trained: Flat, task: Task, batch: Batch):
        parts, cosine_NxBxT = sums(decoder, trained, task, batch)
        rows, K = batch.behavior, task.probe.direction_NxD.shape[1]
        weight_BxT = rows.cosine_BxT * (rows.of_B == 0)[:, None]
        spread = cosines.spread(cosine_NxBxT, weight_BxT)
        return parts, cosine_sums(cosine_NxBxT, rows, K), spread

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
