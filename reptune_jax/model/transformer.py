"""Block and Decoder: pre-norm, grouped-query attention, gated MLP; layers scanned in segments.

The decoder can be cut into named segments, each one `nn.scan`. Differentiating with respect to one
segment only means that nothing below it is linearised and nothing outside it gets weight gradients.

What is read from the residual stream is sown into the `intermediates` collection, and only by
callers that make it mutable:
  `residual` [N, B, T, D]  `keep_residual`: output of every block
  `read`     [N, B, P, D]  `read_BxPxT`: weighted means over tokens (a one-hot row picks a position)
  `cosine`   [N, B, T]     `probe`: scalars computed inside the layer, never a stack of residuals
"""

from typing import Any, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from reptune_jax.model import attention, intervene
from reptune_jax.model.arch import Arch

Cache = dict[str, jax.Array]  # k, v: [N, B, K, S, Dh]
Segments = tuple[tuple[str, int], ...]  # (name, number of layers), bottom to top

REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@flax.struct.dataclass
class Shared:
    """What every layer sees."""

    rope: tuple[jax.Array, jax.Array]
    mask_BxTxS: jax.Array
    slot: jax.Array | int  # where in the cache these tokens go
    steer_token_BxT: jax.Array | None
    read_BxPxT: jax.Array | None
    keep_residual: bool = flax.struct.field(pytree_node=False, default=False)
    rows: Any = flax.struct.field(pytree_node=False, default=None)

    def by_rows(self, x_BxTxD: jax.Array) -> jax.Array:
        """Left alone, XLA may split D as the weights are, and then sums activations over devices
        instead of gathering the weights, which are smaller."""
        return (
            x_BxTxD if self.rows is None else jax.lax.with_sharding_constraint(x_BxTxD, self.rows)
        )


