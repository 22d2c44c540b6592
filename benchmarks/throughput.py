"""What a training step's throughput depends on: step size, what is trained, length of the rows.

    python -m benchmarks.throughput [--model FOLDER] [--rounds 3] [--case NAME …]

Every case runs in turns with one base case on the same machine, so what is reported are ratios to
that base: tokens a second (padding included; there is none here) and model FLOPs a second. Above 1
is faster. The first step of each, which compiles, counts in no median.
"""

import argparse
import statistics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

import reptune_jax as rt
from benchmarks import train_case
from benchmarks.model import smollm2_folder
from benchmarks.timing import Call, Timing, alternate
from reptune_jax import program
from reptune_jax.cost import flops
from reptune_jax.data.batches import Batch
from reptune_jax.model.transformer import Decoder
from reptune_jax.tuning import partition
from reptune_jax.tuning import step as steps
from reptune_jax.tuning.objective import make_objective
from reptune_jax.vectors.steering_vector import SteeringVector

MIDDLE = (1 / 3, 2 / 3)
EVERY = ("attn", "mlp")  # all projections, and the norms of whole-weight runs


class Size(NamedTuple):
    """One step: half of each row's tokens are labels; layers as shares of the depth."""

    rows: int = 8
    tokens: int = 64
    accumulate: int = 1
    layers: tuple[float, float] = MIDDLE
    modules: tuple[str, ...] = ("attn/v", "attn/o")
    rank: int = 0


BASE = Size()
CASES = {
    "half the rows": BASE._replace(rows=4),
    "twice the rows": BASE._replace(rows=16),
    "twice, in 2 micro-batches": BASE._replace(rows=16, accumulate=2),
    "same, in 4 micro-batches": BASE._replace(accumulate=4),
    "lowest third": BASE._replace(layers=(0, 1 / 3)),
    "highest third": BASE._replace(layers=(2 / 3, 1)),
    "all layers": BASE._replace(layers=(0, 1)),
    "all projections": BASE._replace(modules=EVERY),
    "LoRA of rank 16": BASE._replace(rank=16),
    "LoRA on all projections": BASE._replace(rank=16, modules=EVERY),
    "rows of 32": BASE._replace(rows=16, tokens=32),
    "rows of 128": BASE._replace(rows=4, tokens=128),
    "rows of 256": BASE._replace(rows=2, tokens=256),
}


class Work(NamedTuple):
    """A step that can be run again and again."""

    run: Call
    tokens: int
    trained: int
    flops: float


def work(model: Any, size: Size) -> Work:
    """The step of `train` on random tokens, at a size; its state stays on the device."""
    a, rng = model.arch, np.random.default_rng(0)
    first, stop = (round(share * a.N) for share in size.layers)
    c = train_case.settings((first, stop))
    c.train.update(batch=size.rows, accumulate=size.accumulate, modules=size.modules)
    c.train.lora.rank = size.rank
    train = FrozenConfigDict(c.train)
    trained, frozen = partition.begin(a, model.params, train, c.seed)
    v_NxD = rng.standard_normal((a.N, a.D)).astype(np.float32)
    vector = SteeringVector(v_NxD, np.ones(a.N), np.zeros_like(v_NxD), tuple(range(a.N)), {})
    ids_BxT = rng.integers(0, a.V, (size.rows, size.tokens)).astype(np.int32)
    batch = jax.device_put(Batch(train_case.rows(ids_BxT, size.tokens // 2), None))
    decoder = Decoder(a, partition.segments(a.N, train.layers), model.dtype, "dots")
    objective, step = make_objective(c, vector, frozen), steps.make_step(decoder, train)
    state, no = steps.init_state(trained, train), jnp.asarray(False)

    def run() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(step(state, objective, batch, no))

    work = flops.batch_flops(a, (first, stop), state.trained, batch)["total"]
    n = sum(leaf.size for leaf in state.trained.values())
    return Work(run, ids_BxT.size, n, work)


HEADER = """\
| case | rows x tokens | micro-batches | trained, millions | TFLOP | s a step | tokens/s of base | FLOP/s of base |
|---|---|---|---|---|---|---|---|"""  # noqa: E501


def row(name: str, size: Size, this: Work, base: Work, seconds: float, faster: float) -> str:
    """One row of the table; `faster`: how many steps of this one fit into one of the base."""
    cells = [name, f"{size.rows} x {size.tokens}", f"{size.accumulate}"]
    cells += [f"{this.trained / 1e6:.2f}", f"{this.flops / 1e12:.3f}", f"{seconds:.2f}"]
    cells += [f"**{faster * this.tokens / base.tokens:.2f}**"]
    cells += [f"{faster * this.flops / base.flops:.2f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Prints one Markdown table, a row as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model", help="a Hugging Face folder or .gguf file; SmolLM2-135M-Instruct, fetched once"
    )
    parser.add_argument("--case", choices=CASES, action="append", help="may be repeated; all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    program.start()
    model = rt.load(str(args.model or smollm2_folder()), dtype=args.dtype)
    print(f"{model.name}, {args.dtype}; jax {jax.__version__}, {jax.devices()[0].device_kind}")
    print(f"{HEADER}", flush=True)
    base, base_s = work(model, BASE), []
    for name in args.case or CASES:
        this = work(model, CASES[name])
        timing: Timing = alternate(this.run, base.run, args.rounds)
        base_s += timing.times_b
        seconds = statistics.median(timing.times_a)
        print(row(name, CASES[name], this, base, seconds, timing.ratio), flush=True)
    print(row("base", BASE, base, base, statistics.median(base_s), 1.0))


if __name__ == "__main__":
    main()
