"""Block and Decoder: norms, grouped-query attention and MLP as `Arch` says, scanned in segments.

What differs from layer to layer (windows, rotary positions) is scanned data: one program for all.

The decoder can be cut into named segments, each one `nn.scan`. Differentiating with respect to one
segment only means that nothing below it is linearised and nothing outside it gets weight gradients.

What is read from the residual stream is sown into the `intermediates` collection, and only by
callers that make it mutable:
  `residual` [N, B, T, D]  `keep_residual`: output of every block
  `read`     [N, B, P, D]  `read_BxPxT`: weighted means over tokens (a one-hot row picks a position)
  `cosine`   [N, B, T]     `probe`: scalars computed inside the layer, never a stack of residuals
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from reptune_jax.model import attention, intervene
from reptune_jax.model import cache as caches
from reptune_jax.model.arch import Arch, Layer
from reptune_jax.model.cache import Cache, KeysValues
from reptune_jax.model.mlp import MLP
from reptune_jax.model.norms import Norm
from reptune_jax.model.precision import in_float32, in_full
from reptune_jax.model.projection import Projection
from reptune_jax.model.rope import rope_tables, rotate

Segments = tuple[tuple[str, int], ...]  # (name, number of layers), bottom to top
Carry = tuple[jax.Array, KeysValues | None]  # the residual stream, and a segment's cache

REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@flax.struct.dataclass
class Seen:
    """How a kind of layer places and sees tokens; in `Shared` stacked, where there are several."""

    rope: tuple[jax.Array, jax.Array] | None  # cos and sin, [B, T, 1, R/2]; None: not rotary
    mask_BxTxS: jax.Array | None  # None: a flash kernel, which needs none


@flax.struct.dataclass
class Shared:
    """What every layer sees."""

    seen: Seen
    slot: jax.Array | int  # where in the cache these tokens go
    steer_tokens: tuple[jax.Array, ...]  # of each `Steer`, [B, T]
    read_BxPxT: jax.Array | None
    keep_residual: bool = flax.struct.field(pytree_node=False, default=False)
    kernel: attention.Kernel = flax.struct.field(pytree_node=False, default=attention.XLA)
    first: jax.Array | None = None  # of this segment's layers, that runs; None: all of them
    rows: Any = flax.struct.field(pytree_node=False, default=None)

    def by_rows(self, x_BxTxD: jax.Array) -> jax.Array:
        """Left alone, XLA may split D as the weights are, and then sums activations over devices
        instead of gathering the weights, which are smaller."""
        return (
            x_BxTxD if self.rows is None else jax.lax.with_sharding_constraint(x_BxTxD, self.rows)
        )


@flax.struct.dataclass
class PerLayer:
    """What is scanned along with the weights: one slice a layer, its place in its segment first."""

    index_N: jax.Array
    kind_N: jax.Array | None  # which of `Arch.kinds`; None where there is one
    steers: tuple[tuple[Any, ...], ...]  # each `Steer.by_layer`
    probe: intervene.Probe | None

    def slice(self, start: int, stop: int) -> "PerLayer":
        return jax.tree.map(lambda a: a[start:stop], self)


class Attention(nn.Module):
    """Grouped-query self-attention with an optional cache."""

    arch: Arch
    dtype: Any

    @nn.compact
    def __call__(
        self, x_BxTxD: jax.Array, cache: KeysValues | None, layer: PerLayer, shared: Shared
    ) -> tuple[jax.Array, KeysValues | None]:
        a, kind_N = self.arch, layer.kind_N
        seen = shared.seen if kind_N is None else jax.tree.map(lambda s: s[kind_N], shared.seen)

        def heads(name: str, n: int) -> jax.Array:
            return Projection((n, a.Dh), a.qkv_bias, self.dtype, name=name)(x_BxTxD)

        def placed(name: str, n: int) -> jax.Array:
            y_BxTxHxDh = self._qk_norm(f"{name}_norm", heads(name, n))
            return y_BxTxHxDh if seen.rope is None else rotate(y_BxTxHxDh, seen.rope)

        q_BxTxHxDh, k_BxTxKxDh = placed("q", a.H), placed("k", a.K)
        k, v = (jnp.swapaxes(x, 1, 2) for x in (k_BxTxKxDh, heads("v", a.K)))  # [B, K, T, Dh]
        if cache is not None:
            cache = {
                "k": caches.write(cache["k"], k, layer.index_N, shared.slot),
                "v": caches.write(cache["v"], v, layer.index_N, shared.slot),
            }
            k, v = (
                jax.lax.dynamic_index_in_dim(cache[name], layer.index_N, keepdims=False)
                for name in "kv"
            )  # [B, K, S, Dh]
        mix_BxTxHxDh = self._mix(q_BxTxHxDh, k, v, seen, kind_N, shared.kernel)
        out = Projection((a.D,), a.o_bias, self.dtype, inputs=2, name="o")
        return out(mix_BxTxHxDh), cache

    def _qk_norm(self, name: str, y_BxTxHxDh: jax.Array) -> jax.Array:
        a, shape = self.arch, y_BxTxHxDh.shape
        if not a.qk_norm:
            return y_BxTxHxDh
        y = y_BxTxHxDh if a.qk_norm == "head" else y_BxTxHxDh.reshape(*shape[:2], -1)
        return Norm(a.norm, a.norm_eps, self.dtype, name=name)(y).reshape(shape)

    def _mix(self, q, k, v, seen: Seen, kind_N, kernel: attention.Kernel) -> jax.Array:
        a = self.arch
        if seen.mask_BxTxS is not None:
            return attention.attend(q, k, v, seen.mask_BxTxS, a.score_scale, a.score_cap)
        # A kernel's window is part of its program, so each kind of layer has its own.
        flash = functools.partial(
            attention.flash, kernel=kernel, scale=a.score_scale, cap=a.score_cap
        )
        kinds = [functools.partial(flash, window=kind.window) for kind in a.kinds]
        return kinds[0](q, k, v) if kind_N is None else jax.lax.switch(kind_N, kinds, q, k, v)


class Block(nn.Module):
    """One layer; its output is "layer l" everywhere in this project (HF `hidden_states[l+1]`)."""

    arch: Arch
    dtype: Any

    @nn.compact
    def __call__(self, carry: Carry, layer: PerLayer, shared: Shared) -> tuple[Carry, None]:
        if shared.first is None:
            return self._through(carry, layer, shared), None
        runs, asked = layer.index_N >= shared.first, (carry, layer, shared)
        return nn.cond(runs, Block._through, lambda _, carry, *__: carry, self, *asked), None

    @nn.nowrap  # operations keep the layer's own name, not this one's
    def _through(self, carry: Carry, layer: PerLayer, shared: Shared) -> Carry:
        x_BxTxD, cache = carry
        x_BxTxD = shared.by_rows(x_BxTxD)
        mixed, cache = Attention(self.arch, self.dtype, name="attn")(
            self._before("attn_norm", x_BxTxD), cache, layer, shared
        )
        mixed = self._after("attn_post_norm", mixed)
        mlp = MLP(self.arch, self.dtype, name="mlp")
        if self.arch.parallel:
            mixed = self._after("mlp_post_norm", mlp(self._before("mlp_norm", x_BxTxD))) + mixed
            x_BxTxD = x_BxTxD + mixed
        else:
            x_BxTxD = x_BxTxD + mixed
            x_BxTxD = x_BxTxD + self._after("mlp_post_norm", mlp(self._before("mlp_norm", x_BxTxD)))
        for edit, token_BxT in zip(layer.steers, shared.steer_tokens, strict=True):
            x_BxTxD = intervene.apply_steer(x_BxTxD, token_BxT, *edit)
        self._sow(x_BxTxD, layer, shared)
        return x_BxTxD, cache

    def _norm(self, name: str, x_BxTxD: jax.Array) -> jax.Array:
        return Norm(self.arch.norm, self.arch.norm_eps, self.dtype, name=name)(x_BxTxD)

    def _before(self, name: str, x_BxTxD: jax.Array) -> jax.Array:
        return self._norm(name, x_BxTxD) if self.arch.pre_norm else x_BxTxD

    def _after(self, name: str, x_BxTxD: jax.Array) -> jax.Array:
        x_BxTxD = self._norm(name, x_BxTxD) if self.arch.post_norm else x_BxTxD
        scale = self.arch.residual_scale
        if scale == 1:
            return x_BxTxD
        # In float32: a Python number would be rounded to x's dtype first.
        return (x_BxTxD.astype(jnp.float32) * scale).astype(x_BxTxD.dtype)

    def _sow(self, x_BxTxD: jax.Array, layer: PerLayer, shared: Shared) -> None:
        def sow(name: str, value: jax.Array) -> None:
            self.sow("intermediates", name, value, reduce_fn=lambda _, b: b, init_fn=lambda: None)

        if shared.keep_residual:
            sow("residual", x_BxTxD)
        if shared.read_BxPxT is not None:
            x32_BxTxD = x_BxTxD.astype(jnp.float32)
            sow("read", in_float32("bpt,btd->bpd", shared.read_BxPxT, x32_BxTxD))
        if layer.probe is not None:
            p = layer.probe
            sow("cosine", intervene.cosine(x_BxTxD, p.direction_NxD, p.center_NxD))


class Decoder(nn.Module):
    """Tokens to final-normed hidden states; `logits` is separate so that only labels pay for it."""

    arch: Arch
    segments: Segments
    dtype: Any = jnp.float32
    remat: str = "none"
    kernel: attention.Kernel = attention.XLA  # of calls without a cache; flash: right padding only
    rows: Any = None  # sharding of the residual stream on a mesh

    def setup(self) -> None:
        a = self.arch
        self.embed = nn.Embed(a.V, a.D, dtype=self.dtype)
        if a.positions:
            self.positions = nn.Embed(a.positions, a.D, dtype=self.dtype)
        block = Block
        if self.remat != "none":
            # Within a scan, common subexpressions cannot undo the rematerialisation.
            block = nn.remat(Block, prevent_cse=False, policy=REMAT[self.remat])
        for name, length in self.segments:
            scan = nn.scan(
                block,
                variable_axes={"params": 0, "lora": 0, "intermediates": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast),
                length=length,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            setattr(self, name, scan(a, self.dtype))
        self.final_norm = Norm(a.norm, a.norm_eps, self.dtype)
        if not a.tied:
            self.head = nn.Embed(a.V, a.D, dtype=self.dtype)

    @in_full
    def __call__(
        self,
        tokens_BxT: jax.Array,
        mask_BxT: jax.Array,
        *,
        steer: intervene.Steer | intervene.Steers | None = None,
        probe: intervene.Probe | None = None,
        read_BxPxT: jax.Array | None = None,
        keep_residual: bool = False,
        text_BxT: jax.Array | None = None,
        cache: Cache | None = None,
        slot: jax.Array | int = 0,
        enter: tuple[str, jax.Array] | None = None,
        leave: str = "",
        above: tuple[jax.Array, jax.Array] | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Returns (hidden_BxTxD after the final norm, cache).

        Without a cache `mask_BxT` marks the real tokens. With one it is [B, S], the real tokens of
        the whole cache including these, which are written at `slot` and follow on.

        `text_BxT`, without a cache: rows hold several texts, numbered from 1 on; 0 is padding.
        Each sees itself only and has positions of its own. `mask_BxT` is not read then.

        `leave` names a segment to stop before: hidden is then the residual stream that enters it.
        `enter` = (segment, that residual) goes on from there, and the segments below do not run.
        `above` = (a layer's number, [T, D] or [B, T, D]) likewise from the layer on, which is data:
        one program for all of them. Nothing is sown then, and a cache lacks the layers below.
        """
        T, kinds = tokens_BxT.shape[1], self.arch.kinds
        if text_BxT is not None:
            positions_BxT = attention.positions_from_texts(text_BxT)
        else:  # With a cache the mask covers all S slots; these tokens are the T from `slot`.
            positions_BxT = jax.lax.dynamic_slice_in_dim(
                attention.positions_from_mask(mask_BxT), slot, T, axis=1
            )
        kernel = self.kernel if cache is None and text_BxT is None else attention.XLA
        see = functools.partial(attention.causal_mask, mask_BxT, T, slot, text_BxT=text_BxT)
        shared = Shared(
            seen=self._seen(positions_BxT, see if kernel.name == "xla" else None),
            slot=slot,
            steer_tokens=tuple(each.token_BxT for each in intervene.listed(steer)),
            read_BxPxT=read_BxPxT,
            keep_residual=keep_residual,
            kernel=kernel,
            rows=self.rows,
        )
        layers = PerLayer(
            jnp.concatenate([jnp.arange(length) for _, length in self.segments]),
            jnp.array([kinds.index(l) for l in self.arch.layers]) if len(kinds) > 1 else None,
            tuple(each.by_layer for each in intervene.listed(steer)),
            probe,
        )
        names = [name for name, _ in self.segments]
        first = names.index(enter[0]) if enter else 0
        start = sum(length for _, length in self.segments[:first])
        if above:
            x_BxTxD = jnp.broadcast_to(above[1], (*tokens_BxT.shape, self.arch.D))
        else:
            x_BxTxD = enter[1] if enter else self._embed(tokens_BxT, positions_BxT, mask_BxT)
        written = None if cache is None else dict(cache)
        for name, length in self.segments[first:]:
            if name == leave:
                return x_BxTxD, written
            carry = x_BxTxD, None if cache is None else cache[name]
            if above:
                shared = dataclasses.replace(shared, first=above[0] - start)
            (x_BxTxD, own), _ = getattr(self, name)(
                carry, layers.slice(start, start + length), shared
            )
            if written is not None:
                written[name] = own
            start += length
        hidden_BxTxD = self.final_norm(shared.by_rows(x_BxTxD))
        if self.is_initializing():
            self.logits(hidden_BxTxD)
        return hidden_BxTxD, written

    def _embed(self, tokens_BxT: jax.Array, positions_BxT: jax.Array, mask: jax.Array) -> jax.Array:
        a = self.arch
        # Gemma's scale is rounded to the dtype before it multiplies.
        x_BxTxD = self._to_rows(self.embed(tokens_BxT))
        if a.embed_scale != 1:
            x_BxTxD = x_BxTxD * jnp.asarray(a.embed_scale, self.dtype)
        if not a.positions:
            return x_BxTxD
        if mask.shape[1] > a.positions:
            raise ValueError(
                f"tokens: got rows of {mask.shape[1]} (padding and new tokens included), expected "
                f"at most {a.positions}, the positions that {a.family} has learned. Shorten them."
            )
        return x_BxTxD + self.positions(positions_BxT)

    def _to_rows(self, x_BxTxD: jax.Array) -> jax.Array:
        """A looked-up embedding lies as its table, D over the axis that splits weights; from there
        to whole rows is one exchange along that axis. Left alone on a mesh of three axes, XLA first
        makes all rows whole on every device."""
        if self.rows is None:
            return x_BxTxD
        data, fsdp = self.rows.spec[0]
        columns = jax.sharding.PartitionSpec(data, None, fsdp)
        x_BxTxD = jax.lax.with_sharding_constraint(
            x_BxTxD, jax.sharding.NamedSharding(self.rows.mesh, columns)
        )
        # At once: else the layers' loop carries columns, and exchanges them in every layer.
        return jax.lax.with_sharding_constraint(x_BxTxD, self.rows)

    def _seen(self, positions_BxT: jax.Array, see: Callable[..., jax.Array] | None) -> Seen:
        a, rotary = self.arch, any(kind.rope for kind in self.arch.kinds)

        def of(kind: Layer) -> Seen:
            rope = rope_tables(kind.rope, a.Dh, positions_BxT) if rotary else None
            return Seen(rope, None if see is None else see(window=kind.window))

        kinds = [of(kind) for kind in a.kinds]
        return kinds[0] if len(kinds) == 1 else jax.tree.map(lambda *k: jnp.stack(k), *kinds)

    @in_full
    def logits(self, hidden_xD: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., V]."""
        table_VxD = (self.embed if self.arch.tied else self.head).embedding
        logits_xV = jnp.einsum(
            "...d,vd->...v",
            hidden_xD.astype(self.dtype),
            table_VxD.astype(self.dtype),
            preferred_element_type=jnp.float32,
        )
        if self.arch.logit_divisor != 1:
            logits_xV = logits_xV / self.arch.logit_divisor
        cap = self.arch.logit_cap
        return cap * jnp.tanh(logits_xV / cap) if cap else logits_xV


def whole(arch: Arch, dtype: Any = jnp.float32, rows: Any = None) -> Decoder:
    """The decoder in one segment, for inference."""
    return Decoder(arch, (("blocks", arch.N),), dtype, rows=rows)


def unembed(decoder: Decoder, params: Any, hidden_xD: jax.Array) -> jax.Array:
    """`Decoder.logits` as a function of the parameters: [..., D] -> float32 [..., V]."""
    logits = decoder.apply({"params": params}, hidden_xD, method="logits")
    return cast(jax.Array, logits)


def collect(intermediates: dict[str, Any], segments: Segments, name: str) -> jax.Array | None:
    """Joins what the segments that ran sowed under `name` into one [N, ...] array; None if none."""
    ran = (intermediates[segment] for segment, _ in segments if segment in intermediates)
    parts = [sown[name] for sown in ran if name in sown]
    return jnp.concatenate(parts) if len(parts) > 1 else parts[0] if parts else None
