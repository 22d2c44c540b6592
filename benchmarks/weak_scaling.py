"""Weak scaling by the compiler's count: the same rows on each device, on 1, 2, 4, … devices.

    python -m benchmarks.weak_scaling [--kind cpu|v5e] [--devices 64] [--rows 4] [--tokens 512]

Compiles the real training step for each number of devices, without weights, and prints what one
device computes, reads and writes, sends and holds. Nothing is timed. `cpu` partitions for forced
CPU devices; `v5e` asks the TPU compiler (`pip install -e ".[plan]"`).
"""

import argparse
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from reptune_jax import config as configs
from reptune_jax import mesh as meshes
from reptune_jax import ranges
from reptune_jax.cost import hardware
from reptune_jax.cost.collectives import traffic
from reptune_jax.model import families
from reptune_jax.plan import abstract
from reptune_jax.plan import compiled as plan

# Three layers of Llama-2-7B, the middle one trained. Each is a segment of its own: XLA counts a
# loop's body once, so here it counts everything.
SHAPE = {**hardware.SHAPES["llama-2-7b"], "num_hidden_layers": 3}
TUNED = (1, 2)
SIZES = (1, 2, 4, 8, 16, 32, 64)
V5E = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8"}  # the compiler has no fewer


class Cost(NamedTuple):
    """Of one device in one step."""

    gflop: float
    accessed_mib: float  # reads and writes of every operation, before caches
    sent_mib: float
    temporary_mib: float
    state_mib: float  # weights and moments it holds


def settings(rows: int) -> ConfigDict:
    """Attention's projections of the middle layer, all rows with labels, none for retention."""
    c = configs.default()
    c.model, c.train.modules = "none", ("attn/q", "attn/k", "attn/v", "attn/o")
    c.train.layers = c.loss.layers = TUNED
    c.train.batch, c.loss.retain = rows, 0.0
    return ranges.check(c)


def measure(devices: list[Any], rows: int, tokens: int) -> Cost:
    """Compiles the step with weights and rows spread over these devices."""
    mesh, n = meshes.make_mesh(fsdp=len(devices), devices=devices), len(devices)
    dtype = jnp.dtype("float32" if devices[0].platform == "cpu" else "bfloat16")
    arch = families.from_config(SHAPE)
    step, args = abstract.step(settings(rows * n), arch, dtype, mesh, tokens, tokens // 4)
    # Not to be measured, as a constant of the step itself: XLA counts a branch, taken or not, and
    # on several devices does not drop one whose constant comes from an outer function.
    plain = inspect.unwrap(step)
    once = jax.jit(lambda *args: plain(*args, np.False_), donate_argnums=0)
    compiled = once.lower(*args[:3]).compile()
    text = compiled.as_text()
    if " conditional(" in text:
        raise ValueError(f"{n} devices: a branch is left, whose FLOPs and bytes would count.")
    counted, memory = compiled.cost_analysis(), compiled.memory_analysis()
    sent = sum(t.bytes_sent for t in traffic(text, mesh).values())
    return Cost(
        counted["flops"] / 1e9,
        counted["bytes accessed"] / 2**20,
        sent / 2**20,
        memory.temp_size_in_bytes / 2**20,
        abstract.gib_per_device((args[0], args[1].frozen)) * 2**10,
    )


def line(n: int, cost: Cost, first: Cost) -> str:
    """A row of the Markdown table."""
    return (
        f"| {n} | {cost.gflop:.2f} | **{cost.gflop / first.gflop:.3f}** | {cost.accessed_mib:.0f} "
        f"| **{cost.accessed_mib / first.accessed_mib:.3f}** | {cost.sent_mib:.1f} "
        f"| {cost.temporary_mib:.1f} | {cost.state_mib:.1f} |"
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=("cpu", "v5e"), default="cpu")
    parser.add_argument("--devices", type=int, default=64, help="most devices, a power of two")
    parser.add_argument("--rows", type=int, default=4, help="rows of one device")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a row")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.devices)

    heads = "devices", "GFLOP", "of first", "MiB accessed", "of first", "MiB sent"
    heads += "MiB temporary", "MiB held"
    print(f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", sep="\n")
    first = None
    for n in (n for n in SIZES if n <= args.devices and (args.kind == "cpu" or n in V5E)):
        devices = jax.devices()[:n] if args.kind == "cpu" else plan.tpu_devices("v5e", V5E[n])
        cost = measure(devices, args.rows, args.tokens)
        first = first or cost
        print(line(n, cost, first), flush=True)


if __name__ == "__main__":
    main()
