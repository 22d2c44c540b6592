"""What a decoded token costs: scanned layers and layers apart, against the device's bandwidth.

    python -m benchmarks.decode --shape=llama-3-8b --batches=1,8,32

Random bfloat16 weights are made on the device. Each form of the loop (`model/decode.py`) is the
program that `Model.generate` runs. One that stops every row at its first token is subtracted, so
that prefill, the cutting of the layers and compilation are in no time of a step.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from reptune_jax.cost import hardware
from reptune_jax.model import decode, families
from reptune_jax.model.arch import Arch
from reptune_jax.model.cache import init_cache
from reptune_jax.model.sampling import Sampling
from reptune_jax.model.transformer import Decoder, whole

SHAPES = {**hardware.SHAPES, "tiny": hardware._llama(320, 64, 96, 2, 4, 2)}
FORMS: dict[str, Callable[[Decoder], Decoder]] = {"scan": lambda d: d, "apart": decode.apart}

HEADER = """\
| rows | layers | ms a token | GB read a token | GB/s | of the copy | peak GiB | compilation s |
|---|---|---|---|---|---|---|---|"""


class Cost(NamedTuple):
    """Of one form of the loop at one batch size."""

    ms: float  # a step, median over rounds
    read_gb: float  # weights and cache, each once
    peak_gib: float  # arguments, results and temporaries of the program
    compile_s: float


def random_params(arch: Arch, dtype: Any) -> dict[str, Any]:
    """Weights of standard deviation .02, a leaf at a time; norms are 1."""
    one = jnp.ones((1, 1), jnp.int32)
    tree = jax.eval_shape(whole(arch, dtype).init, jax.random.key(0), one, one)["params"]
    leaves, kind = jax.tree.flatten(tree)

    @jax.jit
    def noise(key: jax.Array, like: jax.Array) -> jax.Array:
        return (0.02 * jax.random.normal(key, like.shape, dtype)).astype(dtype)

    def leaf(i: int, like: Any) -> jax.Array:
        if len(like.shape) < 3 and like.shape[0] in (arch.N, arch.D):
            return jnp.ones(like.shape, dtype)
        # Layer by layer: the random bits of a whole stack are larger than it is.
        empty = jnp.zeros(like.shape[1:] if len(like.shape) > 2 else like.shape, dtype)
        keys = jax.random.split(jax.random.key(i), like.shape[0])
        if len(like.shape) == 2:
            return noise(keys[0], empty)
        return jax.jit(lambda keys: jax.lax.map(lambda key: noise(key, empty), keys))(keys)

    return jax.tree.unflatten(kind, [leaf(i, like) for i, like in enumerate(leaves)])


def read_bytes(arch: Arch, params: dict[str, Any], B: int, S: int, dtype: Any) -> int:
    """All layers, the final norm and the table of logits, once; every slot of the cache, once."""
    table = params["embed" if arch.tied else "head"]
    weights = sum(a.nbytes for a in jax.tree.leaves((params["blocks"], params["final_norm"])))
    cache = 2 * arch.N * B * arch.K * S * arch.Dh * jnp.dtype(dtype).itemsize
    return weights + sum(a.nbytes for a in jax.tree.leaves(table)) + cache


def measure(
    form: str, arch: Arch, params: Any, dtype: Any, work: argparse.Namespace, B: int
) -> Cost:
    """Compiles and times one form."""
    decoder, S = FORMS[form](whole(arch, dtype)), work.prompt + work.tokens + 1
    prompt = jnp.ones((B, work.prompt), jnp.int32)
    never = jnp.full((B,), -1, jnp.int32)

    def args(stop_ids: jax.Array) -> tuple[Any, ...]:
        cache = init_cache(arch, decoder.segments, B, S, dtype)
        rest = None, stop_ids, Sampling(), jax.random.key(0)
        return params, prompt, prompt, cache, *rest

    start = time.perf_counter()
    lowered = decode.generate.lower(decoder, *args(never), max_new=work.tokens + 1)
    program = lowered.compile()
    compile_s = time.perf_counter() - start

    def seconds(stop_ids: jax.Array) -> float:
        given = jax.block_until_ready(args(stop_ids))
        start = time.perf_counter()
        jax.block_until_ready(program(*given))
        return time.perf_counter() - start

    new_BxM, _ = program(*args(never))
    first_B = new_BxM[:, 0]
    seconds(first_B)
    steps = [(seconds(never) - seconds(first_B)) / work.tokens for _ in range(work.rounds)]
    m = program.memory_analysis()
    peak = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes
    return Cost(
        statistics.median(steps) * 1e3,
        read_bytes(arch, params, B, S, dtype) / 1e9,
        (peak - m.alias_size_in_bytes) / 2**30,
        compile_s,
    )


def copy_gb_per_s(mib: int, rounds: int) -> float:
    """Bytes read plus bytes written a second by a copy of a large array, the fastest of rounds."""
    x = jnp.zeros(mib * 2**20, jnp.uint8)
    copy = jax.jit(jnp.copy)
    times = []
    jax.block_until_ready(copy(x))
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready([copy(x) for _ in range(4)])
        times.append((time.perf_counter() - start) / 4)
    return 2 * x.nbytes / min(times) / 1e9


def main(argv: list[str] | None = None) -> None:
    """Prints one row of a table for every batch size and form."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--batches", default="1,8,32", help="rows, separated by commas")
    parser.add_argument("--prompt", type=int, default=128, help="tokens before the first new one")
    parser.add_argument("--tokens", type=int, default=64, help="steps of a timed run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    work = parser.parse_args(argv)
    arch, dtype = families.from_config(SHAPES[work.shape]), jnp.dtype(work.dtype)
    copied = copy_gb_per_s(16 if work.shape == "tiny" else 2048, work.rounds)
    print(f"{work.shape}, {work.dtype}, {work.prompt} prompt tokens, {work.tokens} steps a run")
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, copy {copied:,.0f} GB/s")
    print(HEADER, flush=True)
    params = jax.block_until_ready(random_params(arch, dtype))
    for B in map(int, work.batches.split(",")):
        for form in FORMS:
            cost = measure(form, arch, params, dtype, work, B)
            rate = cost.read_gb / cost.ms * 1e3
            print(
                f"| {B} | {form} | {cost.ms:.3f} | {cost.read_gb:.4g} | {rate:,.4g} "
                f"| {rate / copied:.0%} | {cost.peak_gib:.4g} | {cost.compile_s:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
