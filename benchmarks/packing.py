"""What a training step takes with short texts packed into rows, beside one text a row, in turns.

    python -m benchmarks.packing [--model FOLDER] [--rounds 3] [--steps 4]

Texts of uneven length (prompts of 12 to 60 tokens, answers of 8 to 48) are trained on as `train`
does it, with what enters the lowest trained layer kept. Both sides take the same examples in the
same steps; the greatest difference of their losses is printed. The first pass, which compiles, is
in no median.
"""

import argparse
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

import reptune_jax as rt
from benchmarks import train_case
from benchmarks.model import smollm2_folder
from benchmarks.timing import Call, alternate
from reptune_jax.data.batches import Example, stack_examples
from reptune_jax.model import attention
from reptune_jax.model.padding import BUCKET
from reptune_jax.model.transformer import Decoder
from reptune_jax.tuning import base_cache, partition
from reptune_jax.tuning import step as steps
from reptune_jax.tuning.corpus import Corpus
from reptune_jax.tuning.objective import make_objective
from reptune_jax.tuning.packing import packed
from reptune_jax.vectors.steering_vector import SteeringVector

PROMPT, ANSWER = (12, 60), (8, 48)  # tokens, drawn evenly
BATCH, TEXTS = 8, 64


def texts(model: Any) -> Corpus:
    """Random tokens, all of an answer's with a label and a cosine."""
    rng, found = np.random.default_rng(0), []
    for _ in range(TEXTS):
        P, n = int(rng.integers(*PROMPT)), int(rng.integers(*ANSWER))
        ids = rng.integers(4, model.arch.V, P + n).tolist()
        at, targets = list(range(P - 1, P + n - 1)), [[(i, 1.0)] for i in ids[P:]]
        found.append(Example(ids, at, targets, (P, P + n)))
    T = -(-max(len(e.ids) for e in found) // BUCKET) * BUCKET
    rows = stack_examples(found, model.pad_id, T)
    return Corpus(rows, rows, None, None, (TEXTS,), (BATCH,))


def prepared(model: Any, c: ConfigDict) -> tuple[Corpus, Decoder, Any, Any]:
    """(the corpus with its kept states, decoder, objective, trained weights)."""
    a, train = model.arch, FrozenConfigDict(c.train)
    decoder = Decoder(a, partition.segments(a.N, c.train.layers), model.dtype, "dots")
    trained, frozen = partition.begin(a, model.params, train, c.seed)
    directions = np.random.default_rng(1).standard_normal((a.N, a.D)).astype(np.float32)
    zeros = np.zeros_like(directions)
    vector = SteeringVector(directions, np.ones(a.N, np.float32), zeros, tuple(range(a.N)), {})
    objective, corpus = make_objective(c, vector, frozen), texts(model)
    known = base_cache.add_below(corpus.train, model, decoder, objective, batch=BATCH)
    return corpus._replace(train=known), decoder, objective, trained


def run_of(c: ConfigDict, corpus: Corpus, decoder: Decoder, objective: Any, trained: Any) -> Call:
    """Takes `train.steps` steps from the start; their losses. Batches are made in the time."""
    train = FrozenConfigDict(c.train)
    step = steps.make_step(decoder, train)

    def run() -> list[float]:
        state, losses = steps.init_state(jax.tree.map(jnp.array, trained), train), []
        for i in range(c.train.steps):
            batch = jax.device_put(corpus.batch(c.seed, i, 0))
            state, metrics = step(state, objective, batch, jnp.asarray(False))
            losses.append(metrics["loss"])
        return [float(loss) for loss in losses]

    return run


def main() -> None:
    """Prints one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a folder or a .gguf; SmolLM2-135M-Instruct, fetched once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    model = rt.load(str(args.model or smollm2_folder()), dtype="float32")
    c = train_case.settings((model.arch.N // 3, 2 * model.arch.N // 3))
    c.train.update(batch=BATCH, steps=args.steps, pack="on")
    corpus, *rest = prepared(model, c)
    sides = {"padded": corpus, "packed": packed(c, corpus, model.arch, attention.XLA, None)}
    runs = {name: run_of(c, side, *rest) for name, side in sides.items()}
    timing = alternate(runs["packed"], runs["padded"], args.rounds)
    apart = max(abs(a - b) for a, b in zip(runs["packed"](), runs["padded"](), strict=True))
    print("\n| step | rows x tokens | real | median s a step | all | padded / packed |")
    print("|---|---|---|---|---|---|")
    for name, times in (("padded", timing.times_b), ("packed", timing.times_a)):
        each = [t / args.steps for t in times]
        rows, T = sides[name].batch(c.seed, 0, 0).examples.tokens_BxT.shape
        ratio = f"**{timing.ratio:.2f}**" if name == "packed" else ""
        cells = [name, f"{rows} x {T}", f"{sides[name].real_share(0):.0%}"]
        cells += [f"{statistics.median(each):.2f}", " ".join(f"{t:.2f}" for t in each), ratio]
        print(f"| {' | '.join(cells)} |")
    print(f"losses of {args.steps} steps at most {apart:.1e} apart")


if __name__ == "__main__":
    main()
