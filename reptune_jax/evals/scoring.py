"""Log-probability measures: contrasts, retention on neutral text, cosines to the vector."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from reptune_jax import mesh as meshes
from reptune_jax.data import neutral
from reptune_jax.data.neutral import NeutralText
from reptune_jax.data.schema import Item
from reptune_jax.evals.arms import Condition
from reptune_jax.evals.results import Row, sha
from reptune_jax.lm import Model
from reptune_jax.model.padding import pad
from reptune_jax.model.read import read_at_once
from reptune_jax.model.transformer import Decoder, unembed
from reptune_jax.vectors.steering_vector import SteeringVector

SPLIT_OF = {"prose": "neutral", "chats": "chats"}  # what a neutral text's rows are filed under


class Matched(Protocol):
    """A prompt, with an answer that shows what is tested and one that opposes it."""

    @property
    def messages(self) -> Sequence[dict[str, str]]: ...
    @property
    def pos(self) -> str: ...
    @property
    def neg(self) -> str: ...


def contrast_rows(
    cond: Condition, labels: dict[str, Any], items: Sequence[Item], batch: int
) -> list[Row]:
    """log p(pos) - log p(neg) of each prompt's two matched answers, as sequences."""
    found = contrasts(cond, items, batch)
    return [Row.of(i, labels, **columns) for i, columns in zip(items, found, strict=True)]


def contrasts(cond: Condition, asked: Sequence[Matched], batch: int) -> list[dict[str, Any]]:
    """The columns of a row that say what the two answers are worth, nats."""
    if not asked:
        return []
    encode = partial(cond.model.tokenizer.encode, add_special_tokens=False)
    prompts = [cond.model.encode_prompt(cond.under_persona(a.messages)) for a in asked]
    ids = [p + encode(x) for p, a in zip(prompts, asked, strict=True) for x in (a.pos, a.neg)]
    starts = [len(p) for p in prompts for _ in range(2)]
    logp = [v for v, _ in cond.model.score_ids(ids, starts, cond.steer, batch, missing=True)]
    return [
        {"metric": "logodds", "value": p - n, "logp_pos": p, "logp_neg": n, "prompt_sha": sha(ids)}
        for ids, p, n in zip(prompts, logp[::2], logp[1::2], strict=True)
    ]


class Reference(NamedTuple):
    """A neutral text, and the base model's final hidden states that predict its answer."""

    text: NeutralText
    states_LxD: np.ndarray


def references(base: Model, split: str, settings: ConfigDict) -> list[Reference]:
    """A split's neutral documents, and unrelated chats with the base's greedy answers."""
    limit, batch = settings.documents, settings.batch
    chats = neutral.chats(base, split, settings.new_tokens, limit, batch)
    return refer(base, neutral.prose(base, split, limit), batch) + refer(base, chats, batch)


