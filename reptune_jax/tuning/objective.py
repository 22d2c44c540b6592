"""What a run is after, as data and as a function of a batch: the losses and their sum.

Everything that differs between arms and signs (directions, loss weights, targets) is data, so a
study compiles its step once.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from reptune_jax import mesh as meshes
from reptune_jax.data.batches import Batch, Examples
from reptune_jax.model import lora
from reptune_jax.model.intervene import Probe, Steer
from reptune_jax.model.lora import Flat
from reptune_jax.model.read import read
from reptune_jax.model.transformer import Decoder, unembed
from reptune_jax.tuning import losses, partition
from reptune_jax.tuning.losses import CosineLoss
from reptune_jax.tuning.partition import merge
from reptune_jax.vectors.steering_vector import SteeringVector

_ANCHORED = ("shift", "hold")  # modes that refer to the base model's cosines

_NONE = 1e-6  # instead of a count of zero
# The order of every [J] array here …
LOSSES = ("token", "cosine", "retain", "l2", "own", "ending", "match")


def loss_names(others: Iterable[str] = ()) -> tuple[str, ...]:
    """… and after them the token and the cosine loss of each further behavior."""
    return LOSSES + tuple(f"{name}/{loss}" for name in others for loss in LOSSES[:2])


@flax.struct.dataclass
class Objective:
    """What a step reads and never changes."""

    frozen: dict[str, Any]
    probe: Probe  # of each behavior, [N, K, D]
    cosine: losses.CosineLoss
    weight_J: jax.Array  # of `loss_names`
    anneal_Jx2: jax.Array  # factors of those at the first and the last step
    stop_S: jax.Array  # the tokens that end an answer
    scale: jax.Array | float = 1.0  # of adapters
    push_NxD: jax.Array | None = None  # added to the examples' residual stream, and not to others'
    beyond_MxD: jax.Array | None = None  # added to the examples' `goal`; zero where that is all
    goal_layer: int = flax.struct.field(pytree_node=False, default=0)  # the first of those M

    def placed(self, mesh: Mesh | None) -> "Objective":
        """The same on every device, but for the frozen weights, which lie there already."""
        if mesh is None:
            return self
        small = meshes.replicate(dataclasses.replace(self, frozen={}), mesh)
        return dataclasses.replace(small, frozen=self.frozen)


def make_objective(
    c: ConfigDict,
    vector: SteeringVector,
    frozen: dict[str, Any],
    also: Mapping[str, SteeringVector] | None = None,
    stop_ids: Sequence[int] = (),
) -> Objective:
    """The armed config as data; `also` holds the vectors of its further behaviors."""
    vectors = (vector, *((also or {})[name] for name in c.loss.also))
    probes = [v.probe(c.loss.center) for v in vectors]
    probe = jax.tree.map(lambda *each: jnp.stack(each, axis=1), *probes)
    weights = [c.loss[name] for name in LOSSES]
    anneal = [c.loss.anneal[name] for name in LOSSES]
    for one in c.loss.also.values():
        weights += [one.token, one.cosine]
        anneal += [one.anneal, one.anneal]
    return Objective(
        frozen,
        probe,
        cosine_spec(c, len(vector.directions_NxD)),
        jnp.array(weights, jnp.float32),
        jnp.array(anneal, jnp.float32),
        jnp.array(stop_ids, jnp.int32),
        jnp.float32(partition.scale(c.train.lora)),
        push(c, vector),
        beyond(c, vector),
        goal_layers(c)[0] if c.loss.match else 0,
    )


def push(c: ConfigDict, vector: SteeringVector) -> jax.Array | None:
    """Preventative steering (arXiv 2507.21509) [N, D]: `loss.steer` at the middle of `loss.layers`.

    Trained with the vector's opposite in the stream, the weights learn what makes up for it, which
    stays when it is gone.

    Raises:
      ValueError: that layer is below the trained ones, which would not see it.
    """
    if not c.loss.steer:
        return None
    layer = sum(c.loss.layers) // 2
    if layer < c.train.layers[0]:
        raise ValueError(
            f"loss.steer: got {c.loss.steer:g} at layer {layer}, the middle of loss.layers="
            f"{tuple(c.loss.layers)}, expected one from the first trained layer on, "
            f"{c.train.layers[0]}. Raise loss.layers."
        )
    return jnp.asarray((vector.at([layer]) * (c.sign * c.loss.steer)).dose_NxD)


def goal_layers(c: ConfigDict) -> tuple[int, int]:
    """[first, stop) layers of the loss `match`: those of `loss.layers` that training can change.

    Raises:
      ValueError: there is none.
    """
    (first, stop), trained = c.loss.layers, c.train.layers[0]
    if stop <= trained:
        raise ValueError(
            f"loss.match: got {c.loss.match:g} at loss.layers={tuple(c.loss.layers)}, expected "
            f"some from the first trained layer on, {trained}. Raise loss.layers."
        )
    return max(first, trained), stop


def beyond(c: ConfigDict, vector: SteeringVector) -> jax.Array | None:
    """[M, D]: how far the goal of the loss `match` is from what the base model computes.

    Raises:
      ValueError: no layer of `loss.layers` can change.
    """
    if not c.loss.match:
        return None
    scale = c.sign * c.loss.dose * (c.loss.goal == "displaced")
    return jnp.asarray(vector.dose_NxD[slice(*goal_layers(c))] * np.float32(scale))


def cosine_spec(c: ConfigDict, N: int) -> CosineLoss:
    """Each behavior's cosine loss, the main one first."""
    each = {"loss": (c.sign, c.loss)}
    each |= {f"loss.also.{name}": (one.sign, one) for name, one in c.loss.also.items()}
    layer_KxN = np.zeros((len(each), N), np.float32)
    for layer_N, (name, (_, one)) in zip(layer_KxN, each.items(), strict=True):
        first, stop = one.layers
        if not 0 <= first < stop <= N:
            raise ValueError(
                f"{name}.layers: got ({first}, {stop}), expected 0 <= first < stop <= {N}."
            )
        layer_N[first:stop] = 1

    def per(value: Callable[[int, ConfigDict], float]) -> jax.Array:
        return jnp.array([value(sign, one) for sign, one in each.values()], jnp.float32)

    return CosineLoss(
        sign_K=per(lambda sign, _: sign),
        into_K=per(lambda _, one: one.mode == "in"),
        out_K=per(lambda _, one: one.mode == "out"),
        hold_K=per(lambda _, one: one.mode in _ANCHORED),
        shift_K=per(lambda _, one: one.shift * (one.mode == "shift")),
        layer_KxN=jnp.asarray(layer_KxN),
    )


