"""A plan: the real step compiled ahead of time for devices that are not here, and read."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from reptune_jax import config as configs
from reptune_jax import depth
from reptune_jax import mesh as meshes
from reptune_jax.cost import collectives, flops, hardware
from reptune_jax.cost.collectives import Traffic, traffic
from reptune_jax.model import families
from reptune_jax.model.arch import Arch
from reptune_jax.plan import abstract
from reptune_jax.tuning import remat

# A CPU multiplies bfloat16 in float32, and would make a float32 copy of all layers' weights before
# the loop over them: four times their memory with the transposes, and none of it on a GPU.
_AS_FOR_GPU = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}


class Plan(NamedTuple):
    """What is known of a step without running it."""

    memory: dict[str, float]  # GiB per device by kind
    flops: dict[str, float]  # of all devices together, by formula
    traffic: dict[tuple[str, str], Traffic]
    seconds: float  # that compiling took
    error: str  # the compiler's, where the step does not fit

    def fits(self, chip: hardware.Chip) -> bool:
        """Whether one of a chip's devices has the memory."""
        return not self.error and sum(self.memory.values()) <= chip.hbm_gib


def run(c: ConfigDict, topology: str, model_config: str, tokens: int, labels: int) -> None:
    """Prints the plan; exits with 2 where the step does not fit."""
    kind, shape = hardware.parse(topology)
    arch = families.from_config(_shape_of(model_config or c.model))
    depth.settle(c, lambda: arch.N)
    mesh = meshes.make_mesh(**c.mesh.to_dict(), devices=_devices(kind, shape))
    dtype = jnp.dtype(c.dtype or "bfloat16")
    chip = hardware.CHIPS.get(kind)
    for choice in remat.choices(c.train.remat, kind):
        c.train.remat = choice
        plan = make(c, arch, dtype, mesh, tokens, labels, kind)
        if chip is None or plan.fits(chip):
            break
    text = lines(c, arch, mesh, kind, plan, tokens)
    print("\n".join(text))
    if any(line.startswith("DOES NOT FIT") for line in text):
        sys.exit(2)


def make(c: ConfigDict, arch: Arch, dtype: Any, mesh: Mesh, T: int, L: int, kind: str) -> Plan:
    """Lowers and compiles for chips of a `kind`."""
    options = _AS_FOR_GPU if kind in hardware.CHIPS and not hardware.is_tpu(kind) else {}
    step, args = abstract.step(c, arch, dtype, mesh, T, L)
    memory = _arguments(args)
    began, error, moved = time.monotonic(), "", {}
    try:
        compiled = step.lower(*args).compile(options)
    except jax.errors.JaxRuntimeError as e:
        if not remat.is_too_large(e):
            raise
        text = str(e).splitlines()  # the compiler's sentence that says how much it wanted
        error = next((s for s in text if "Used" in s or "exceed" in s), text[0]).strip().rstrip(".")
    else:
        found = compiled.memory_analysis()
        memory["temporaries"] = found.temp_size_in_bytes / 2**30
        memory["outputs"] = (found.output_size_in_bytes - found.alias_size_in_bytes) / 2**30
        memory["program"] = found.generated_code_size_in_bytes / 2**30
        moved = traffic(compiled.as_text(), mesh)
    seconds = time.monotonic() - began
    work = flops.batch_flops(arch, tuple(c.train.layers), args[0].trained, args[2])
    return Plan(memory, work, moved, seconds, error)


