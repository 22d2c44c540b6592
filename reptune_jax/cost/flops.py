"""What a step costs: memory from the compiler, FLOPs by formula.

XLA's own count is not used because it counts the body of a layer scan once, not once a layer.
"""

from typing import Any

import numpy as np
from ml_collections import FrozenConfigDict

from reptune_jax.data.batches import Batch
from reptune_jax.model import lora
from reptune_jax.model.arch import Arch
from reptune_jax.model.lora import Flat


def layer_flops(arch: Arch, tokens: int, T: int) -> float:
    """Forward FLOPs of one layer: matrix products, and full (not causal-halved) attention."""
    a = arch
    weights = a.D * a.Dh * (2 * a.H + 2 * a.K) + (3 if a.gated else 2) * a.D * a.F
    return 2.0 * tokens * (weights + 2 * T * a.H * a.Dh)


def step_flops(
    arch: Arch,
    layers: tuple[int, int],
    trained: int,
    tokens: int,
    T: int,
    heads: int,
    adapters: int = 0,
    still: int = 0,
    below: int = 0,
) -> dict[str, float]:
    """FLOPs of one training step over `tokens` tokens in rows of T.

    forward: every layer but the `below` whose output is known, and the head at `heads` positions.
    activations: the gradient with respect to them, in and above the tuned layers, and through the
    head, but for `still` of its positions. weights: `trained` weights only. Those of them that are
    `adapters` are products of their own, in the forward pass and back.
    """
    first, _ = layers
    position = 2.0 * arch.D * arch.V
    layer = layer_flops(arch, tokens, T)
    # Attention's backward has two products for each forward one.
    attention = 2.0 * tokens * 2 * T * arch.H * arch.Dh
    parts = {
        "forward": (arch.N - below) * layer + heads * position + 2.0 * tokens * adapters,
        "activations": (arch.N - first) * (layer + attention)
        + (heads - still) * position
        + 2.0 * tokens * adapters,
        "weights": 2.0 * tokens * trained,
    }
    return {**parts, "total": float(np.sum(list(parts.values())))}


def batch_flops(arch: Arch, layers: tuple[int, int], trained: Flat, batch: Batch) -> dict:
    """`step_flops` of a step over this batch."""
    rows, T = batch.examples.tokens_BxT.shape
    heads, still = batch.examples.at_BxL.size, 0
    if batch.retention is not None:
        rows += batch.retention.tokens_BxT.shape[0]
        still = batch.retention.at_BxL.size  # the base's logits, beside the model's
        heads += 2 * still
    size = sum(leaf.size for leaf in trained.values())
    adapters = sum(leaf.size for path, leaf in trained.items() if lora.is_leaf(path))
    below = layers[0] if batch.examples.below_BxTxD is not None else 0
    return step_flops(arch, layers, size, rows * T, T, heads, adapters, still, below)


def describe(arch: Arch, train: FrozenConfigDict, trained: Flat, batch: Batch) -> str:
    """One line: what is trained, and the FLOPs of a step."""
    rows, T = batch.examples.tokens_BxT.shape
    rows += batch.retention.tokens_BxT.shape[0] if batch.retention is not None else 0
    size = sum(leaf.size for leaf in trained.values())
    flops, rank = batch_flops(arch, train.layers, trained, batch), train.lora.rank
    first, stop = train.layers
    what = f"weights of LoRA adapters of rank {rank}" if rank else "weights"
    return (
        f"training {size:,} {what} ({', '.join(train.modules)} of layers {first} to {stop - 1}), "
        f"{rows} rows of {T} tokens, {flops['total'] / 1e12:.2f} TFLOP a step"
    )


def memory(compiled: Any) -> str:
    """What the compiled step needs on each device, by kind."""
    m = compiled.memory_analysis()
    if m is None:
        return "memory: this backend does not say"
    kinds = (
        ("arguments", m.argument_size_in_bytes),
        ("temporaries", m.temp_size_in_bytes),
        ("outputs", m.output_size_in_bytes - m.alias_size_in_bytes),
    )
    return "memory per device: " + ", ".join(f"{kind} {n / 2**20:.0f} MiB" for kind, n in kinds)
