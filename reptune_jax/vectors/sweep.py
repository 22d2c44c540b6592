"""Layers x doses x prompts at once: how far a vector moves an answer, and for whom the wrong way.

Every row of a batch has its own layer and dose, so all of them are one compiled program. Where the
prompt is left alone, it is read once for all of a prompt's cells; and of several batches each
begins above the layers that it leaves alone, which run once. After Tan et al. (2024, arXiv
2407.12404), who found that up to half of the prompts of a data set move the wrong way.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reptune_jax import mesh as meshes
from reptune_jax.console import watched
from reptune_jax.lm import Model
from reptune_jax.model import inputs, score
from reptune_jax.model.intervene import rows as rows_of
from reptune_jax.model.intervene import span
from reptune_jax.model.padding import pad
from reptune_jax.model.prefix import Prefix
from reptune_jax.model.read import read_at_once
from reptune_jax.vectors import sweep_file
from reptune_jax.vectors.intervention import Intervention
from reptune_jax.vectors.steering_vector import SteeringVector

DOSES = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
_BUCKET = 32  # of prompts' lengths, so that few shapes are compiled
_ROWS, _TOKENS = 32, 1536  # of a batch: small ones share more layers, large ones make fast products
Prompt = str | list[dict[str, str]]


@dataclasses.dataclass(frozen=True, eq=False)
class Sweep:
    """What was measured, at each of `layers` (L), `doses` (K) and prompts (I)."""

    layers: tuple[int, ...]
    doses: tuple[float, ...]
    logp_LxKxIx2: np.ndarray  # log p(positive answer | prompt), and of the negative one

    @property
    def logodds_LxKxI(self) -> np.ndarray:
        """log p(positive) - log p(negative), nats."""
        return self.logp_LxKxIx2[..., 0] - self.logp_LxKxIx2[..., 1]

    @property
    def coverage_LxK(self) -> np.ndarray:
        """Mean p(positive) + p(negative), of letters: below a half, it says something else."""
        return np.exp(self.logp_LxKxIx2).sum(-1).mean(-1)

    @property
    def slope_LxI(self) -> np.ndarray:
        """Least squares slope of the log-odds over doses: nats for a dose of 1."""
        doses_K = np.array(self.doses) - np.mean(self.doses)
        return np.einsum("k,lki->li", doses_K, self.logodds_LxKxI) / np.square(doses_K).sum()

    @property
    def wrong_L(self) -> np.ndarray:
        """Share of prompts that the vector moves the other way (anti-steerable)."""
        return (self.slope_LxI < 0).mean(1)


def sweep(
    model: Model,
    vector: SteeringVector,
    asked: Sequence[tuple[Prompt, str, str]],
    doses: Sequence[float] = DOSES,
    operation: str = "add",
    tokens: str = "answer",
    chat: bool = True,
    batch_size: int = 256,
    keep: str | Path = "",
) -> Sweep:
    """Log-probabilities of two answers to each prompt, at every layer of the vector and every dose.

    `asked` are (prompt, positive answer, negative answer); a prompt is text, rendered as one user
    turn by `chat`, or messages. `operation` and `tokens` are those of `Intervention`; a dose of 0
    is the model as it is. Rules that spare the prompt ("answer", "generated") cost least: of each
    cell only what follows the prompt is computed. `keep` is a .safetensors in which prompts that
    are done are kept: the same call, or one with more prompts behind the same, goes on from there.

    Raises:
      ValueError: no prompts, doses, or layers; fewer than two doses; no such operation or rule; a
        vector of another model; a kept sweep of something else; or log-probabilities that are not
        finite.
    """
    doses = tuple(float(dose) for dose in doses)
    if len(set(doses)) < 2 or len(set(doses)) != len(doses) or not vector.layers:
        raise ValueError(
            f"doses: got {list(doses)} at layers {list(vector.layers)}, expected two or more, all "
            "different, and a layer. Example: doses=(-1, 0, 1)"
        )
    if not asked:
        raise ValueError("asked: got none, expected (prompt, positive, negative) for each prompt.")
    inputs.counts(batch_size=batch_size)
    done = Intervention(vector, 1.0, operation, tokens)
    vector.check_shape(model.arch.N, model.arch.D)
    done.note_model(model)
    untouched = [(vector.layers[0], 0.0)] if 0.0 in doses else []
    moved = list(itertools.product(vector.layers, [dose for dose in doses if dose]))
    cells = untouched + moved
    texts = [_encode(model, one, chat) for one in asked]
    about = {
        "model": model.sha,
        "vector": vector.digest,
        "cells": cells,
        "operation": operation,
        "tokens": tokens,
    }
    kept = sweep_file.Kept(Path(keep) if keep else None, about, texts)
    try:
        left = texts[len(kept.rows) :]
        for prompt, answers in watched(left, "sweeping"):
            kept.add(_cells(model, done, cells, prompt, answers, batch_size))
    finally:
        kept.write()
    logp_CxIx2 = np.stack(kept.rows, axis=1)
    model.check_finite(np.isfinite(logp_CxIx2).all((0, 2)), "scores", vector)
    shape = len(vector.layers), len(doses), len(asked), 2
    at = {cell: c for c, cell in enumerate(moved, len(untouched))}
    logp = [logp_CxIx2[at.get(cell, 0)] for cell in itertools.product(vector.layers, doses)]
    return Sweep(vector.layers, doses, np.reshape(logp, shape))


def _encode(
    model: Model, one: tuple[Prompt, str, str], chat: bool
) -> tuple[list[int], list[list[int]]]:
    """Ids of the prompt, and of its answers."""
    prompt, *answers = one
    ids = model.encode_prompt(prompt, chat)
    own = [model.tokenizer.encode(text, add_special_tokens=False) for text in answers]
    if not ids or not all(own):
        raise ValueError(
            f"asked: got the prompt {str(prompt)[:40]!r} with answers {answers!r}, expected text "
            "in each of them."
        )
    inputs.token_rows([ids + o for o in own], model.arch.V, context=model.context)
    return ids, own


def _cells(
    model: Model,
    done: Intervention,
    cells: Sequence[tuple[int, float]],
    prompt: list[int],
    answers: list[list[int]],
    batch_size: int,
) -> np.ndarray:
    """log p(answer | prompt) of each (layer, dose), [C, 2]."""
    # What predicts is the prompt's last token: before it are those that all cells may share.
    P = len(prompt) - 1 if span(done.tokens)[0] >= -1 else 0
    prefix = None
    if P:
        tokens, mask = pad([prompt[:P]], model.pad_id, left=True, bucket=_BUCKET)
        prefix = Prefix(tokens, None, mask)
    logp = functools.partial(_logp, model, done, cells, batch_size, prefix, len(prompt) - P)
    if all(len(answer) == 1 for answer in answers):  # letters: all are read off one row
        return logp(prompt[P:], [answer[0] for answer in answers])
    return np.stack([logp(prompt[P:] + answer) for answer in answers], axis=1)


def _logp(
    model: Model,
    done: Intervention,
    cells: Sequence[tuple[int, float]],
    batch_size: int,
    prefix: Prefix | None,
    start: int,
    ids: list[int],
    letters: Sequence[int] = (),
) -> np.ndarray:
    """log p, [C], of the answer that begins at `start` of the row `ids` behind the prefix; or of
    each of the letters as the row's next token, [C, A]."""
    most = min(batch_size, max(_ROWS, _TOKENS // len(ids)))
    size = -(-len(cells) // -(-len(cells) // most))
    bucket = _BUCKET if not prefix else 8 if len(ids) > 2 else 1
    row = pad([ids], model.pad_id, left=False, bucket=bucket)
    plain_NxTxD = None  # what cells of other layers have below their own
    if len(cells) > size:
        one, asked = meshes.put_rows(row, model.mesh), {"hidden": False, "keep_residual": True}
        plain = read_at_once(model.decoder, model.params, *one, prefix, **asked)
        plain_NxTxD = plain.residual_NxBxTxD[:, 0]
    found = []
    for some in (cells[i : i + size] for i in range(0, len(cells), size)):
        tokens, real = (np.repeat(a, size, axis=0) for a in row)
        start_B = np.full(size, start, np.int32)
        dose_NxB, on_NxB = (np.zeros((model.arch.N, size), np.float32) for _ in range(2))
        for b, (layer, dose) in enumerate(some):
            dose_NxB[layer, b], on_NxB[layer, b] = dose, dose != 0
        at = rows_of(real, _no_cosine, start_B)
        steers = (done.by_rows(model.arch, at, dose_NxB, on_NxB),)
        first = min(layer for layer, _ in some)
        above = None if plain_NxTxD is None or not first else (first, plain_NxTxD[first - 1])
        how = model.decoder, model.params, prefix
        if letters:
            picked = np.tile(letters, (size, 1)).astype(np.int32)
            placed = meshes.put_rows((tokens, real, picked), model.mesh)
            logp = score.candidates(*how, *placed, steers, above)
        else:
            placed = meshes.put_rows((tokens, real, start_B), model.mesh)
            L = -(-(len(ids) - start) // 8) * 8
            logp, _ = score.continuations(*how, *placed, steers, above, L=L)
        found.append(meshes.fetch(logp)[: len(some)])
    return np.concatenate(found)


def _no_cosine(probe: Any) -> Any:
    raise AssertionError("a sweep has no conditions")