def lines(c: ConfigDict, arch: Arch, mesh: Mesh, kind: str, plan: Plan, T: int) -> list[str]:
    """The plan as text."""
    rows = c.train.batch + (c.train.retain_batch if configs.retains(c) else 0)
    first, stop = c.train.layers
    shape = " x ".join(f"{k} {v}" for k, v in mesh.shape.items())
    chip = hardware.CHIPS.get(kind)
    out = [
        f"{arch.family}, {arch.N} layers of {arch.D}; trains {', '.join(c.train.modules)} "
        f"of layers {first} to {stop - 1}; {rows} rows of {T} tokens, remat {c.train.remat}"
        + (f"; frozen kernels in {c.train.base}" if c.train.base else ""),
        f"{mesh.size} x {chip.name if chip else 'CPU'}: mesh {shape}; compiled in "
        f"{plan.seconds:.0f} s" + ("" if hardware.is_tpu(kind) else ", on forced CPU devices"),
        "",
        "memory per device, GiB",
        *(f"  {name:<18}{gib:>8.2f}" for name, gib in plan.memory.items()),
        f"  {'together':<18}{sum(plan.memory.values()):>8.2f}",
    ]
    out += ["", "model TFLOP a step, all devices"]
    out += [f"  {name:<18}{flops / 1e12:>8.1f}" for name, flops in plan.flops.items()]
    if plan.traffic:
        out += ["", *collectives.lines(plan.traffic, "GiB")]
    return out + ["", *_verdict(c, mesh, chip, plan)]


def _verdict(c: ConfigDict, mesh: Mesh, chip: hardware.Chip | None, plan: Plan) -> list[str]:
    if chip is None:
        return []
    # Least HBM traffic: weights read forward and back, masters and moments read and written.
    state = plan.memory["trained weights"] + plan.memory["optimizer"]
    moved = 2 * (plan.memory["frozen weights"] + state) * 2**30
    math_s, memory_s = chip.seconds(plan.flops["total"] / mesh.size, moved)
    least_s = max(math_s, memory_s)
    hours = c.train.steps * least_s * mesh.size / 3600
    out = [
        f"no step is faster than {least_s:.3f} s: arithmetic at peak {math_s:.3f} s, "
        f"weights once through HBM {memory_s:.3f} s (collectives and activations not counted)",
        f"{c.train.steps} steps cost at least {hours:.2g} device-hours",
    ]
    need = sum(plan.memory.values())
    if not plan.fits(chip):
        why = plan.error or f"{need:.1f} GiB of {chip.hbm_gib:.1f}"
        turn = hardware.advice(plan.memory, mesh.shape, c.train.remat)
        return [*out, f"DOES NOT FIT: {why}. Turn:", *(f"  {knob}" for knob in turn)]
    return [*out, f"fits: {need:.1f} GiB of {chip.hbm_gib:.1f}"]


def _arguments(args: tuple) -> dict[str, float]:
    state, objective, batch, _ = args
    return {
        "frozen weights": abstract.gib_per_device(objective.frozen),
        "trained weights": abstract.gib_per_device(state.trained),
        "optimizer": abstract.gib_per_device(state.opt),
        "batch": abstract.gib_per_device(batch),
    }


def _shape_of(name: str) -> dict[str, Any]:
    if name in hardware.SHAPES:
        return hardware.SHAPES[name]
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"--model-config: got {name!r}, expected a config.json or one of "
            f"{', '.join(hardware.SHAPES)}."
        )
    return json.loads(path.read_text())


def _devices(kind: str, shape: str) -> list[Any]:
    """Devices to compile for; must come before anything else that touches jax's devices."""
    jax.config.update("jax_platforms", "cpu")
    if not hardware.is_tpu(kind):
        n = 1
        for part in shape.split("x"):
            n *= int(part)
        jax.config.update("jax_num_cpu_devices", n)
        return jax.devices()
    return tpu_devices(kind, shape)


def tpu_devices(kind: str, shape: str) -> list[Any]:
    """The chips of a topology, as the TPU compiler knows them.

    Raises:
      ValueError: it does not know them, or is not installed.
    """
    # There is no TPU to ask about itself, and no use in complaining of that.
    quiet = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-1"}
    quiet |= {"TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "TPU_SKIP_MDS_QUERY": "1"}
    # None is opened either, so other processes that compile at the same time are no trouble.
    quiet |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    os.environ.update(quiet)
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{shape}")
    except Exception as e:
        raise ValueError(
            f"--topology: the TPU compiler has no {kind}:{shape} ({str(e).splitlines()[0]}). "
            'Needs `pip install -e ".[plan]"` and a shape such as v5e:4x4 or v5p:2x2x1.'
        ) from None
    return list(found.devices)
