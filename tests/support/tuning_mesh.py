"""Run by test_mesh on 8 forced devices: python -m tests.tuning_mesh MODEL OUT 8x1x1 2x4x1 …"""

import contextlib
import io
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from reptune_jax import lm, mesh
from reptune_jax.data import packing
from reptune_jax.data.batches import Batch
from reptune_jax.hub import digest
from reptune_jax.tuned_run import Progress
from reptune_jax.tuning import checkpoint, loop
from tests.support import tuning_case

STEPS = 20


def in_rows(side, shape):
    """All texts of a side, several of them in a row."""
    at = np.arange(len(side.tokens_BxT))
    return packing.pack(side, packing.arrange(side, at, shape.tokens), shape)


def some_steps(model, where=None, packed=False):
    """(losses, state, what is known of layouts and compilations) of a short run."""
    case, losses = new_case(model, where), []
    batches = [tuning_case.batch(model, B=16, R=16, seed=seed) for seed in range(STEPS)]
    if packed:
        shape = packing.Shape(16, 32, 25)
        batches = [Batch(in_rows(b.examples, shape), in_rows(b.retention, shape)) for b in batches]
        assert all((b.examples.mask_BxT.any(1)).sum() <= 8 for b in batches)
    batches = [mesh.put_batch(batch, where) for batch in batches]
    state, seen, measure = case.state, {"before": layout(case.state)}, jnp.asarray(False)
    # Compiled ahead, as the loop does: another layout after a step would be an error.
    args = state, case.objective, batches[0], measure
    with contextlib.redirect_stdout(io.StringIO()) as out:
        step = loop.compiled(case.decoder, args, case.train, where)
    seen["said"] = out.getvalue().splitlines()
    for batch in batches:
        state, metrics = step(state, case.objective, batch, measure)
        losses.append(float(metrics["loss"]))
    return losses, state, seen | {"after": layout(state)}


def new_case(model, where):
    c = tuning_case.settings(
        train__modules=("attn/v", "attn/o", "mlp/down", "norm"),
        train__accumulate=1 if where is None else 2,
        train__lr=1e-3,
        train__eps=1e-3,  # else Adam turns rounding noise in tiny gradients into whole steps
        loss__retain=0.5,
    )
    return tuning_case.case(model, c, mesh=where)


def layout(state):
    """Shape of each weight and its moments on one device."""

    def shards(tree):
        return {p: list(a.sharding.shard_shape(a.shape)) for p, a in tree.items()}

    get = optax.tree_utils.tree_get
    trees = {"weight": state.trained, "mu": get(state.opt, "mu"), "nu": get(state.opt, "nu")}
    found = {name: shards(tree) for name, tree in trees.items()}
    return {p: {name: found[name][p] for name in found} for p in state.trained}


def restore_on(shape, folder, out):
    """Digests of the last checkpoint, restored onto this mesh, and one weight's layout there."""
    where = mesh.make_mesh(*(int(n) for n in shape.split("x")))
    like = new_case(lm.load(folder, "float32", where), where).state
    saved = checkpoint.Checkpoints(out)
    state, _ = saved.restore(like, {})
    saved.close()
    v = state.trained["attn/v/kernel"]
    return {
        "digests": digest.digests(state),
        "same layout": v.sharding == like.trained["attn/v/kernel"].sharding,
    }


def message(call, *args):
    try:
        call(*args)
    except ValueError as e:
        return str(e)
    raise AssertionError("no error")


def main(folder, out, *shapes):
    out = Path(out)
    assert jax.device_count() == 8
    for shape in shapes:
        where = mesh.make_mesh(*(int(n) for n in shape.split("x")))
        losses, state, seen = some_steps(lm.load(folder, "float32", where), where)
        (out / f"{shape}.json").write_text(json.dumps({"losses": losses, **seen}))
        np.savez(out / f"{shape}.npz", **{k: np.asarray(v) for k, v in state.trained.items()})
    where = mesh.make_mesh(2, 4, 1)
    losses, packed, _ = some_steps(lm.load(folder, "float32", where), where, packed=True)
    (out / "packed.json").write_text(json.dumps({"losses": losses}))
    np.savez(out / "packed.npz", **{k: np.asarray(v) for k, v in packed.trained.items()})
    saved = checkpoint.Checkpoints(out)
    saved.save(state, {"from": shapes[-1]}, Progress(val_loss=1.0))
    saved.close()
    restored = {shape: restore_on(shape, folder, out) for shape in shapes}
    (out / "restored.json").write_text(json.dumps(restored))

    errors = {
        "heads": message(lm.load, folder, "float32", mesh.make_mesh(1, 1, 8)),
        "batch": message(mesh.put_batch, {"x": np.zeros((6, 2))}, mesh.make_mesh(8)),
        "sizes": message(mesh.make_mesh, 3),
        "too many": message(mesh.make_mesh, -1, 16),
    }
    (out / "errors.json").write_text(json.dumps(errors))


if __name__ == "__main__":
    main(*sys.argv[1:])