def needs_anchors(c: ConfigDict) -> bool:
    """Whether a loss refers to the base model's cosines."""
    return any(mode in _ANCHORED for mode in (c.loss.mode, *(o.mode for o in c.loss.also.values())))


def sums(
    decoder: Decoder, trained: Flat, objective: Objective, batch: Batch
) -> tuple[losses.Sum, jax.Array]:
    """The unreduced losses of a batch [J], and the cosine at every token of its examples.

    Examples and retention text go through the layers together, in one scan.
    """
    params = merge(trained, objective.frozen, decoder.dtype)
    adapted = lora.variables(trained, objective.scale, "tuned", decoder.dtype)
    b, kept = batch.examples, batch.retention
    B, K = b.of_B.shape[0], objective.probe.direction_NxD.shape[1]
    found = read(decoder, {"params": params, **adapted}, **_inputs(objective, batch))
    assert found.cosine_NxBxT is not None
    cosine_NxBxT = found.cosine_NxBxT[:, :B]
    if b.below_cosine_BxMxT is not None:  # those layers did not run: nothing in them changes
        below_MxBxT = jnp.swapaxes(b.below_cosine_BxMxT, 0, 1)
        cosine_NxBxT = jnp.concatenate([below_MxBxT, cosine_NxBxT])

    logits = functools.partial(unembed, decoder, params)
    at_label = logits(losses.take(found.hidden_BxTxD[:B], b.at_BxL))
    token = losses.token_loss(at_label, b.target_BxLxC, b.weight_BxLxC)
    cosine = losses.cosine_loss(cosine_NxBxT, b.cosine_BxT, objective.cosine, b.of_B, b.base_BxNxT)
    nothing = losses.Sum(jnp.zeros(1), jnp.zeros(1))
    kl, l2, own, ending, match = (nothing,) * 5
    if b.ending_BxL is not None and b.goes_on_BxL is not None:
        ending = losses.ending_loss(at_label, b.ending_BxL, b.goes_on_BxL, objective.stop_S)
    if b.goal_BxMxLxD is not None and objective.beyond_MxD is not None:
        assert found.mean_NxBxPxD is not None
        M, L = b.goal_BxMxLxD.shape[1:3]
        at = objective.goal_layer - (decoder.arch.N - len(found.mean_NxBxPxD))
        read_MxBxLxD = found.mean_NxBxPxD[at : at + M, :B, :L]
        goal_BxMxLxD = b.goal_BxMxLxD.astype(jnp.float32) + objective.beyond_MxD[:, None]
        match = losses.residual_loss(read_MxBxLxD, goal_BxMxLxD, match_weight(b))
    if kept is not None:
        at_kept = logits(losses.take(found.hidden_BxTxD[B:], kept.at_BxL))
        # The base's distribution is rebuilt from its final hidden states, which are smaller.
        kl = losses.retention_loss(at_kept, logits(kept.hidden_BxLxD), kept.weight_BxL)
        own = losses.token_loss(at_kept, kept.next_BxL[..., None], kept.own_BxL[..., None])
        if kept.residual_BxMxLxD is not None and found.mean_NxBxPxD is not None:
            above = dict(decoder.segments).get("above", 0)
            (M, L), ran = kept.residual_BxMxLxD.shape[1:3], len(found.mean_NxBxPxD)
            read_MxRxLxD = found.mean_NxBxPxD[ran - above - M : ran - above, B:, :L]
            l2 = losses.residual_loss(read_MxRxLxD, kept.residual_BxMxLxD, kept.weight_BxL)
    each = [s.by_behavior(b.of_B, K) for s in (token, cosine)]
    whole = [s.over_rows() for s in (kl, l2, own, ending, match)]
    held = losses.Sum(jnp.stack([w.total for w in whole]), jnp.stack([w.n for w in whole]))
    # Of examples or of retention text: what is summed over never mixes the two.
    total_J, n_J = (_in_order(*parts) for parts in zip(*each, held, strict=True))
    return losses.Sum(total_J, n_J), cosine_NxBxT


