"""Positions, masks, attention, and which implementation of it runs where.

  xla     everything: any mask, soft-cap, window, head size, with or without a cache
  cudnn   flash attention on NVIDIA, of whole right-padded rows
  splash  flash attention on TPU, of whole right-padded rows

On right-padded rows causality alone hides the padding from every real token, so that the flash
implementations take no mask. What they say at a padding token differs, and nobody reads it.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from reptune_jax.model.arch import Arch

_BLOCK = 128  # splash works on blocks of this many tokens
_HEADS = PartitionSpec(("data", "fsdp"), "tensor", None, None)  # [B, H, T, Dh]


def positions_from_mask(mask_BxT: jax.Array) -> jax.Array:
    """Position of each real token, counted from its row's first: right for either padding side."""
    return jnp.maximum(jnp.cumsum(mask_BxT.astype(jnp.int32), axis=1) - 1, 0)


def positions_from_texts(text_BxT: jax.Array) -> jax.Array:
    """Position of each token, counted from the first of its text, which is one run of its row."""
    at_T = jnp.arange(text_BxT.shape[1])
    begins_BxT = jnp.diff(text_BxT, axis=1, prepend=-1) != 0
    return at_T - jax.lax.cummax(jnp.where(begins_BxT, at_T, 0), axis=1)


def causal_mask(
    mask_BxS: jax.Array,
    T: int,
    slot: jax.Array | int = 0,
    window: int = 0,
    text_BxT: jax.Array | None = None,
) -> jax.Array:
    """[B, T, S]: query at slot+t sees the real tokens at slots <= slot+t, the last `window` only.

    Padding is at one end of a row, so slots are as far apart as positions are. Where a row holds
    several texts (and there is no cache), a token sees its own text only; padding is one of them.
    """
    ahead_TxS = jnp.arange(mask_BxS.shape[1])[None, :] - (slot + jnp.arange(T)[:, None])
    seen_TxS = ahead_TxS <= 0
    if window:
        seen_TxS &= ahead_TxS > -window
    if text_BxT is not None:
        return seen_TxS[None] & (text_BxT[:, :, None] == text_BxT[:, None, :])
    return seen_TxS[None] & mask_BxS.astype(bool)[:, None, :]