@flax.struct.dataclass
class PerLayer:
    """What is scanned along with the weights: one slice a layer, the absolute layer index first."""

    index_N: jax.Array
    steer: tuple[jax.Array, jax.Array, jax.Array] | None  # direction_NxD, add_NxB, ablate_NxB
    probe: intervene.Probe | None

    def slice(self, start: int, stop: int) -> "PerLayer":
        return jax.tree.map(lambda a: a[start:stop], self)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions and an optional cache."""

    arch: Arch
    dtype: Any

    @nn.compact
    def __call__(
        self, x_BxTxD: jax.Array, cache: Cache | None, layer: jax.Array, shared: Shared
    ) -> tuple[jax.Array, Cache | None]:
        a = self.arch

        def heads(name: str, n: int) -> jax.Array:
            return nn.DenseGeneral((n, a.Dh), use_bias=a.qkv_bias, dtype=self.dtype, name=name)(
                x_BxTxD
            )

        q_BxTxHxDh = attention.rotate(heads("q", a.H), shared.rope)
        k_BxTxKxDh = attention.rotate(heads("k", a.K), shared.rope)
        k, v = (jnp.swapaxes(x, 1, 2) for x in (k_BxTxKxDh, heads("v", a.K)))  # [B, K, T, Dh]
        if cache is not None:
            cache = {
                "k": _write(cache["k"], k, layer, shared.slot),
                "v": _write(cache["v"], v, layer, shared.slot),
            }
            k, v = (
                jax.lax.dynamic_index_in_dim(cache[name], layer, keepdims=False) for name in "kv"
            )  # [B, K, S, Dh]
        mix_BxTxHxDh = attention.attend(q_BxTxHxDh, k, v, shared.mask_BxTxS)
        out = nn.DenseGeneral(a.D, axis=(-2, -1), use_bias=a.o_bias, dtype=self.dtype, name="o")(
            mix_BxTxHxDh
        )
        return out, cache


class MLP(nn.Module):
    """silu(gate) * up, then down."""

    arch: Arch
    dtype: Any

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        def dense(name: str, features: int) -> nn.Dense:
            return nn.Dense(features, use_bias=self.arch.mlp_bias, dtype=self.dtype, name=name)

        hidden_BxTxF = nn.silu(dense("gate", self.arch.F)(x_BxTxD)) * dense("up", self.arch.F)(
            x_BxTxD
        )
        return dense("down", self.arch.D)(hidden_BxTxF)


class Block(nn.Module):
    """One layer; its output is "layer l" everywhere in this project (HF `hidden_states[l+1]`)."""

    arch: Arch
    dtype: Any

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, Cache | None], layer: PerLayer, shared: Shared
    ) -> tuple[tuple[jax.Array, Cache | None], None]:
        x_BxTxD, cache = carry
        x_BxTxD = shared.by_rows(x_BxTxD)

        def norm(name: str) -> nn.RMSNorm:
            return nn.RMSNorm(epsilon=self.arch.norm_eps, dtype=self.dtype, name=name)

        mixed, cache = Attention(self.arch, self.dtype, name="attn")(
            norm("attn_norm")(x_BxTxD), cache, layer.index_N, shared
        )
        x_BxTxD = x_BxTxD + mixed
        x_BxTxD = x_BxTxD + MLP(self.arch, self.dtype, name="mlp")(norm("mlp_norm")(x_BxTxD))
        if layer.steer is not None and shared.steer_token_BxT is not None:
            x_BxTxD = intervene.apply_steer(x_BxTxD, *layer.steer, shared.steer_token_BxT)
        self._sow(x_BxTxD, layer, shared)
        return (x_BxTxD, cache), None

    def _sow(self, x_BxTxD: jax.Array, layer: PerLayer, shared: Shared) -> None:
        def sow(name: str, value: jax.Array) -> None:
            self.sow("intermediates", name, value, reduce_fn=lambda _, b: b, init_fn=lambda: None)

        if shared.keep_residual:
            sow("residual", x_BxTxD)
        if shared.read_BxPxT is not None:
            sow("read", jnp.einsum("bpt,btd->bpd", shared.read_BxPxT, x_BxTxD.astype(jnp.float32)))
        if layer.probe is not None:
            p = layer.probe
            sow("cosine", intervene.cosine(x_BxTxD, p.direction_NxD, p.center_NxD))


class Decoder(nn.Module):
    """Tokens to final-normed hidden states; `logits` is separate so that only labels pay for it."""

    arch: Arch
    segments: Segments
    dtype: Any = jnp.float32
    remat: str = "none"
    rows: Any = None  # sharding of the residual stream on a mesh

    def setup(self) -> None:
        a = self.arch
        self.embed = nn.Embed(a.V, a.D, dtype=self.dtype)
        block = Block
        if self.remat != "none":
            # Within a scan, common subexpressions cannot undo the rematerialisation.
            block = nn.remat(Block, prevent_cse=False, policy=REMAT[self.remat])
        for name, length in self.segments:
            scan = nn.scan(
                block,
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast),
                length=length,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            setattr(self, name, scan(a, self.dtype))
        self.final_norm = nn.RMSNorm(epsilon=a.norm_eps, dtype=self.dtype)
        if not a.tied:
            self.head = nn.Embed(a.V, a.D, dtype=self.dtype)

    def __call__(
        self,
        tokens_BxT: jax.Array,
        mask_BxT: jax.Array,
        *,
        steer: intervene.Steer | None = None,
        probe: intervene.Probe | None = None,
        read_BxPxT: jax.Array | None = None,
        keep_residual: bool = False,
        cache: Cache | None = None,
        slot: jax.Array | int = 0,
    ) -> tuple[jax.Array, Cache | None]:
        """Returns (hidden_BxTxD after the final norm, cache).

        Without a cache `mask_BxT` marks the real tokens. With one it is [B, S], the real tokens of
        the whole cache including these, which are written at `slot` and follow on.
        """
        T = tokens_BxT.shape[1]
        # With a cache the mask covers all S slots; these tokens' positions are the T from `slot`.
        positions_BxT = jax.lax.dynamic_slice_in_dim(
            attention.positions_from_mask(mask_BxT), slot, T, axis=1
        )
        shared = Shared(
            rope=attention.rope_tables(self.arch.rope, self.arch.Dh, positions_BxT),
            mask_BxTxS=attention.causal_mask(mask_BxT, T, slot),
            slot=slot,
            steer_token_BxT=steer.token_BxT if steer else None,
            read_BxPxT=read_BxPxT,
            keep_residual=keep_residual,
            rows=self.rows,
        )
        layers = PerLayer(
            jnp.arange(self.arch.N),
            (steer.direction_NxD, steer.add_NxB, steer.ablate_NxB) if steer else None,
            probe,
        )
        carry, start = (self.embed(tokens_BxT), cache), 0
        for name, length in self.segments:
            carry, _ = getattr(self, name)(carry, layers.slice(start, start + length), shared)
            start += length
        hidden_BxTxD = self.final_norm(shared.by_rows(carry[0]))
        if self.is_initializing():
            self.logits(hidden_BxTxD)
        return hidden_BxTxD, carry[1]

    def logits(self, hidden_xD: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., V]."""
        table_VxD = (self.embed if self.arch.tied else self.head).embedding
        return jnp.einsum(
            "...d,vd->...v",
            hidden_xD.astype(self.dtype),
            table_VxD.astype(self.dtype),
            preferred_element_type=jnp.float32,
        )


def whole(arch: Arch, dtype: Any = jnp.float32, rows: Any = None) -> Decoder:
    """The decoder in one segment, for inference."""
    return Decoder(arch, (("blocks", arch.N),), dtype, rows=rows)


def unembed(decoder: Decoder, params: Any, hidden_xD: jax.Array) -> jax.Array:
    """`Decoder.logits` as a function of the parameters: [..., D] -> float32 [..., V]."""
    logits = decoder.apply({"params": params}, hidden_xD, method="logits")
    return cast(jax.Array, logits)


def collect(intermediates: dict[str, Any], segments: Segments, name: str) -> jax.Array:
    """Joins what the segments sowed under `name` back into one [N, ...] array."""
    parts = [intermediates[segment][name] for segment, _ in segments]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def init_cache(arch: Arch, B: int, S: int, dtype: Any) -> Cache:
    """An empty key/value cache for S tokens."""
    shape = (arch.N, B, arch.K, S, arch.Dh)
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}


def _write(
    cache_NxBxKxSxDh: jax.Array, new_BxKxTxDh: jax.Array, layer: jax.Array, slot: jax.Array | int
) -> jax.Array:
    """Writes in place (the cache is the scan's carry, so XLA does not copy it layer by layer)."""
    return jax.lax.dynamic_update_slice(
        cache_NxBxKxSxDh, new_BxKxTxDh[None].astype(cache_NxBxKxSxDh.dtype), (layer, 0, 0, slot, 0)
    )
