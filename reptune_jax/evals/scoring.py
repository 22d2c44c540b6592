"""Log-probability measures: contrasts, retention on neutral text, cosines to the vector."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from reptune_jax import mesh as meshes
from reptune_jax.data.schema import Item, load_neutral
from reptune_jax.evals.arms import Condition
from reptune_jax.evals.results import Row, sha
from reptune_jax.lm import Model, as_steer, pad
from reptune_jax.model.transformer import Decoder, collect, unembed
from reptune_jax.vectors.steering_vector import SteeringVector


def contrast_rows(c: ConfigDict, cond: Condition, items: Sequence[Item]) -> list[Row]:
    """log p(pos) - log p(neg) of each prompt's two matched answers, as sequences."""
    if not items:
        return []
    prompts = [cond.encode(item) for item in items]
    encode = partial(cond.model.tokenizer.encode, add_special_tokens=False)
    both = [
        (p, encode(text)) for p, i in zip(prompts, items, strict=True) for text in (i.pos, i.neg)
    ]
    logp = [
        value
        for value, _ in cond.model.score_ids(
            [p + a for p, a in both], [len(p) for p, _ in both], cond.steer, c.eval.batch
        )
    ]
    labels = cond.labels(c)
    return [
        Row(
            **labels,
            split=item.split,
            item_id=item.id,
            cluster=item.cluster,
            format=item.format,
            metric="logodds",
            value=pos - neg,
            logp_pos=pos,
            logp_neg=neg,
            prompt_sha=sha(prompt),
        )
        for item, prompt, pos, neg in zip(items, prompts, logp[::2], logp[1::2], strict=True)
    ]


class Text(NamedTuple):
    """A text whose tokens from `start` on are scored, and what the base model made of them."""

    item_id: str
    split: str  # neutral | chats
    messages: list[dict[str, str]] | None  # the prompt of a chat; None for prose
    prompt: list[int]
    answer: list[int]
    n_bytes: int
    states_LxD: np.ndarray = np.empty(0)  # base model's final hidden states that predict the answer


def reference(c: ConfigDict, base: Model) -> list[Text]:
    """The test split's neutral documents, and unrelated chats with the base's greedy answers."""
    return prose(base, "test", c.eval.documents, c.eval.batch) + _chats(c, base)


def prose(base: Model, split: str, limit: int, batch: int) -> list[Text]:
    """Neutral documents of a split, at most `limit` of them (0 = all)."""
    texts = []
    for d in load_neutral("prose", split)[: limit or None]:
        ids = base.tokenizer.encode(d["text"])
        n_bytes = len(d["text"].encode())
        texts.append(Text(d["id"], "neutral", None, ids[:1], ids[1:], n_bytes))
    return _with_states(base, texts, batch)


def _chats(c: ConfigDict, base: Model) -> list[Text]:
    chats = load_neutral("chats", "test")[: c.eval.documents or None]
    prompts = [base.encode_prompt(d["messages"]) for d in chats]
    new = base.generate_each(prompts, c.eval.new_tokens, batch_size=c.eval.batch)
    texts = []
    for d, prompt, ids in zip(chats, prompts, new, strict=True):
        n_bytes = len(base.tokenizer.decode(ids).encode())
        texts.append(Text(d["id"], "chats", d["messages"], prompt, ids, n_bytes))
    return _with_states(base, texts, c.eval.batch)


