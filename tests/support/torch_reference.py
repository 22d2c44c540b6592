"""Steering and the dual loss in plain torch: transformers models and forward hooks.

Written from the method, not from reptune_jax (it imports nothing of ours), so that the two can be
held against each other. Layer l is the output of 0-based block l.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

Directions = Mapping[int, Tensor]  # layer -> vector of D


def load(folder: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A checkpoint in transformers; eager, as another attention may leave out a soft-cap."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    ).eval()


class Batch(NamedTuple):
    """Training rows, padded on either side."""

    ids_BxT: Tensor
    mask_BxT: Tensor  # 1 on real tokens
    label_BxT: Tensor  # 1 on tokens to be predicted, each from the token before it
    position_BxT: Tensor  # 1 where the cosine is measured


class Neutral(NamedTuple):
    """Rows on which the tuned model is held to the base model."""

    ids_BxT: Tensor
    mask_BxT: Tensor
    base_logits_BxTxV: Tensor


@dataclasses.dataclass(frozen=True)
class Objective:
    """Weights and targets of the dual loss."""

    directions: Directions
    sign: int = 1
    mode: str = "in"  # in: (1 - sign * cos) / 2, out: |cos|
    w_token: float = 1.0
    w_cos: float = 1.0
    w_kl: float = 0.0
    soft_ids: tuple[int, int] | None = None  # labels become half the one token, half the other


class Parts(NamedTuple):
    """Loss and its unweighted parts, scalars; cos_layers: mean signed cosine by layer."""

    total: Tensor
    token: Tensor
    cosine: Tensor
    kl: Tensor
    cos_layers: dict[int, Tensor]  # detached, still on the device


# ---------------------------------------------------------------- forward passes


def blocks(hf_model: Any) -> Any:
    """The decoder blocks, in order."""
    base = hf_model.base_model
    return base.h if hasattr(base, "h") else base.layers


@contextlib.contextmanager
def hooked(hf_model: Any, hooks: Mapping[int, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
    """Calls hooks[l] with the output of block l; what it returns, if anything, takes its place."""

    def wrap(hook: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
        def forward_hook(_module: Any, _args: Any, output: Any) -> Any:
            if not isinstance(output, tuple):
                return hook(output)
            changed = hook(output[0])
            return None if changed is None else (changed, *output[1:])

        return forward_hook

    handles = [blocks(hf_model)[l].register_forward_hook(wrap(f)) for l, f in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def adding(vectors: Directions) -> dict[int, Callable[[Tensor], Tensor]]:
    """Hooks that add vectors[l], broadcast against [B, T, D], to the output of block l."""

    def add(vector: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda h_BxTxD: h_BxTxD + vector.to(h_BxTxD)

    return {l: add(vector) for l, vector in vectors.items()}


def logits(hf_model: Any, ids_BxT: Tensor, mask_BxT: Tensor) -> Tensor:
    """[B, T, V]. Positions count real tokens, so that padding on the left moves nothing."""
    positions_BxT = (mask_BxT.long().cumsum(-1) - 1).clamp_min(0)
    out = hf_model(
        input_ids=ids_BxT, attention_mask=mask_BxT, position_ids=positions_BxT, use_cache=False
    )
    return out.logits


def steered_logits(hf_model: Any, ids_BxT: Tensor, mask_BxT: Tensor, vectors: Directions) -> Tensor:
    """[B, T, V] with vectors[l] ([D], or what broadcasts to [B, T, D]) added after block l."""
    with torch.no_grad(), hooked(hf_model, adding(vectors)):
        return logits(hf_model, ids_BxT, mask_BxT)


def residuals(hf_model: Any, ids_BxT: Tensor, mask_BxT: Tensor) -> Tensor:
    """[N, B, T, D]: output of every block, before the final norm."""
    kept: dict[int, Tensor] = {}
    with torch.no_grad(), hooked(hf_model, _keeping(kept, range(len(blocks(hf_model))))):
        logits(hf_model, ids_BxT, mask_BxT)
    return torch.stack([kept[l] for l in sorted(kept)])


def greedy(
    hf_model: Any,
    tokenizer: Any,
    prompts: Sequence[str | list[dict[str, str]]],
    max_new_tokens: int = 32,
    chat: bool = True,
    vectors: Directions | None = None,
) -> list[str]:
    """Greedy continuations of one batch, padded on the left; vectors are added at every token.

    chat=True puts the chat template around each prompt (a string is one user turn); chat=False
    takes raw text.
    """
    inputs = encode(tokenizer, prompts, chat).to(hf_model.device)
    with torch.no_grad(), hooked(hf_model, adding(vectors or {})):
        ids = hf_model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,  # some models ship another, and it changes greedy text
            pad_token_id=tokenizer.pad_token_id,
        )
    new_ids = ids[:, inputs["input_ids"].shape[1] :]
    return tokenizer.batch_decode(new_ids, skip_special_tokens=True)


def encode(tokenizer: Any, prompts: Sequence[str | list[dict[str, str]]], chat: bool) -> Any:
    """Token ids and mask of one left-padded batch."""
    if chat:
        turns = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
        prompts = [
            tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=True)
            for t in turns
        ]
    return tokenizer(
        prompts,
        return_tensors="pt",
        padding=True,
        padding_side="left",
        add_special_tokens=not chat,  # the template has written them already
        return_token_type_ids=False,
    )


# ---------------------------------------------------------------- the dual loss


def dual_terms(
    hf_model: Any, batch: Batch, objective: Objective, neutral: Neutral | None = None
) -> Parts:
    """w_token * CE + w_cos * cosine loss + w_kl * KL(base || model), differentiable.

    CE: mean over label tokens. Cosine loss: mean over layers of the mean over marked positions. KL:
    mean over the real tokens of the neutral rows. All in nats.
    """
    kept: dict[int, Tensor] = {}
    with hooked(hf_model, _keeping(kept, objective.directions)):
        logits_BxTxV = logits(hf_model, batch.ids_BxT, batch.mask_BxT)
    token = token_loss(logits_BxTxV, batch.ids_BxT, batch.label_BxT, objective.soft_ids)

    marked = batch.position_BxT.bool()
    losses, cos_layers = [], {}
    for l, direction in objective.directions.items():
        h_PxD = kept[l][marked]
        cos_P = objective.sign * F.cosine_similarity(h_PxD, direction.to(h_PxD)[None], dim=-1)
        losses.append((cos_P.abs() if objective.mode == "out" else (1 - cos_P) / 2).mean())
        cos_layers[l] = cos_P.detach().mean()
    cosine = torch.stack(losses).mean() if losses else token.new_zeros(())

    kl = token.new_zeros(())
    if neutral is not None:
        kl = kl_to_base(
            logits(hf_model, neutral.ids_BxT, neutral.mask_BxT),
            neutral.base_logits_BxTxV,
            neutral.mask_BxT,
        )
    total = objective.w_token * token + objective.w_cos * cosine + objective.w_kl * kl
    return Parts(total, token, cosine, kl, cos_layers)


def dual_loss(
    hf_model: Any, batch: Batch, objective: Objective, neutral: Neutral | None = None
) -> tuple[Parts, dict[str, Tensor]]:
    """The loss and its gradient by Hugging Face name, for every parameter that requires one.

    A parameter the loss does not reach has a gradient of zeros. No .grad is touched.
    """
    parts = dual_terms(hf_model, batch, objective, neutral)
    named = {n: p for n, p in hf_model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(parts.total, list(named.values()), allow_unused=True)
    return parts, {
        n: torch.zeros_like(p) if g is None else g
        for (n, p), g in zip(named.items(), grads, strict=True)
    }


def token_loss(
    logits_BxTxV: Tensor,
    ids_BxT: Tensor,
    label_BxT: Tensor,
    soft_ids: tuple[int, int] | None = None,
) -> Tensor:
    """Mean cross-entropy over label tokens; with soft_ids, against half of each of the two."""
    wanted = label_BxT[:, 1:].bool()
    logp_PxV = logits_BxTxV[:, :-1][wanted].log_softmax(-1)
    if soft_ids is not None:
        return -logp_PxV[:, list(soft_ids)].mean()
    targets_P = ids_BxT[:, 1:][wanted]
    return -logp_PxV.gather(-1, targets_P[:, None]).mean()


def kl_to_base(logits_BxTxV: Tensor, base_logits_BxTxV: Tensor, mask_BxT: Tensor) -> Tensor:
    """KL(base || model), mean over masked tokens."""
    base_logp = base_logits_BxTxV.log_softmax(-1)
    kl_BxT = (base_logp.exp() * (base_logp - logits_BxTxV.log_softmax(-1))).sum(-1)
    return kl_BxT[mask_BxT.bool()].mean()


def _keeping(kept: dict[int, Tensor], layers: Any) -> dict[int, Callable[[Tensor], None]]:
    def keep(l: int) -> Callable[[Tensor], None]:
        return lambda h_BxTxD: kept.__setitem__(l, h_BxTxD)

    return {l: keep(l) for l in layers}


# ---------------------------------------------------------------- training


def unfreeze(
    hf_model: Any, layers: Sequence[int], modules: Sequence[str] = ("v_proj", "o_proj")
) -> list[torch.nn.Parameter]:
    """Makes these modules of these blocks trainable, freezes the rest; returns what is trained."""
    hf_model.requires_grad_(False)
    chosen = []
    for l in layers:
        for name, parameter in blocks(hf_model)[l].named_parameters():
            if any(module in name.split(".") for module in modules):
                chosen.append(parameter.requires_grad_(True))
    return chosen


def adamw(
    parameters: Sequence[torch.nn.Parameter], lr: float, weight_decay: float = 0.0
) -> torch.optim.AdamW:
    """AdamW with the usual betas (0.9, 0.999) and eps 1e-8."""
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)


def train_step(
    hf_model: Any,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    objective: Objective,
    neutral: Neutral | None = None,
) -> Parts:
    """One step in place; returns the loss before it."""
    optimizer.zero_grad(set_to_none=True)
    parts = dual_terms(hf_model, batch, objective, neutral)
    parts.total.backward()
    optimizer.step()
    return parts
