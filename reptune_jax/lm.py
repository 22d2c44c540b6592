"""`Model`: an architecture, its weights and its tokenizer, bound together.

The methods here are the convenient face (text in, text or arrays out) of the pure functions in
`model/`; programs that need their own jitted step use those directly.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from tqdm import tqdm

from reptune_jax import distributed
from reptune_jax import mesh as meshes
from reptune_jax.hub import digest, export, peft, weights
from reptune_jax.hub import source as sources
from reptune_jax.hub import tokenizer as tokenizers
from reptune_jax.hub.endings import said
from reptune_jax.hub.source import Source
from reptune_jax.model import attention, decode, score
from reptune_jax.model.arch import Arch
from reptune_jax.model.cache import init_cache
from reptune_jax.model.intervene import Steer, Steerable, as_steer
from reptune_jax.model.padding import BUCKET, batches_by_length, pad
from reptune_jax.model.prefix import Prefix, shared_length
from reptune_jax.model.read import read
from reptune_jax.model.transformer import Decoder, unembed, whole


@dataclasses.dataclass(frozen=True)
class Output:
    """One forward pass."""

    logits_BxTxV: jax.Array  # float32
    residual_NxBxTxD: jax.Array | None  # output of every block, before the final norm


@dataclasses.dataclass(frozen=True)
class Model:
    """A chat model; see `load`. `config` is the raw config.json, kept for the export."""

    arch: Arch
    params: dict[str, Any]
    tokenizer: Any
    config: dict[str, Any]
    name: str
    dtype: Any
    stop_ids: tuple[int, ...]
    spelling: weights.Spelling = weights.AS_TABLED

    @functools.cached_property
    def sha(self) -> str:
        """Identifies the base weights; a tuned model has its base's."""
        norm_D, table_VxD = self.params["final_norm"]["scale"], self.params["embed"]["embedding"]
        return digest.weights_sha(self.arch, norm_D, table_VxD[:64])

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh | None:
        return meshes.mesh_of(self.params)

    @property
    def decoder(self) -> Decoder:
        return whole(self.arch, self.dtype, meshes.rows_of(self.mesh))

    def kernel(self, padding: str) -> attention.Kernel:
        """What computes attention best on this machine, in calls without a cache."""
        device = jax.devices()[0]
        return attention.choose(
            self.arch,
            device.platform,
            self.dtype,
            padding=padding,
            hopper=float(getattr(device, "compute_capability", 0)) >= 9,
            mesh=self.mesh,
        )

    def forward(
        self,
        tokens_BxT: Any,
        mask_BxT: Any = None,
        steer: Steerable | Steer | None = None,
        capture: bool = False,
    ) -> Output:
        """Full forward. `mask_BxT` is 1 on real tokens, padding on either side."""
        tokens_BxT = jnp.asarray(tokens_BxT)
        mask_BxT = jnp.ones_like(tokens_BxT) if mask_BxT is None else jnp.asarray(mask_BxT)
        steer = as_steer(steer, self.arch, *tokens_BxT.shape)
        logits, residual = _forward(
            self.decoder, self.params, tokens_BxT, mask_BxT, steer, capture=capture
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
    ) -> list[str]:
        """Continues each prompt (text, or chat messages); greedy at temperature 0.

        `chat` renders a text prompt as one user turn. Steering applies to prompt and new tokens.
        """
        new = self.generate_each(
            [self.encode_prompt(prompt, chat) for prompt in prompts],
            max_new_tokens,
            temperature,
            steer,
            batch_size,
            seed,
        )
        return [said(self.tokenizer, ids) for ids in new]

    def generate_each(
        self,
        prompts: Sequence[list[int]],
        max_new: int,
        temperature: float = 0.0,
        steer: Steerable | None = None,
        batch_size: int = 32,
        seed: int = 0,
    ) -> list[list[int]]:
        """Ids in, new ids out, in order; a stop token ends a row and is kept as its last id."""
        _check_batched(prompts, steer)
        out: list[list[int]] = [[]] * len(prompts)
        size = max(1, min(batch_size, len(prompts)))  # few prompts: no rows for nothing
        batches = list(batches_by_length([len(p) for p in prompts], size))
        for rows in tqdm(batches, desc="generating", delay=2, leave=False):
            tokens, mask = pad([prompts[r] for r in rows], self.pad_id, left=True, rows=size)
            new_BxM = self.generate_ids(tokens, mask, max_new, temperature, steer, seed + rows[0])
            for r, new_M in zip(rows, new_BxM, strict=False):
                out[r] = self.cut(new_M)
        return out

    def generate_ids(
        self,
        tokens_BxT: np.ndarray,
        mask_BxT: np.ndarray,
        max_new: int,
        temperature: float = 0.0,
        steer: Steerable | Steer | None = None,
        seed: int = 0,
    ) -> np.ndarray:
        """Left-padded ids in, [B, max_new] ids out (a row repeats its stop token after it)."""
        B, T = tokens_BxT.shape
        make_cache: Any = init_cache
        if self.mesh is not None:
            make_cache = _sharded_cache(meshes.cache_sharding(self.mesh, B, self.arch.K))
        new_BxM, _ = decode.generate(
            self.decoder,
            self.params,
            *meshes.put_rows((tokens_BxT, mask_BxT), self.mesh),
            make_cache(self.arch, B, T + max_new, self.dtype),
            as_steer(steer, self.arch, B, T + 1),
            jnp.asarray(self.stop_ids or (-1,), jnp.int32),  # -1: no token
            jnp.float32(temperature),
            jax.random.key(seed),
            max_new=max_new,
        )
        return meshes.fetch(new_BxM)

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
        encoded = [self.encode_pair(c, t) for c, t in pairs]
        ids, starts = [i for i, _ in encoded], [s for _, s in encoded]
        return self.score_ids(ids, starts, steer, batch_size)

    def score_ids(
        self,
        ids: Sequence[list[int]],
        starts: Sequence[int],
        steer: Steerable | None = None,
        batch_size: int = 32,
    ) -> list[tuple[float, bool]]:
        """(sum of log p(ids[start:] | ids[:start]), whether each of them is the argmax)."""
        _check_batched(ids, steer)
        out: list[tuple[float, bool]] = [(0.0, False)] * len(ids)
        size = max(1, min(batch_size, len(ids)))
        for rows in batches_by_length([len(i) for i in ids], size):
            batch, starts_B = [ids[r] for r in rows], np.array([starts[r] for r in rows], np.int32)
            # Up to the token before the first scored one, whose hidden state predicts it.
            prefix, P = self.split_prefix(batch, int(starts_B.min()) - 1, steer)
            tokens, mask = pad([i[P:] for i in batch], self.pad_id, left=False, rows=size)
            logp_B, greedy_B = score.continuations(
                self.decoder,
                self.params,
                prefix,
                *meshes.put_rows((tokens, mask, np.resize(starts_B - P, len(tokens))), self.mesh),
                as_steer(steer, self.arch, *tokens.shape),
                L=-(-max(len(ids[r]) - starts[r] for r in rows) // BUCKET) * BUCKET,
            )
            for r, logp, greedy in zip(
                rows, meshes.fetch(logp_B), meshes.fetch(greedy_B), strict=False
            ):
                out[r] = float(logp), bool(greedy)
        return out

    def next_logp(
        self,
        prompts: Sequence[list[int]],
        candidates_IxC: np.ndarray,
        steer: Steerable | None = None,
        batch_size: int = 32,
    ) -> np.ndarray:
        """log p(candidate is the next token) for each prompt's C candidates, [I, C]."""
        _check_batched(prompts, steer)
        out_IxC = np.zeros(candidates_IxC.shape, np.float32)
        size = max(1, min(batch_size, len(prompts)))
        for rows in batches_by_length([len(p) for p in prompts], size):
            batch = [prompts[r] for r in rows]
            prefix, P = self.split_prefix(batch, min(map(len, batch)) - 1, steer)
            tokens, mask = pad([i[P:] for i in batch], self.pad_id, left=False, rows=size)
            candidates = candidates_IxC[np.resize(rows, len(tokens))]
            steer_B = as_steer(steer, self.arch, *tokens.shape)
            placed = meshes.put_rows((tokens, mask, candidates), self.mesh)
            logp = score.candidates(self.decoder, self.params, prefix, *placed, steer_B)
            out_IxC[rows] = meshes.fetch(logp)[: len(rows)]
        return out_IxC

    def in_batches(
        self, compute: Callable[..., Any], inputs: tuple[np.ndarray, ...], batch: int
    ) -> Any:
        """`compute(*inputs)` for all rows, `batch` at a time; the results on the host."""
        found, B = [], len(inputs[0])
        for start in range(0, B, batch):
            rows_B = np.resize(np.arange(start, min(start + batch, B)), batch)
            rows = meshes.put_rows(tuple(a[rows_B] for a in inputs), self.mesh)
            found.append(meshes.fetch(compute(*rows)))
        return jax.tree.map(lambda *parts: np.concatenate(parts)[:B], *found)

    def split_prefix(
        self, rows: Sequence[list[int]], most: int, steer: Steerable | None = None
    ) -> tuple[Prefix | None, int]:
        """What the rows begin with together (at most `most` tokens), and its length."""
        P = shared_length(rows, most)
        if P == 0:
            return None, 0
        return Prefix(np.array([rows[0][:P]], np.int32), as_steer(steer, self.arch, 1, P)), P

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id if self.tokenizer else None
        return next(iter(self.stop_ids), 0) if pad is None else pad

    def _need_tokenizer(self) -> None:
        if self.tokenizer is None:
            raise ValueError(
                f"{self.name}: has no tokenizer, expected one for text. Use `generate_ids` and "
                "`forward` with token ids, or add its files."
            )

    def encode_prompt(self, prompt: str | list[dict[str, str]], chat: bool = True) -> list[int]:
        self._need_tokenizer()
        if isinstance(prompt, str) and not chat:
            return self.tokenizer.encode(prompt)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = tokenizers.chat_text(self.tokenizer, messages)
        # The template has written its own special tokens; adding them again would double BOS.
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], int]:
        """Joint ids and the index of the continuation's first token (by character offset)."""
        self._need_tokenizer()
        encoded = self.tokenizer(
            context + continuation, return_offsets_mapping=True, add_special_tokens=False
        )
        ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
        start = next((i for i, (_, end) in enumerate(offsets) if end > len(context)), None)
        if start is None:
            raise ValueError(
                f"continuation: got {continuation!r}, which has no token of its own, expected text "
                "to score. Drop it."
            )
        if start == 0:
            bos = self.tokenizer.bos_token_id
            return [next(iter(self.stop_ids), self.pad_id) if bos is None else bos, *ids], 1
        return ids, start

    def cut(self, new_M: np.ndarray) -> list[int]:
        """The generated ids up to and including the first stop token."""
        ids = new_M.tolist()
        stop = next((i for i, t in enumerate(ids) if t in self.stop_ids), len(ids))
        return ids[: stop + 1]


