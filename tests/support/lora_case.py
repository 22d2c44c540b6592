"""LoRA runs as the tests of adapters, PEFT and conversion share them; and a sharded one.

Run by test_lora on 8 forced devices: python -m tests.support.lora_case MODEL OUT 2x2x2
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from reptune_jax import lm, mesh
from reptune_jax.folder import Run
from reptune_jax.model import lora
from reptune_jax.tuned_run import Progress
from reptune_jax.tuning import checkpoint, partition
from reptune_jax.tuning import step as steps
from tests.support import tuning_case

ALL = ("attn", "mlp")  # every projection


def settings(rank=4, **changes):
    return tuning_case.settings(train__lora__rank=rank, train__lora__alpha=8.0, **changes)


def moved(trained, seed=0):
    """The leaves of a run that has learned something: no B is zero, whole weights have changed."""
    rng = np.random.default_rng(seed)
    return {
        path: jnp.asarray(np.asarray(leaf) + 0.05 * rng.standard_normal(leaf.shape), jnp.float32)
        for path, leaf in trained.items()
    }


def make_run(folder: Path, model: lm.Model, rank: int = 4, modules=("attn/v", "attn/o")):
    """A finished run's folder without the training; (folder, trained leaves, meta)."""
    c = settings(rank, train__modules=modules)
    c.model, c.train.lora.rank = model.name, rank
    Run(folder).claim(c)
    case = tuning_case.case(model, c)
    state = case.state.replace(trained=moved(case.state.trained))
    meta = {
        "config": c.to_dict(),
        "model": model.name,
        "model_sha": model.sha,
        "vector": "",
        "layers": list(c.train.layers),
        "lora": partition.about(model.arch, c.train),
    }
    saved = checkpoint.Checkpoints(folder)
    saved.save(state, meta, Progress(val_loss=1.0, best=1.0))
    saved.close()
    return folder, {k: np.asarray(v) for k, v in state.trained.items()}, meta


def three_steps(model, where=None):
    c = settings(train__modules=ALL, train__lr=1e-3, train__eps=1e-3)
    case, losses = tuning_case.case(model, c, mesh=where), []
    state = case.state
    step = steps.make_step(case.decoder, case.train, where)
    for seed in range(3):
        batch = mesh.put_batch(tuning_case.batch(model, B=8, seed=seed), where)
        state, metrics = step(state, case.objective, batch, jnp.asarray(False))
        losses.append(float(metrics["loss"]))
    return losses, state


def main(folder, out, shape):
    assert jax.device_count() == 8
    where = mesh.make_mesh(*(int(n) for n in shape.split("x")))
    losses, state = three_steps(lm.load(folder, "float32", where), where)
    shards = {p: a.sharding.shard_shape(a.shape) for p, a in state.trained.items()}
    assert shards[f"attn/v/{lora.A}"] == (2, 32, 4), shards
    assert shards[f"attn/o/{lora.A}"] == (2, 2, 16, 4), shards
    np.savez(out, losses=losses, **{k: np.asarray(v) for k, v in state.trained.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
