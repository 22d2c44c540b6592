"""The step compiled ahead of step 0, and what is said of it then."""

import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from reptune_jax import program
from reptune_jax.model.arch import Arch
from reptune_jax.tuning import collectives, cost, hardware


def compile_step(
    step: jax.stages.Wrapped,
    args: tuple[Any, ...],
    arch: Arch,
    train: FrozenConfigDict,
    mesh: Mesh | None,
) -> Callable[..., Any]:
    """`step` compiled for `args` = (state, task, batch, measure).

    So a step that does not fit is known in the first minute, and so is what it will send around.
    """
    state, _, batch, _ = args
    program.say(cost.describe(arch, train, state.trained, batch))
    began = time.monotonic()
    compiled: Any = step.lower(*args).compile()
    program.say(f"compiled in {time.monotonic() - began:.1f} s; {cost.memory(compiled)}")
    found = collectives.traffic(compiled.as_text(), mesh) if mesh is not None else {}
    for line in collectives.lines(found):
        program.say(line)
    program.say(hardware.about_peak(jax.devices()[0].device_kind, train.peak_tflops))
    return compiled
