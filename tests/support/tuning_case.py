"""A tiny model, its batches and its objective, as tests of losses, steps and meshes share them."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from reptune_jax import config
from reptune_jax import mesh as meshes
from reptune_jax.data.batches import Batch, Example, Retention, stack_examples
from reptune_jax.lm import Model
from reptune_jax.model.transformer import Decoder
from reptune_jax.tuned_run import TunedRun
from reptune_jax.tuning import partition, remat, retention
from reptune_jax.tuning import step as steps
from reptune_jax.tuning.objective import Objective, make_objective
from reptune_jax.vectors.steering_vector import SteeringVector

T = 16


def settings(**changes: Any) -> ConfigDict:
    """A config for models of four layers; keys with __ for dots."""
    c = config.default()
    c.loss.layers = c.train.layers = (1, 3)
    c.train.steps, c.train.warmup, c.train.lr, c.train.clip = 20, 0, 1e-2, 0.0
    c.train.decay = "none"
    for key, value in changes.items():
        c.update_from_flattened_dict({key.replace("__", "."): value})
    return c


def vector(model: Model, seed: int = 0) -> SteeringVector:
    rng, shape = np.random.default_rng(seed), (model.arch.N, model.arch.D)
    directions = rng.normal(size=shape).astype(np.float32)
    mean = rng.normal(size=shape).astype(np.float32)
    return SteeringVector(directions, np.ones(shape[0]), mean, tuple(range(shape[0])), {})


def examples(B: int, V: int, seed: int = 0, neutral: bool = False) -> list[Example]:
    """Rows of unequal length with unequally many labels and cosine tokens."""
    rng, out = np.random.default_rng(seed), []
    for b in range(B):
        lengths = rng.integers(3, 7, 2) if b else (6, 6)  # every batch has the same shape
        prompt, answer = (rng.integers(4, V, n).tolist() for n in lengths)
        P, end = len(prompt), len(prompt) + len(answer)
        targets = [[(t, 0.5), ((t + 1) % V, 0.5)] if neutral else [(t, 1.0)] for t in answer]
        out.append(Example(prompt + answer, list(range(P - 1, end - 1)), targets, (P, end)))
    return out


def batch(model: Model, B: int = 4, R: int = 0, neutral: bool = False, seed: int = 0) -> Batch:
    """B behavior rows and R retention rows (with as many random positions each)."""
    rows = stack_examples(examples(B, model.arch.V, seed, neutral), model.pad_id, T)
    return Batch(rows, retention_rows(model, R, seed) if R else None)


def retention_rows(
    model: Model, R: int, seed: int = 0, layers: tuple[int, int] | None = None
) -> Retention:
    rng = np.random.default_rng(seed + 100)
    pieces = [
        retention.Piece(rng.integers(4, model.arch.V, n).tolist(), 1, own=r % 2 == 1)
        for r, n in enumerate(rng.integers(6, T, R))
    ]
    return retention.Texts(model, pieces, T, 5, batch=R, layers=layers).take(np.arange(R))


@dataclasses.dataclass
class Case:
    """What `steps.gradient` and `steps.make_step` take."""

    decoder: Decoder
    state: steps.State
    objective: Objective
    train: FrozenConfigDict


def case(
    model: Model,
    c: ConfigDict,
    v: SteeringVector | None = None,
    mesh: Any = None,
    also: Any = None,
) -> Case:
    train = FrozenConfigDict(c.train)
    cuts = partition.segments(model.arch.N, train.layers)
    trained, frozen = partition.begin(model.arch, model.params, train, c.seed)
    v = vector(model) if v is None else v
    objective = make_objective(c, v, frozen, also, model.stop_ids)
    (choice,) = remat.choices(train.remat, "cpu")
    decoder = Decoder(model.arch, cuts, model.dtype, choice, rows=meshes.rows_of(mesh))
    return Case(decoder, steps.init_state(trained, train, mesh), objective, train)


def tuned(model: Model, trained: Any, layers: Any, adapters_of: Any = None) -> Model:
    """The model with the leaves of a run put in, as from a checkpoint."""
    meta = {"model_sha": model.sha, "layers": list(layers), "lora": adapters_of}
    return TunedRun(Path("run"), dict(trained), meta, 0).over(model)
