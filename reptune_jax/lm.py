"""`Model`: an architecture, its weights and its tokenizer, bound together.

The methods here are the convenient face (text in, text or arrays out) of the pure functions in
`model/`; programs that need their own jitted step use those directly.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from reptune_jax import mesh as meshes
from reptune_jax.console import watched
from reptune_jax.hub import digest, peft, templates, text, weights
from reptune_jax.hub import source as sources
from reptune_jax.hub import tokenizer as tokenizers
from reptune_jax.hub.endings import said
from reptune_jax.hub.source import Source
from reptune_jax.model import attention, cache, decode, families, finite, inputs, intervene, score
from reptune_jax.model.arch import Arch
from reptune_jax.model.intervene import Probe, Steer, Steerable, Steers
from reptune_jax.model.padding import BUCKET, batches_by_length, pad
from reptune_jax.model.prefix import Prefix, shared_length
from reptune_jax.model.read import read, read_at_once
from reptune_jax.model.sampling import Sampling, sampled
from reptune_jax.model.transformer import Decoder, unembed, whole


@dataclasses.dataclass(frozen=True)
class Output:
    """One forward pass."""

    logits_BxTxV: jax.Array  # float32
    residual_NxBxTxD: jax.Array | None  # output of every block, before the final norm


@dataclasses.dataclass(frozen=True)
class Model:
    """A chat model; see `load`. `config` is the raw config.json, kept for the export.

    `files` is the folder whose tokenizer, license and so on go with an export; None: made anew.
    Methods raise ValueError for what no model can read, and for numbers that are not finite.
    """

    arch: Arch
    params: dict[str, Any]
    tokenizer: Any
    config: dict[str, Any]
    name: str
    dtype: Any
    stop_ids: tuple[int, ...]
    spelling: weights.Spelling = weights.AS_TABLED
    files: Path | None = None
    sampling: Mapping[str, float] = dataclasses.field(default_factory=dict)  # as it declares it
    held: str = ""  # how `frozen` has the kernels for tuning: int8 or int4

    def __repr__(self) -> str:
        a, size = self.arch, sum(leaf.size for leaf in jax.tree.leaves(self.params))
        shape = f"{a.N} layers of width {a.D}, {size:,} parameters"
        return f"Model({self.name!r}, {a.family}, {shape}, {jnp.dtype(self.dtype).name})"

    @functools.cached_property
    def sha(self) -> str:
        """Identifies the base weights; a tuned model has its base's."""
        norm_D, table_VxD = self.params["final_norm"]["scale"], self.params["embed"]["embedding"]
        return digest.weights_sha(self.arch, norm_D, table_VxD[:64])

    @functools.cached_property
    def context(self) -> int | None:
        """Tokens that the config says it reads at most; None where it does not say."""
        return families.context(self.config)

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh | None:
        return meshes.mesh_of(self.params)

    @property
    def decoder(self) -> Decoder:
        return whole(self.arch, self.dtype, meshes.rows_of(self.mesh))

    def kernel(self, padding: str) -> attention.Kernel:
        """What computes attention best on this machine, in calls without a cache."""
        return attention.here(self.arch, self.dtype, padding, self.mesh)

    def forward(
        self,
        tokens_BxT: Any,
        mask_BxT: Any = None,
        steer: Steerable | Steer | None = None,
        capture: bool = False,
        start_B: Any = None,
    ) -> Output:
        """Full forward. `mask_BxT` is 1 on real tokens, padding on either side.

        For interventions: answers begin at a row's `start_B`-th token; None: all is prompt.
        """
        tokens_BxT, mask_BxT = inputs.token_arrays(tokens_BxT, mask_BxT, self.arch.V)
        steers = self.as_steer(steer, tokens_BxT, mask_BxT, start_B)
        logits, residual = _forward(
            self.decoder, self.params, tokens_BxT, mask_BxT, steers, capture=capture
        )
        return Output(logits, residual)

    def generate(
        self,
        prompts: Sequence[str | list[dict[str, str]]],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        steer: Steerable | None = None,
        chat: bool = True,
        batch_size: int = 32,
        seed: int = 0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
    ) -> list[str]:
        """Continues each prompt (text, or chat messages); greedy at temperature 0.

        `chat` renders a text prompt as one user turn; an assistant turn at the end of messages is
        gone on with. A vector is added at prompt and new tokens.
        Of the last three, None is as generation_config.json says above temperature 0, else none.
        """
        prompts = inputs.prompts(prompts)
        given = {"top_k": top_k, "top_p": top_p, "repetition_penalty": repetition_penalty}
        how = Sampling.of(temperature, **sampled(self.sampling if temperature else {}, given))
        ids = [self.encode_prompt(prompt, chat) for prompt in prompts]
        if chat:
            text.warn_of_rendered(self.tokenizer, [p for p in prompts if isinstance(p, str)])
        new = self.generate_each(ids, max_new_tokens, how, steer, batch_size, seed)
        return [said(self.tokenizer, ids) for ids in new]

    def generate_each(
        self,
        prompts: Sequence[list[int]],
        max_new: int,
        sampling: float | Sampling = 0.0,
        steer: Steerable | None = None,
        batch_size: int = 32,
        seed: int = 0,
        missing: bool = False,
    ) -> list[list[int]]:
        """Ids in, new ids out, in order; a stop token ends a row and is kept as its last id.

        `sampling` is a temperature, or all of how to draw.

        With `missing`, logits that are not finite are no error: they end a row in MISSING.
        """
        prompts = inputs.token_rows(prompts, self.arch.V, steer, self.context)
        inputs.counts(max_new=max_new, batch_size=batch_size)
        out: list[list[int]] = [[]] * len(prompts)
        size = max(1, min(batch_size, len(prompts)))  # few prompts: no rows for nothing
        batches = batches_by_length([*map(len, prompts)], size)
        for rows in watched(batches, "generating"):
            tokens, mask = pad([prompts[r] for r in rows], self.pad_id, left=True, rows=size)
            asked = max_new, sampling, steer, seed + rows[0], True
            for r, new_M in zip(rows, self.generate_ids(tokens, mask, *asked), strict=False):
                out[r] = self.cut(new_M)
        if not missing:
            self.check_finite([ids[-1] != decode.MISSING for ids in out], "answers", steer)
        return out

    def generate_ids(
        self,
        tokens_BxT: Any,
        mask_BxT: Any,
        max_new: int,
        sampling: float | Sampling = 0.0,
        steer: Steerable | Steer | None = None,
        seed: int = 0,
        missing: bool = False,
    ) -> np.ndarray:
        """Left-padded ids in, [B, max_new] ids out (a row repeats its stop token after it).

        With `missing`, logits that are not finite are no error: from there on a row is MISSING.
        """
        tokens_BxT, mask_BxT = inputs.token_arrays(tokens_BxT, mask_BxT, self.arch.V, left=True)
        inputs.counts(max_new=max_new)
        how = sampling if isinstance(sampling, Sampling) else Sampling.of(sampling)
        B, T = tokens_BxT.shape
        decoder = decode.for_loop(self.decoder, self.params)
        where = self.mesh and meshes.cache_sharding(self.mesh, B, self.arch.K)
        new_BxM, _ = decode.generate(
            decoder,
            self.params,
            *meshes.put_rows((tokens_BxT, mask_BxT), self.mesh),
            cache.born(where)(self.arch, decoder.segments, B, T + max_new, self.dtype),
            self.as_steer(steer, tokens_BxT, mask_BxT, new=max_new),
            jnp.asarray(self.stop_ids or (-1,), jnp.int32),  # -1: no token
            how,
            jax.random.key(seed),
            max_new=max_new,
        )
        new_BxM = meshes.fetch(new_BxM)
        if not missing:
            self.check_finite((new_BxM != decode.MISSING).all(1), "answers", steer)
        return new_BxM

    def loglikelihood(
        self,
        pairs: Sequence[tuple[str, str]],
        steer: Steerable | None = None,
        batch_size: int = 32,
    ) -> list[tuple[float, bool]]:
        """(sum of log p(continuation | context), whether greedy decoding would give it).

        Context and continuation are tokenised jointly, so that a boundary is never cut differently
        from running text; an empty context starts from the BOS (or EOS) token.
        """
        text.need(self.tokenizer, self.name)
        end, given = next(iter(self.stop_ids), self.pad_id), inputs.text_pairs(pairs)
        encoded = [text.encode_pair(self.tokenizer, c, t, end) for c, t in given]
        ids = [tokenizers.known_ids(self.tokenizer, i, self.arch.V) for i, _ in encoded]
        starts = [s for _, s in encoded]
        return self.score_ids(ids, starts, steer, batch_size)

    def score_ids(
        self,
        ids: Sequence[list[int]],
        starts: Sequence[int],
        steer: Steerable | None = None,
        batch_size: int = 32,
        missing: bool = False,
    ) -> list[tuple[float, bool]]:
        """(sum of log p(ids[start:] | ids[:start]), whether each of them is the argmax).

        With `missing`, a sum that is not finite is NaN and no error.
        """
        ids = inputs.token_rows(ids, self.arch.V, steer, self.context)
        starts = inputs.starts(starts, ids)
        out: list[tuple[float, bool]] = [(0.0, False)] * len(ids)
        size = max(1, min(batch_size, len(ids)))
        for rows in watched(batches_by_length([*map(len, ids)], size), "scoring"):
            batch, starts_B = [ids[r] for r in rows], np.array([starts[r] for r in rows], np.int32)
            # Up to the token before the first scored one, whose hidden state predicts it.
            prefix, P = self.split_prefix(batch, int(starts_B.min()) - 1, steer)
            tokens, mask = pad([i[P:] for i in batch], self.pad_id, left=False, rows=size)
            logp_B, greedy_B = score.continuations(
                self.decoder,
                self.params,
                prefix,
                *meshes.put_rows((tokens, mask, np.resize(starts_B - P, len(tokens))), self.mesh),
                self.as_steer(steer, tokens, mask, np.resize(starts_B - P, len(tokens))),
                L=-(-max(len(ids[r]) - starts[r] for r in rows) // BUCKET) * BUCKET,
            )
            found = zip(rows, meshes.fetch(logp_B), meshes.fetch(greedy_B), strict=False)
            for r, logp, greedy in found:
                out[r] = float(logp) if np.isfinite(logp) else np.nan, bool(greedy)
        if not missing:
            self.check_finite([np.isfinite(logp) for logp, _ in out], "scores", steer)
        return out

    def next_logp(
        self,
        prompts: Sequence[list[int]],
        candidates_IxC: np.ndarray,
        steer: Steerable | None = None,
        batch_size: int = 32,
        missing: bool = False,
    ) -> np.ndarray:
        """log p(candidate is the next token) for each prompt's C candidates, [I, C].

        With `missing`, what is not finite is NaN and no error.
        """
        prompts = inputs.token_rows(prompts, self.arch.V, steer, self.context)
        candidates_IxC = inputs.candidates(candidates_IxC, len(prompts), self.arch.V)
        out_IxC = np.zeros(candidates_IxC.shape, np.float32)
        size = max(1, min(batch_size, len(prompts)))
        for rows in watched(batches_by_length([*map(len, prompts)], size), "scoring"):
            batch = [prompts[r] for r in rows]
            prefix, P = self.split_prefix(batch, min(map(len, batch)) - 1, steer)
            tokens, mask = pad([i[P:] for i in batch], self.pad_id, left=False, rows=size)
            candidates = candidates_IxC[np.resize(rows, len(tokens))]
            steers = self.as_steer(steer, tokens, mask)
            placed = meshes.put_rows((tokens, mask, candidates), self.mesh)
            logp = score.candidates(self.decoder, self.params, prefix, *placed, steers)
            out_IxC[rows] = meshes.fetch(logp)[: len(rows)]
        if not missing:
            self.check_finite(np.isfinite(out_IxC).all(1), "scores", steer)
        return np.where(np.isfinite(out_IxC), out_IxC, np.nan)

    def as_steer(
        self,
        steer: Steerable | Steer | None,
        tokens_BxT: Any,
        mask_BxT: Any,
        start_B: Any = None,
        new: int = 0,
    ) -> Steers | None:
        """`steer` for these rows, whose answers begin at `start_B` (None: behind them), and `new`
        tokens to come; a vector that was read from other weights is said to be."""
        if note_model := getattr(steer, "note_model", None):
            note_model(self)

        def cosine(probe: Probe) -> Any:
            rows = meshes.put_rows((tokens_BxT, mask_BxT), self.mesh)
            found = read_at_once(self.decoder, self.params, *rows, hidden=False, probe=probe)
            return meshes.fetch(found.cosine_NxBxT)

        rows = intervene.rows(mask_BxT, cosine, start_B, new)
        return intervene.as_steer(steer, self.arch, rows)

    def check_finite(self, finite_I: Any, what: str, steer: Any = None) -> None:
        """Raises ValueError, naming the model and its type, where a number of `what` is not."""
        finite.require(finite_I, what, self.name, self.dtype, steer is not None)

    def in_batches(
        self, compute: Callable[..., Any], inputs: tuple[np.ndarray, ...], batch: int
    ) -> Any:
        """`compute(*inputs)` for all rows, `batch` at a time; the results on the host."""
        return meshes.in_batches(compute, inputs, batch, self.mesh)

    def split_prefix(
        self, rows: Sequence[list[int]], most: int, steer: Steerable | None = None
    ) -> tuple[Prefix | None, int]:
        """What the rows begin with together (at most `most` tokens), and its length."""
        P = shared_length(rows, most) if getattr(steer, "shares_prompt", True) else 0
        if P == 0:
            return None, 0
        tokens_1xP, behind = np.array([rows[0][:P]], np.int32), [max(map(len, rows))]
        steers = self.as_steer(steer, tokens_1xP, np.ones_like(tokens_1xP), behind)
        return Prefix(tokens_1xP, steers), P

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id if self.tokenizer else None
        known = (t for t in (pad, *self.stop_ids) if t is not None and t < self.arch.V)
        return next(known, 0)

    def encode_prompt(self, prompt: str | list[dict[str, str]], chat: bool = True) -> list[int]:
        text.need(self.tokenizer, self.name)
        if isinstance(prompt, str) and not chat:
            ids = text.encode(self.tokenizer, prompt)
        else:
            turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            ids = templates.encode(self.tokenizer, templates.prompt_text(self.tokenizer, turns))
        return tokenizers.known_ids(self.tokenizer, ids, self.arch.V)

    def cut(self, new_M: np.ndarray) -> list[int]:
        """The generated ids up to and including the first stop token, or MISSING."""
        ids, ends = new_M.tolist(), (*self.stop_ids, decode.MISSING)
        stop = next((i for i, t in enumerate(ids) if t in ends), len(ids))
        return ids[: stop + 1]


def load(name: str | Source, dtype: Any = None, mesh: jax.sharding.Mesh | None = None) -> Model:
    """Loads a Hugging Face folder, a hub id, a `.gguf` file or an Orbax model folder. No torch.

    `dtype` is both storage and compute; by default float32 on CPU, bfloat16 on accelerators.
    Without tokenizer files `tokenizer` is None, and what takes text says so.

    Raises:
      ValueError, FileNotFoundError: one message naming what is missing, unknown or mis-shaped.
    """
    source = name if isinstance(name, Source) else sources.open_source(name)
    dtype = jnp.dtype(dtype or default_dtype())
    return bind(source, dtype, lambda arch: weights.load_params(source, arch, dtype), mesh)


def bind(
    source: Source, dtype: Any, read: Callable[[Arch], Any], mesh: Any, held: str = ""
) -> Model:
    """A source's model, with the weights that `read` gives for it; `held` is what `Model` says."""
    arch = source.arch()
    if source.tokenizer is not None:
        tokenizers.check_vocabulary(source.tokenizer, arch.V)
    params = meshes.put_params(read(arch), mesh)
    return Model(
        arch, params, source.tokenizer, dict(source.config), source.name, dtype, source.eos_ids,
        weights.spelling(source, arch), source.folder, source.sampling, held,
    )  # fmt: skip


def load_adapter(model: Model, folder: str | os.PathLike[str]) -> Model:
    """`model` with a PEFT LoRA adapter merged into its weights.

    Raises:
      ValueError: no LoRA adapter, one with a setting that is not understood, or another base's.
    """
    params = peft.merge(model.params, model.arch, model.sha, Path(folder))
    return dataclasses.replace(model, params=params)


def default_dtype() -> str:
    """fp32 where bf16 has no fast path."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


@partial(jax.jit, static_argnames=("decoder", "capture"))
def _forward(decoder, params, tokens_BxT, mask_BxT, steers, *, capture):
    asked = {"steer": steers, "keep_residual": capture}
    found = read(decoder, {"params": params}, tokens_BxT, mask_BxT, **asked)
    return unembed(decoder, params, found.hidden_BxTxD), found.residual_NxBxTxD