def load(name: str | Source, dtype: Any = None, mesh: jax.sharding.Mesh | None = None) -> Model:
    """Loads a Hugging Face folder, a hub id, a `.gguf` file or an Orbax model folder. No torch.

    `dtype` is both storage and compute; by default float32 on CPU, bfloat16 on accelerators.
    Without tokenizer files `tokenizer` is None, and what takes text says so.

    Raises:
      ValueError, FileNotFoundError: one message naming what is missing, unknown or mis-shaped.
    """
    dtype = jnp.dtype(dtype or default_dtype())
    source = name if isinstance(name, Source) else sources.open_source(name)
    arch = source.arch()
    if source.tokenizer is not None:
        tokenizers.check_vocabulary(source.tokenizer, arch.V)
    host = weights.load_params(source, arch, dtype)
    params = meshes.put_params(host, mesh)
    return Model(
        arch,
        params,
        source.tokenizer,
        dict(source.config),
        source.name,
        dtype,
        source.eos_ids,
        weights.spelling(source, arch),
    )


def load_adapter(model: Model, folder: str | os.PathLike[str]) -> Model:
    """`model` with a PEFT LoRA adapter merged into its weights.

    Raises:
      ValueError: no LoRA adapter, one of a kind that is not computed here, or another base's.
    """
    flat = traverse_util.flatten_dict(model.params, sep="/")
    pairs = peft.read_adapter(Path(folder), model.arch, model.sha)
    for path, layers, change in peft.changes(pairs, model.arch):
        at = jnp.asarray(layers)
        merged = flat[path][at].astype(jnp.float32) + change
        flat[path] = flat[path].at[at].set(merged.astype(flat[path].dtype))
    return dataclasses.replace(model, params=traverse_util.unflatten_dict(flat, sep="/"))


