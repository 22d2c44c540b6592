"""Adapters on a base that is held in integers, as its tests share them; and sharded.

Run by test_integers on 8 forced devices: python -m tests.support.held_case MODEL OUT
"""

import sys

import jax
import numpy as np

from reptune_jax import frozen, mesh
from reptune_jax.hub.source import open_source
from reptune_jax.tuning import step as steps
from tests.support import lora_case, tuning_case

TUNED = (1, 7)
gradient = jax.jit(steps.gradient, static_argnums=(0, 5))


def settings(how, **changes):
    """Six of seven layers are tuned: no kernel or activation has a first dimension of six."""
    changes |= {"train__layers": TUNED, "loss__layers": TUNED, "train__base": how}
    return lora_case.settings(train__modules=("attn/q", "attn/o", "mlp/down"), **changes)


def run(base, c):
    """(gradients, mean losses, the compiled program's text).

    With 20 rows no activation is as large as a kernel.
    """
    case, batch = tuning_case.case(base, c, mesh=base.mesh), tuning_case.batch(base, B=20)
    trained = lora_case.moved(case.state.trained)
    args = trained, case.objective, batch, case.objective.weight_J
    compiled = gradient.lower(case.decoder, *args, 1).compile()
    grads, (mean_J, _) = compiled(*args)
    return grads, mean_J, compiled.as_text()


def main(folder, out):
    assert jax.device_count() == 8
    c = settings("int4", dtype="float32", train__remat="none")
    grads, mean_J, _ = run(frozen.load(open_source(folder), c, mesh.make_mesh(2, 2, 2)), c)
    refused = ""
    try:
        frozen.load(open_source(folder), c, mesh.make_mesh(1, 1, 8))
    except ValueError as e:
        refused = str(e)
    np.savez(out, mean_J=mean_J, refused=refused, **{k: np.asarray(g) for k, g in grads.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