def match_weight(examples: Examples) -> jax.Array:
    """[B, L]: the main behavior's labels, whose residuals the loss `match` compares."""
    return examples.weight_BxLxC.sum(-1) * (examples.of_B == 0)[:, None]


def cosine_sums(cosine_NxBxT: jax.Array, examples: Examples, K: int) -> jax.Array:
    """[K, N]: over the chosen tokens of each behavior."""
    of_KxB = (jnp.arange(K)[:, None] == examples.of_B).astype(jnp.float32)
    return jnp.einsum("nbt,bt,kb->kn", cosine_NxBxT, examples.cosine_BxT, of_KxB)


def _inputs(objective: Objective, batch: Batch) -> dict[str, Any]:
    """What the decoder takes: all rows, each row's direction, and which residuals are read."""
    probe, b, kept = objective.probe, batch.examples, batch.retention
    tokens, mask, of, below = b.tokens_BxT, b.mask_BxT, b.of_B, b.below_BxTxD
    text = b.text_BxT
    at = [b.at_BxL[:, : 0 if b.goal_BxMxLxD is None else None]]
    if kept is not None:
        tokens = jnp.concatenate([tokens, kept.tokens_BxT])
        mask = jnp.concatenate([mask, kept.mask_BxT])
        if below is not None and kept.below_BxTxD is not None:
            below = jnp.concatenate([below, kept.below_BxTxD])
        if text is not None and kept.text_BxT is not None:
            text = jnp.concatenate([text, kept.text_BxT])
        of = jnp.concatenate([of, jnp.zeros(kept.at_BxL.shape[0], of.dtype)])
        at.append(kept.at_BxL[:, : 0 if kept.residual_BxMxLxD is None else None])
    P = max(each.shape[1] for each in at)
    at = [jnp.pad(a, ((0, 0), (0, P - a.shape[1])), constant_values=-1) for a in at]  # -1: nowhere
    steer = None
    if objective.push_NxD is not None:
        pushed_B = jnp.pad(b.of_B == 0, (0, len(tokens) - len(b.of_B))).astype(jnp.float32)
        add_NxB = jnp.tile(pushed_B, (len(objective.push_NxD), 1))
        tokens_BxT = jnp.ones(tokens.shape)
        steer = Steer(objective.push_NxD, add_NxB, jnp.zeros_like(add_NxB), tokens_BxT)
    alone = probe.direction_NxD.shape[1] == 1  # one direction for all rows needs no copies
    return {
        "tokens_BxT": tokens,
        "mask_BxT": mask,
        "text_BxT": text,
        "probe": jax.tree.map(lambda a: a[:, 0] if alone else a[:, of], probe),
        "read_BxPxT": jax.nn.one_hot(jnp.concatenate(at), tokens.shape[1]) if P else None,
        "steer": steer,
        "enter": None if below is None else ("tuned", below),
    }


def _in_order(token_K: jax.Array, cosine_K: jax.Array, held_5: jax.Array) -> jax.Array:
    """[J], as `loss_names` has it."""
    others = jnp.stack([token_K[1:], cosine_K[1:]], 1).reshape(-1)
    return jnp.concatenate([token_K[:1], cosine_K[:1], held_5, others])


def counts(batch: Batch, K: int) -> tuple[jax.Array, jax.Array]:
    """How much each loss [J] and each behavior's cosine [K] averages over.

    Known before any forward, so micro-batches add up.
    """
    b, kept = batch.examples, batch.retention
    of_KxB = (jnp.arange(K)[:, None] == b.of_B).astype(jnp.float32)
    token_K, cosine_K = of_KxB @ b.weight_BxLxC.sum((1, 2)), of_KxB @ b.cosine_BxT.sum(1)
    held_5 = jnp.ones(5).at[4].set(match_weight(b).sum())
    if kept is not None:
        held_5 = held_5.at[:2].set(kept.weight_BxL.sum()).at[2].set(kept.own_BxL.sum())
    if b.goes_on_BxL is not None:
        held_5 = held_5.at[3].set(b.goes_on_BxL.sum())
    n_J = _in_order(token_K, cosine_K, held_5)
    return jnp.maximum(n_J, _NONE), jnp.maximum(cosine_K, _NONE)


def weights_at(objective: Objective, step: jax.Array, steps: int) -> jax.Array:
    """[J]: the losses' weights at an optimizer step, linear between the two ends of `anneal`."""
    done = step / max(steps - 1, 1)
    first_J, last_J = objective.anneal_Jx2.T
    return objective.weight_J * (first_J + (last_J - first_J) * done)