def save_hf(model: Model, folder: str | os.PathLike[str], card: str = "") -> Path:
    """Writes an ordinary Hugging Face folder that plain `transformers` loads; see `hub.export`."""
    config = {k: v for k, v in model.config.items() if k != "torch_dtype"}  # old name of dtype
    # From several hosts all weights must come together; else they are read one by one.
    params = model.params if jax.process_count() == 1 else meshes.fetch(model.params)
    card = card or f"# {Path(folder).name}\n\nExported from {model.name} by reptune_jax.\n"
    generation = {"eos_token_id": list(model.stop_ids) or None, "pad_token_id": model.pad_id}
    distributed.once(
        lambda: export.save_folder(
            folder,
            {**config, "dtype": model.dtype.name},
            params,
            model.tokenizer,
            generation,
            card,
            model.spelling,
        )
    )
    return Path(folder)


def default_dtype() -> str:
    """fp32 where bf16 has no fast path."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


@functools.lru_cache
def _sharded_cache(where: jax.sharding.NamedSharding) -> Any:
    """Born in its layout: on one device it might not fit."""
    return jax.jit(init_cache, static_argnums=(0, 1, 2, 3), out_shardings=where)


def _check_batched(ids: Sequence[Sequence[int]], steer: Any) -> None:
    for i, row in enumerate(ids):
        if not row:
            raise ValueError(
                f"prompt {i}: got no tokens, expected at least one. Give it some text."
            )
    if isinstance(steer, Steer):
        raise ValueError(
            "steer: got a Steer, which is bound to the rows and columns of one batch, expected a "
            "SteeringVector where rows are sorted and padded. Use `forward` or `generate_ids`."
        )


@partial(jax.jit, static_argnames=("decoder", "capture"))
def _forward(decoder, params, tokens_BxT, mask_BxT, steer, *, capture):
    asked = {"steer": steer, "keep_residual": capture}
    found = read(decoder, {"params": params}, tokens_BxT, mask_BxT, **asked)
    return unembed(decoder, params, found.hidden_BxTxD), found.residual_NxBxTxD