def refer(base: Model, texts: Sequence[NeutralText], batch: int) -> list[Reference]:
    """The texts as the base model reads them."""
    pairs = [(t.prompt, t.answer) for t in texts]
    states = _states(Condition(base, "base"), pairs, max(batch // 2, 1))
    return [Reference(t, s) for t, s in zip(texts, states, strict=True)]


def retention_rows(
    cond: Condition, labels: dict[str, Any], known: Sequence[Reference], batch: int
) -> list[Row]:
    """Per text: nll (nats), KL(base || arm) and top-1 agreement, own_ce on the base's own answers.

    A persona cannot be put in front of bare prose, so the prompt arm has no row there.
    """
    prompts = [r.text.prompt for r in known]
    if cond.persona is not None:
        known = [r for r in known if r.text.messages is not None]
        turns = (cond.under_persona(r.text.messages or ()) for r in known)
        prompts = [cond.model.encode_prompt(messages) for messages in turns]
    pairs = [(prompt, r.text.answer) for prompt, r in zip(prompts, known, strict=True)]
    out = []
    states = _states(cond, pairs, max(batch // 2, 1))
    for (text, base_LxD), (prompt, answer), own_LxD in zip(known, pairs, states, strict=True):
        nll, kl, top1 = _compare(cond.model, own_LxD, base_LxD, answer)
        values = {"nll": nll, "kl": kl / len(answer), "top1": top1 / len(answer)}
        if text.kind == "chats":
            values = {"own_ce": nll / len(answer)} | values
        whole = np.isfinite([nll, kl]).all()  # a top-1 of NaN would be that of token 0
        out += [
            Row(
                **labels,
                split=SPLIT_OF[text.kind],
                item_id=text.id,
                cluster=text.id,
                metric=metric,
                value=value if whole else np.nan,
                n_tokens=len(answer),
                n_bytes=text.n_bytes,
                prompt_sha=sha(prompt),
            )
            for metric, value in values.items()
        ]
    return out


def cosine_rows(
    cond: Condition,
    labels: dict[str, Any],
    vector: SteeringVector,
    items: Sequence[Item],
    around: int = 12,
) -> list[Row]:
    """cos(h, v) at every layer and at positions counted from the first answer token (= 0).

    Each prompt is followed by its `neg` text for every arm, so that arms see the same tokens.
    """
    if not items:
        return []
    prompts = [cond.encode(item) for item in items]
    tails = [cond.model.tokenizer.encode(i.neg, add_special_tokens=False) for i in items]
    tokens, mask = pad(
        [p + t for p, t in zip(prompts, tails, strict=True)], cond.model.pad_id, left=False
    )
    steer = cond.model.as_steer(cond.steer, tokens, mask, [*map(len, prompts)])
    batch = meshes.put_rows((tokens, mask), cond.model.mesh)
    asked = {"steer": steer, "probe": vector.probe(), "hidden": False}
    found = read_at_once(cond.model.decoder, cond.model.params, *batch, **asked)
    cosine_NxBxT, out = meshes.fetch(found.cosine_NxBxT), []
    for offset in range(-around, around):
        at_B = [len(p) + offset for p in prompts]
        fits = [b for b, t in enumerate(at_B) if 0 <= t < mask[b].sum()]
        if not fits:  # all these answers are shorter
            continue
        mean_N = cosine_NxBxT[:, fits, [at_B[b] for b in fits]].mean(axis=1)
        out += [
            Row(
                **labels | {"layer": layer},
                split="test",
                item_id=f"mean-of-{len(items)}",
                cluster="all",
                metric="cos",
                value=float(value) if np.isfinite(value) else np.nan,
                position=str(offset),
                n_tokens=len(fits),
            )
            for layer, value in enumerate(mean_N)
        ]
    return out


def _states(
    cond: Condition, pairs: Sequence[tuple[list[int], list[int]]], size: int
) -> list[np.ndarray]:
    """For each (prompt, answer): the final hidden states that predict the answer's tokens."""
    out: list[np.ndarray] = [np.empty(0)] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    for first in range(0, len(order), size):
        rows = order[first : first + size]
        ids = [pairs[r][0] + pairs[r][1] for r in rows]
        tokens, mask = pad(ids, cond.model.pad_id, left=False, rows=size, bucket=64)
        starts = np.resize([len(pairs[r][0]) for r in rows], size)
        steer = cond.model.as_steer(cond.steer, tokens, mask, starts)
        batch = meshes.put_rows((tokens, mask), cond.model.mesh)
        found = read_at_once(cond.model.decoder, cond.model.params, *batch, steer=steer)
        hidden = meshes.fetch(found.hidden_BxTxD)
        for b, r in enumerate(rows):
            start = len(pairs[r][0]) - 1
            out[r] = hidden[b, start : start + len(pairs[r][1])]
    return out


def _compare(
    model: Model, own_LxD: np.ndarray, base_LxD: np.ndarray, answer: list[int], bucket: int = 64
) -> tuple[float, float, float]:
    """(nll, KL(base || own), top-1 agreements), summed over an answer; padded to few lengths."""
    L = len(answer)
    size = -(-L // bucket) * bucket
    padded = [np.pad(a, ((0, size - L), (0, 0))) for a in (own_LxD, base_LxD)]
    target = np.pad(np.asarray(answer, np.int32), (0, size - L))
    sums = _compare_states(model.decoder, model.params, *padded, target, np.arange(size) < L)
    nll, kl, top1 = (float(s) for s in meshes.fetch(sums))
    return nll, kl, top1


@partial(jax.jit, static_argnames=("decoder",))
def _compare_states(decoder: Decoder, params, own_LxD, base_LxD, target_L, real_L):
    own = jax.nn.log_softmax(unembed(decoder, params, own_LxD), axis=-1)
    base = jax.nn.log_softmax(unembed(decoder, params, base_LxD), axis=-1)
    nll_L = -jnp.take_along_axis(own, target_L[:, None], axis=1)[:, 0]
    kl_L = jnp.sum(jnp.exp(base) * (base - own), axis=-1)
    same_L = own.argmax(-1) == base.argmax(-1)
    return tuple(jnp.sum(x * real_L) for x in (nll_L, kl_L, same_L))