def _with_states(base: Model, texts: list[Text], batch: int) -> list[Text]:
    pairs = [(t.prompt, t.answer) for t in texts]
    states = _states(Condition(base, "base"), pairs, max(batch // 2, 1))
    return [t._replace(states_LxD=s) for t, s in zip(texts, states, strict=True)]


def retention_rows(c: ConfigDict, cond: Condition, texts: Sequence[Text]) -> list[Row]:
    """Per text: nll (nats), KL(base || arm) and top-1 agreement, own_ce on the base's own answers.

    A persona cannot be put in front of bare prose, so the prompt arm has no row there.
    """
    if cond.persona is not None:
        texts = [t for t in texts if t.messages is not None]
    pairs = [(_prompt(cond, t), t.answer) for t in texts]
    states = _states(cond, pairs, max(c.eval.batch // 2, 1))
    labels, out = cond.labels(c), []
    for text, (prompt, answer), own in zip(texts, pairs, states, strict=True):
        nll, kl, top1 = _compare(cond.model, own, text.states_LxD, answer)
        values = {"nll": nll, "kl": kl / len(answer), "top1": top1 / len(answer)}
        if text.split == "chats":
            values = {"own_ce": nll / len(answer)} | values
        out += [
            Row(
                **labels,
                split=text.split,
                item_id=text.item_id,
                cluster=text.item_id,
                metric=metric,
                value=value,
                n_tokens=len(answer),
                n_bytes=text.n_bytes,
                prompt_sha=sha(prompt),
            )
            for metric, value in values.items()
        ]
    return out


def cosine_rows(
    c: ConfigDict, cond: Condition, vector: SteeringVector, items: Sequence[Item], around: int = 12
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
    steer = as_steer(cond.steer, cond.model.arch, *tokens.shape)
    batch = meshes.put_rows((tokens, mask), cond.model.mesh)
    found = _cosines(cond.model.decoder, cond.model.params, *batch, steer, vector.probe())
    cosine_NxBxT, labels, out = meshes.fetch(found), cond.labels(c), []
    for offset in range(-around, around):
        at_B = [len(p) + offset for p in prompts]
        fits = [b for b, t in enumerate(at_B) if 0 <= t < mask[b].sum()]
        mean_N = cosine_NxBxT[:, fits, [at_B[b] for b in fits]].mean(axis=1)
        out += [
            Row(
                **labels | {"layer": layer},
                split="test",
                item_id=f"mean-of-{len(items)}",
                cluster="all",
                metric="cos",
                value=float(value),
                position=str(offset),
                n_tokens=len(fits),
            )
            for layer, value in enumerate(mean_N)
        ]
    return out


def _prompt(cond: Condition, text: Text) -> list[int]:
    if cond.persona is None or text.messages is None:
        return text.prompt
    return cond.model.encode_prompt(cond.under_persona(text.messages))


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
        steer = as_steer(cond.steer, cond.model.arch, *tokens.shape)
        batch = meshes.put_rows((tokens, mask), cond.model.mesh)
        hidden = meshes.fetch(_hidden(cond.model.decoder, cond.model.params, *batch, steer))
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
def _hidden(decoder: Decoder, params, tokens_BxT, mask_BxT, steer):
    return decoder.apply({"params": params}, tokens_BxT, mask_BxT, steer=steer)[0]


@partial(jax.jit, static_argnames=("decoder",))
def _compare_states(decoder: Decoder, params, own_LxD, base_LxD, target_L, real_L):
    own = jax.nn.log_softmax(unembed(decoder, params, own_LxD), axis=-1)
    base = jax.nn.log_softmax(unembed(decoder, params, base_LxD), axis=-1)
    nll_L = -jnp.take_along_axis(own, target_L[:, None], axis=1)[:, 0]
    kl_L = jnp.sum(jnp.exp(base) * (base - own), axis=-1)
    same_L = own.argmax(-1) == base.argmax(-1)
    return tuple(jnp.sum(x * real_L) for x in (nll_L, kl_L, same_L))


@partial(jax.jit, static_argnames=("decoder",))
def _cosines(decoder: Decoder, params, tokens_BxT, mask_BxT, steer, probe):
    _, sown = decoder.apply(
        {"params": params},
        tokens_BxT,
        mask_BxT,
        steer=steer,
        probe=probe,
        mutable=["intermediates"],
    )
    return collect(sown["intermediates"], decoder.segments, "cosine")
