"""Times LoRA runs of every tuned arm, trained together and one after the other, on this machine.

    python -m benchmarks.arms_in_one [--model FOLDER_OR_GGUF] [--seeds 3] [--steps 24] [--runs 2]

Without --model, a tiny random one. Both sides are what `study` does, with `study.together` and
without: logs, validation and checkpoints included; texts are random tokens, so no answers have to
be written first. The first call of each side compiles; later ones find the programs in the cache
that programs keep, each side in its own. A ratio above 1 means that together is faster.
"""

import argparse
import dataclasses
import statistics
import tempfile
from pathlib import Path

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from benchmarks.timing import Call, alternate
from reptune_jax import config as configs
from reptune_jax import lm
from reptune_jax.data import batches, tuning
from reptune_jax.tuning import adapters, checkpoint, fleet, loop, retention, untuned
from reptune_jax.tuning.run import Corpus, Job
from reptune_jax.vectors.steering_vector import SteeringVector
from tests import tiny

BATCH, PROMPT, ANSWER = 6, 24, 24  # rows of a step, tokens of a row


def settings(arch, args: argparse.Namespace) -> ConfigDict:
    """As configs/sentiment.py trains, but with adapters."""
    c, first = configs.default(), args.first or arch.N // 3
    c.train.layers = c.loss.layers = (first, first + arch.N // 3)
    c.train.lora.rank = 8
    c.train.update(steps=args.steps, batch=BATCH, eval_every=12, measure_every=0, patience=0)
    c.loss.update(cosine=8.0, center=True, retain=4.0)
    return c


def corpus(model: lm.Model, seed: int, keep: batches.Keep) -> Corpus:
    """64 rows for training and 6 for validation."""
    rng = np.random.default_rng(seed)

    def rows(n: int) -> batches.Rows:
        texts = rng.integers(4, model.arch.V, (n, PROMPT + ANSWER)).tolist()
        examples = [tuning.response_example(t[:PROMPT], t[PROMPT:], "response") for t in texts]
        return batches.stack_examples(examples, model.pad_id, PROMPT + ANSWER)

    return Corpus(rows(64), rows(6), keep, keep, (64,), (BATCH,))


def make_keep(model: lm.Model) -> batches.Keep:
    """16 rows of retention text, 32 positions each."""
    rng, T = np.random.default_rng(9), PROMPT + ANSWER
    rows = rng.integers(4, model.arch.V, (16, T)).tolist()
    texts = [retention.Text(ids, 1, own=False) for ids in rows]
    return retention.make_keep(model, texts, T, 32)


def make_jobs(model: lm.Model, args: argparse.Namespace) -> list[Job]:
    """Every tuned arm x seeds; `out` has rows of its own. Folders are set at each call."""
    rng, shape = np.random.default_rng(0), (model.arch.N, model.arch.D)
    directions, mean = rng.standard_normal((2, *shape)).astype(np.float32)
    vector = SteeringVector(directions, np.ones(shape[0]), mean, tuple(range(shape[0])), {})
    keep, jobs = make_keep(model), []
    own, neutral = corpus(model, 1, keep), corpus(model, 2, keep)
    for seed in range(args.seeds):
        for arm in configs.TUNED_ARMS:
            c = settings(model.arch, args)
            c.arm, c.seed = arm, seed
            armed = configs.armed(c)
            used = vector.random_like(seed) if armed.vector.random else vector
            meta = {
                "config": c.to_dict(),
                "model_sha": model.sha,
                "vector": used.digest,
                "lora": adapters.about(model.arch, c.train),
            }
            rows = neutral if armed.loss.targets == "neutral" else own
            jobs.append(Job(armed, Path(f"{arm}+_s{seed}"), used, rows, meta))
    return jobs


def both_ways(model: lm.Model, jobs: list[Job]) -> tuple[Call, Call, dict[str, list[Job]]]:
    """Two calls that train all jobs into a new folder, and where each did so last."""
    last: dict[str, list[Job]] = {}

    def placed(side: str) -> list[Job]:
        # As in a process of its own, which finds the programs that earlier ones have compiled.
        jax.clear_caches()
        untuned._below.clear()
        jax.config.update("jax_compilation_cache_dir", f"{tempfile.gettempdir()}/xla {side}")
        compilation_cache.reset_cache()
        folder = Path(tempfile.mkdtemp())
        last[side] = [job._replace(folder=folder / job.folder) for job in jobs]
        return last[side]

    def together() -> None:
        fleet.tune(placed("together"), model)

    def in_turn() -> None:
        for job in placed("in turn"):
            loop.tune(job, model)

    return together, in_turn, last


def apart(a: list[Job], b: list[Job]) -> float:
    """Largest difference of an adapter's numbers, of the largest in its leaf."""
    found = 0.0
    for one, other in zip(a, b, strict=True):
        got, want = checkpoint.load_best(one.folder)[0], checkpoint.load_best(other.folder)[0]
        for path, leaf in want.items():
            scale = max(float(np.abs(leaf).max()), 1e-9)
            found = max(found, float(np.abs(got[path] - leaf).max()) / scale)
    return found


def trained(jobs: list[Job], together: bool) -> float:
    """Seconds from the first step to the last checkpoint, validation and saves included."""

    def of(job: Job) -> float:
        newest = max((job.folder / "checkpoints").iterdir(), key=lambda p: int(p.name))
        return checkpoint.Progress(*checkpoint.read_meta(newest)["progress"]).seconds

    if not together:
        return sum(of(job) for job in jobs)
    return sum(max(of(j) for group in groups for j in group) for groups in fleet.arrange(jobs))


def main() -> None:
    """Prints both times, with and without compilation, and how far the weights are apart."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a folder or .gguf file; a tiny random llama")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--first", type=int, default=0, help="first tuned layer; a third up")
    parser.add_argument("--runs", type=int, default=2, help="rounds after the first")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
        tempfile.tempdir = scratch
        model = lm.load(args.model or str(tiny.make_llama(Path(scratch, "llama"))), args.dtype)
        model = dataclasses.replace(model, name=Path(model.name).name)
        jobs = make_jobs(model, args)
        together, in_turn, last = both_ways(model, jobs)
        timing = alternate(together, in_turn, args.runs)
        far = apart(last["together"], last["in turn"])
        spent = [trained(last[side], side == "together") for side in ("together", "in turn")]
    rows = {
        "with compilation": (timing.first_a, timing.first_b),
        "programs from the cache": tuple(map(statistics.median, (timing.times_a, timing.times_b))),
        "steps, validation, saves alone": spent,
    }
    print(
        f"\n{model.name}, {args.dtype}, {jax.devices()[0].device_kind}: {len(jobs)} runs of "
        f"{args.steps} steps; adapters at most {far:.1e} apart\n\n"
        "| | together s | in turn s | in turn / together |\n|---|---|---|---|"
    )
    for name, (a, b) in rows.items():
        print(f"| {name} | {a:.1f} | {b:.1f} | **{b / a:.2f}** |")


if __name__ == "__main__":
    main()
