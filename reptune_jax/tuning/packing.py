"""Whether a run's short texts share rows, and in what shape: known before its first step.

Batches are a function of (seed, step), so the fullest one says how many rows every step has: one
compiled program.
"""

import math
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from reptune_jax.console import say
from reptune_jax.cost import flops
from reptune_jax.data.packing import Shape, arrange, labeled
from reptune_jax.model.arch import Arch
from reptune_jax.model.attention import Kernel
from reptune_jax.model.padding import BUCKET
from reptune_jax.tuning.corpus import Corpus

_LEAST = 0.15  # share of a step's tokens that packing must save to be chosen
_WIDEST = 4  # times the longest text: attention computes a whole row for each of its tokens
_WIDTHS = 24  # that are tried …
_STEPS = 64  # … on so many steps


def packed(c: ConfigDict, corpus: Corpus, arch: Arch, kernel: Kernel, mesh: Mesh | None) -> Corpus:
    """The corpus with `packing`, where `train.pack` says so and it saves tokens; "auto": many.

    Of rows as long as the longest text up to four times as long, those that cost least, as many as
    micro-batches and devices share out evenly: the last rows may be empty.
    """
    if c.train.pack == "off":
        return corpus
    R, layers = c.train.retain_batch, tuple(c.train.layers)
    steps = [corpus.sides(c.seed, step, R) for step in range(c.train.steps)]
    some = steps[:: -(-len(steps) // _STEPS)]
    ways = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    multiple = c.train.accumulate * ways
    below = layers[0] if corpus.train.below_BxTxD is not None else 0

    def cost(shapes: Sequence[Shape]) -> float:
        labels = [shape.rows * shape.labels for shape in shapes]
        still = sum(labels[1:])  # the base's logits, beside the model's
        tokens = sum(shape.rows * shape.tokens for shape in shapes)
        heads = sum(labels) + still
        parts = (tokens, shapes[0].tokens, heads, 0, still, below)
        return flops.step_flops(arch, layers, 0, *parts)["total"]

    best = min((_shapes(some, T, multiple) for T in _widths(steps, arch)), key=cost)
    padded = corpus.step_size(R)[1]
    corpus = corpus._replace(packing=_shapes(steps, best[0].tokens, multiple))
    saved = 1 - corpus.step_size(R)[1] / padded
    auto, why_not = c.train.pack == "auto", ""
    if saved <= (_LEAST if auto else 0):
        why_not = f"rows would have {1 - saved:.0%} of the tokens that one text a row has"
    elif auto and kernel.name != "xla":
        why_not = f"{saved:.0%} fewer tokens, but {kernel.name} takes one text a row"
    if why_not:
        say(f"not packed: {why_not}")
        return corpus._replace(packing=())
    rows = sum(shape.rows for shape in corpus.packing)
    say(f"packed: {rows} rows of {best[0].tokens} tokens a step, {saved:.0%} of the tokens saved")
    return corpus


def _widths(steps: Sequence[Any], arch: Arch) -> list[int]:
    """Tokens of a row that are tried: all texts fit, and no position is beyond those learned."""
    longest = max(int(side.mask_BxT[at].sum(1).max()) for sides in steps for side, at in sides)
    first = -(-longest // BUCKET) * BUCKET
    most = max(min(_WIDEST * first, arch.positions or math.inf), first)
    apart = BUCKET * -(-int(most - first) // (BUCKET * _WIDTHS)) or BUCKET
    return [*range(first, int(most) + 1, apart)]


def _shapes(steps: Sequence[Any], room: int, multiple: int) -> tuple[Shape, ...]:
    """Of each side: what the fullest step needs in rows of `room` tokens."""
    found = []
    for steps_of_side in zip(*steps, strict=True):
        n_labels = labeled(steps_of_side[0][0]).sum(1)
        arranged = [arrange(side, at, room) for side, at in steps_of_side]
        rows = max(map(len, arranged))
        labels = max(int(n_labels[row].sum()) for texts in arranged for row in texts)
        found.append(Shape(-(-rows // multiple) * multiple, room, max(labels, 1)))
    return tuple(found)