def attend(
    q_BxTxHxDh: jax.Array,
    k_BxKxSxDh: jax.Array,
    v_BxKxSxDh: jax.Array,
    mask_BxTxS: jax.Array,
    scale: float,
    cap: float = 0.0,
) -> jax.Array:
    """Grouped-query attention, softmax in float32; [B, T, H, Dh].

    Keys and values come head-major, and the queries of a group are folded into one row axis, so
    that each head is one plain matrix product: on CPU 4-6 times faster in decoding than attention
    over [B, S, K, Dh].
    """
    B, T, H, Dh = q_BxTxHxDh.shape
    K, S = k_BxKxSxDh.shape[1:3]
    q_BxKxQxDh = q_BxTxHxDh.reshape(B, T, K, H // K, Dh).transpose(0, 2, 3, 1, 4)
    q_BxKxQxDh = q_BxKxQxDh.reshape(B, K, -1, Dh)  # Q = heads of the group x T
    score_BxKxQxS = jnp.einsum(
        "bkqd,bksd->bkqs", q_BxKxQxDh, k_BxKxSxDh, preferred_element_type=jnp.float32
    )
    score = score_BxKxQxS.reshape(B, K, H // K, T, S) * scale
    if cap:
        score = cap * jnp.tanh(score / cap)
    # A finite bottom: a padding query sees no key at all, and must not become NaN.
    score = jnp.where(mask_BxTxS[:, None, None], score, jnp.finfo(jnp.float32).min)
    weight_BxKxQxS = jax.nn.softmax(score, axis=-1).astype(v_BxKxSxDh.dtype).reshape(B, K, -1, S)
    mix_BxKxQxDh = jnp.einsum("bkqs,bksd->bkqd", weight_BxKxQxS, v_BxKxSxDh)
    mix = mix_BxKxQxDh.reshape(B, K, H // K, T, Dh).transpose(0, 3, 1, 2, 4)
    return mix.reshape(B, T, H, Dh)


# ------------------------------------------------------------------ which implementation


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An implementation, and why. `mesh` is for splash, which XLA cannot partition by itself."""

    name: str  # xla | cudnn | splash
    reason: str = ""
    mesh: Mesh | None = None
    interpret: bool = False  # splash without a TPU, for tests

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


XLA = Kernel("xla", "the default")


def choose(
    arch: Arch,
    platform: str,
    dtype: Any,
    *,
    padding: str = "right",
    decoding: bool = False,
    hopper: bool = False,
    mesh: Mesh | None = None,
) -> Kernel:
    """The fastest implementation that computes what `arch` needs, on `platform` (cpu, gpu, tpu).

    `padding` is none, right, left or any; `decoding` is with a cache; `hopper` or a later NVIDIA.
    """
    half = jnp.dtype(dtype).itemsize == 2
    if platform not in ("gpu", "cuda", "tpu"):
        return Kernel("xla", f"{platform} has no flash attention")
    if decoding:
        return Kernel("xla", "with a cache each step has one query a row")
    if padding not in ("none", "right"):
        return Kernel("xla", f"{padding} padding needs a mask")
    if platform == "tpu":
        if arch.Dh % 64:
            return Kernel("xla", f"splash needs heads in multiples of 64, they are {arch.Dh}")
        return Kernel("splash", "flash attention on TPU", mesh)
    most = 256 if hopper else 128
    if not half:
        return Kernel("xla", f"cuDNN needs bfloat16 or float16, this is {jnp.dtype(dtype).name}")
    if arch.score_cap:
        return Kernel("xla", "cuDNN has no soft-cap")
    if arch.Dh % 8 or arch.Dh > most:
        return Kernel("xla", f"cuDNN needs heads in multiples of 8 up to {most}, not {arch.Dh}")
    return Kernel("cudnn", "flash attention on NVIDIA")


def here(arch: Arch, dtype: Any, padding: str, mesh: Mesh | None) -> Kernel:
    """`choose`, for this machine and calls without a cache."""
    device = jax.devices()[0]
    hopper = float(getattr(device, "compute_capability", 0)) >= 9
    return choose(arch, device.platform, dtype, padding=padding, hopper=hopper, mesh=mesh)


def flash(
    q_BxTxHxDh: jax.Array,
    k_BxKxTxDh: jax.Array,
    v_BxKxTxDh: jax.Array,
    *,
    kernel: Kernel,
    window: int,
    scale: float,
    cap: float,
) -> jax.Array:
    """Causal attention of whole rows by `kernel`; [B, T, H, Dh]."""
    if kernel.name == "splash":
        return splash(q_BxTxHxDh, k_BxKxTxDh, v_BxKxTxDh, kernel, window, scale, cap)
    return jax.nn.dot_product_attention(
        q_BxTxHxDh,
        jnp.swapaxes(k_BxKxTxDh, 1, 2),
        jnp.swapaxes(v_BxKxTxDh, 1, 2),
        scale=scale,
        # A window without causality is silently wrong in cuDNN (jax issue 39576).
        is_causal=True,
        local_window_size=(window - 1, 0) if window else None,
        implementation="cudnn",
    )


def splash(
    q_BxTxHxDh: jax.Array,
    k_BxKxTxDh: jax.Array,
    v_BxKxTxDh: jax.Array,
    kernel: Kernel,
    window: int,
    scale: float,
    cap: float,
) -> jax.Array:
    """Pallas' kernel for TPU. Rows are filled up to whole blocks, at the end, which hides them."""
    T = q_BxTxHxDh.shape[1]
    fill = ((0, 0), (0, 0), (0, -T % _BLOCK), (0, 0))
    q, k, v = (
        jnp.pad(x, fill) for x in (jnp.swapaxes(q_BxTxHxDh, 1, 2) * scale, k_BxKxTxDh, v_BxKxTxDh)
    )
    run = functools.partial(_splash_rows, window=window, cap=cap, interpret=kernel.interpret)
    if kernel.mesh is not None:
        run = jax.shard_map(
            run, mesh=kernel.mesh, in_specs=(_HEADS,) * 3, out_specs=_HEADS, check_vma=False
        )
    return jnp.swapaxes(run(q, k, v)[:, :, :T], 1, 2)


def _splash_rows(
    q_BxHxTxDh: jax.Array,
    k_BxKxTxDh: jax.Array,
    v_BxKxTxDh: jax.Array,
    *,
    window: int,
    cap: float,
    interpret: bool,
) -> jax.Array:
    # Importing Pallas for TPU takes a second that nobody else should pay.
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas

    H, T = q_BxHxTxDh.shape[1:3]
    mask = pallas.LocalMask((T, T), (window - 1, 0), 0) if window else pallas.CausalMask((T, T))
    kernel = pallas.make_splash_mha_single_device(
        mask=pallas.MultiHeadMask([mask] * H),
        attn_logits_soft_cap=cap or None,
        block_sizes=_block_sizes(pallas, T),
        interpret=interpret,
    )
    return jax.vmap(kernel)(q_BxHxTxDh, k_BxKxTxDh, v_BxKxTxDh)


def _block_sizes(pallas: Any, T: int) -> Any:
    """The largest blocks up to 512 that divide T."""
    size = next(b for b in (512, 256, _BLOCK) if T % b == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    return pallas.BlockSizes(**{f"block_{name}": int(np.minimum(size, T)) for name in names})
