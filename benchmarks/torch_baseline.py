"""The yardstick: train, extract and generate as a careful researcher writes them in torch.

Training and hooks are those of tests/torch_reference.py, whose results reptune_jax is tested
against. Nothing is slowed down: frozen weights ask for no gradient, extraction stops at the last
block and keeps no graph, generation has a KV cache.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.torch_reference import (
    Batch,
    Directions,
    Neutral,
    Objective,
    Parts,
    adamw,
    blocks,
    greedy,
    hooked,
    unfreeze,
)
from tests.support.torch_reference import train_step as reference_step

BATCH = 16


def load(path: str | Path, device: str | None = None, dtype: str = "float32") -> tuple[Any, Any]:
    """Model in eval mode and its tokenizer, from a Hugging Face folder; CUDA where there is one."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    return model.to(device).eval(), tokenizer


def optimizer_for(model: Any, layers: Sequence[int], lr: float = 3e-4) -> torch.optim.Optimizer:
    """Freezes all but v_proj and o_proj of these layers, and returns AdamW over those."""
    return adamw(unfreeze(model, layers), lr=lr)


def train_step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    objective: Objective,
    neutral: Neutral | None = None,
) -> Parts:
    """One step of the dual loss, in train mode; waits for the device."""
    model.train()
    parts = reference_step(model, optimizer, batch, objective, neutral)
    parts.total.item()
    return parts


@torch.inference_mode()
def extract(
    model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], batch_size: int = BATCH
) -> Tensor:
    """[N, D]: mean over pairs of positive minus negative at the last token, after every block."""
    model.eval()
    N, D = len(blocks(model)), model.config.hidden_size
    sums_NxD = torch.zeros(N, D, device=model.device)

    for start in range(0, len(pairs), batch_size):
        positive, negative = zip(*pairs[start : start + batch_size], strict=True)
        for sign, texts in ((1.0, positive), (-1.0, negative)):
            sums_NxD += sign * _last_token_sums(model, tokenizer, texts)
    return (sums_NxD / len(pairs)).cpu()


def _last_token_sums(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """[N, D]: sum over texts of the residual at the last token."""
    last: dict[int, Tensor] = {}

    def keep(l: int) -> Any:
        return lambda h_BxTxD: last.__setitem__(l, h_BxTxD[:, -1].float().sum(0))

    inputs = tokenizer(
        list(texts),
        return_tensors="pt",
        padding=True,
        padding_side="left",
        return_token_type_ids=False,
    ).to(model.device)
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    with hooked(model, {l: keep(l) for l in range(len(blocks(model)))}):
        model.model(**inputs, position_ids=positions, use_cache=False)  # no unembedding
    return torch.stack([last[l] for l in sorted(last)])


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int = 64,
    vectors: Directions | None = None,
    batch_size: int = BATCH,
) -> list[str]:
    """Greedy chat answers, in batches padded on the left."""
    model.eval()
    texts: list[str] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        texts += greedy(model, tokenizer, batch, max_new_tokens, vectors=vectors)
    return texts
