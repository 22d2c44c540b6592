"""Rotary positions."""

import jax
import jax.numpy as jnp
import numpy as np

from reptune_jax.model.arch import Rope


def rope_frequencies(rope: Rope, Dh: int) -> np.ndarray:
    """Inverse wavelengths, float32 [R/2] for the R rotated dims, long-context scaling applied."""
    R = int(Dh * rope.share)
    freq = 1.0 / rope.theta ** (np.arange(0, R, 2, dtype=np.float32) / R)
    if rope.kind == "linear":
        freq = freq / rope.factor
    if rope.kind == "llama3":
        # Long wavelengths are stretched by `factor`, short ones kept, those between interpolated.
        cycles = rope.original_positions * freq / (2 * np.pi)
        low, high = rope.low_freq_factor, rope.high_freq_factor
        keep = np.clip((cycles - low) / (high - low), 0.0, 1.0)
        freq = keep * freq + (1 - keep) * freq / rope.factor
    return freq.astype(np.float32)


def rope_tables(
    rope: Rope | None, Dh: int, positions_BxT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [B, T, 1, R/2]: computed once, shared by all layers of a kind.

    Without `rope`, those of no rotation.
    """
    freq = np.zeros(Dh // 2, np.float32) if rope is None else rope_frequencies(rope, Dh)
    angle = positions_BxT[:, :, None, None].astype(jnp.float32) * freq
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BxTxHxDh: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates (first half, second half) pairs of the first R dims, the layout of Hugging Face."""
    cos, sin = tables
    R = 2 * cos.shape[-1]
    a, b = jnp.split(x_BxTxHxDh[..., :R].astype(jnp.float32), 2, axis=-1)
    out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BxTxHxDh.dtype)
    return out if x_BxTxHxDh.shape[-1] == R else jnp.concatenate([out, x_BxTxHxDh[..., R:]], -1)
