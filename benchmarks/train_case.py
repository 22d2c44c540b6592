"""The training case: one step of the dual loss on 16 x 96 tokens, 32 of them labels."""

import copy
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from ml_collections import ConfigDict, FrozenConfigDict

from benchmarks import torch_baseline
from benchmarks.timing import Call, Case
from reptune_jax import config as configs
from reptune_jax.data import batches
from reptune_jax.model.transformer import Decoder
from reptune_jax.tuning import base_cache, partition
from reptune_jax.tuning import step as steps
from reptune_jax.tuning.objective import make_objective
from reptune_jax.vectors.steering_vector import SteeringVector
from tests.support.torch_reference import Batch, Objective

B, T, LABELS = 16, 96, 32
LR = 3e-4


class Work(NamedTuple):
    """What both sides are given: tokens, directions, trained layers [first, stop)."""

    ids_BxT: np.ndarray
    directions_NxD: np.ndarray
    layers: tuple[int, int]


def training(rt_model: Any, torch_model: Any, _tokenizer: Any, _args: Any) -> Case:
    """v and o of the middle third of the layers (10 to 19 of SmolLM2's 30) under AdamW."""
    a, rng = rt_model.arch, np.random.default_rng(0)
    work = Work(
        rng.integers(0, a.V, (B, T)).astype(np.int32),
        rng.standard_normal((a.N, a.D)).astype(np.float32),
        (a.N // 3, 2 * a.N // 3),
    )
    return Case(_jax_steps(rt_model, work), _torch_steps(torch_model, work), _same_losses)


def settings(layers: tuple[int, int]) -> ConfigDict:
    """The project's own config of a dual run; what torch does not do is off."""
    c = configs.default()
    c.loss.layers = c.train.layers = layers
    c.train.update(lr=LR, batch=B, warmup=0, decay="none", clip=0.0)
    return c


def _jax_steps(model: Any, work: Work) -> Call:
    c = settings(work.layers)
    train = FrozenConfigDict(c.train)
    cuts = partition.segments(model.arch.N, work.layers)
    decoder = Decoder(model.arch, cuts, model.dtype, "dots")
    trained, frozen = partition.split(model.params, work.layers, c.train.modules)
    vector = SteeringVector(
        work.directions_NxD,
        np.ones(model.arch.N, np.float32),
        np.zeros_like(work.directions_NxD),
        tuple(range(model.arch.N)),
        {},
    )
    objective, step = make_objective(c, vector, frozen), steps.make_step(decoder, train)
    # As `train` does: what enters the lowest trained layer is computed once for a row.
    known = base_cache.add_below(rows(work.ids_BxT, LABELS), model, decoder, objective, batch=B)
    batch = jax.device_put(batches.Batch(known, None))
    state, losses = steps.init_state(trained, train), []

    def run() -> list[float]:
        nonlocal state
        state, metrics = jax.block_until_ready(step(state, objective, batch, jnp.asarray(False)))
        losses.append(float(metrics["loss"]))
        return losses

    return run


def rows(ids_BxT: np.ndarray, labels: int) -> batches.Examples:
    """Each row's last `labels` tokens are its labels, and those whose cosine counts."""
    T = ids_BxT.shape[1]
    first = T - labels
    examples = [
        batches.Example(
            ids, list(range(first - 1, T - 1)), [[(i, 1.0)] for i in ids[first:]], (first, T)
        )
        for ids in ids_BxT.tolist()
    ]
    return batches.stack_examples(examples, pad_id=0, T=T)


def _torch_steps(model: Any, work: Work) -> Call:
    layers = range(*work.layers)
    ids_BxT = torch.tensor(work.ids_BxT, dtype=torch.long, device=model.device)
    label_BxT = (torch.arange(T, device=model.device) >= T - LABELS).long().expand(B, T)
    batch = Batch(ids_BxT, torch.ones_like(ids_BxT), label_BxT, label_BxT)
    directions = {l: torch.tensor(work.directions_NxD[l], device=model.device) for l in layers}
    objective, losses = Objective(directions), []
    # A copy, so that the cases after this one meet the untuned model.
    own = copy.deepcopy(model)
    optimizer = torch_baseline.optimizer_for(own, layers, LR)

    def run() -> list[float]:
        parts = torch_baseline.train_step(own, optimizer, batch, objective)
        losses.append(float(parts.total.detach()))
        return losses

    return run


def _same_losses(a: list[float], b: list[float]) -> str:
    apart = max(abs(x - y) for x, y in zip(a, b, strict=True))
    return (
        f"loss {a[0]:.4f} to {a[-1]:.4f} in {len(a)} steps, at most {apart:.1e} apart from torch's"
    )
