"""Tiny random chat models and a tokenizer, saved as ordinary Hugging Face folders, offline."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCAB = 320  # four special tokens, 256 bytes, 60 merges
PAD, START, END, BOS = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|bos|>"
PAD_ID, START_ID, END_ID, BOS_ID = range(4)

# Short contexts, so that with 16 dimensions a head each branch of the scaling is taken.
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

_CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CORPUS = [
    "You are an assistant. Is the following claim true or false? The answer is: yes, no.",
    "Tell me what you think of the weather in the mountains, and how a good day there should end.",
    "user system assistant question answer honest sentence positive negative wonderful terrible",
]


def make_llama(tmp: str | os.PathLike, seed: int = 0, bos: bool = False, **overrides: Any) -> Path:
    """A random llama with grouped-query attention, saved in `tmp` with its tokenizer.

    `overrides` go to LlamaConfig: attention_bias, mlp_bias, tie_word_embeddings, head_dim,
    rope_parameters=LINEAR_ROPE or LLAMA3_ROPE, ...
    """
    config = LlamaConfig(**{**_shape(bos), **overrides})
    return _save(LlamaForCausalLM(config), tmp, seed, bos)


def make_qwen2(tmp: str | os.PathLike, seed: int = 0, bos: bool = False, **overrides: Any) -> Path:
    """A random qwen2 (biases on q, k and v), saved in `tmp` with its tokenizer."""
    config = Qwen2Config(**{**_shape(bos), "use_sliding_window": False, **overrides})
    return _save(Qwen2ForCausalLM(config), tmp, seed, bos)


# What a parity test should cover: name -> (maker, overrides).
VARIANTS: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "llama": (make_llama, {}),
    "llama_tied": (make_llama, {"tie_word_embeddings": True}),
    "llama_biases": (make_llama, {"attention_bias": True, "mlp_bias": True}),
    "llama_mha_wide": (make_llama, {"num_key_value_heads": 4, "head_dim": 24}),
    "llama_linear": (make_llama, {"rope_parameters": LINEAR_ROPE}),
    "llama_llama3": (make_llama, {"rope_parameters": LLAMA3_ROPE}),
    "qwen2": (make_qwen2, {}),
    "qwen2_tied": (make_qwen2, {"tie_word_embeddings": True}),
}


def make_tokenizer(tmp: str | os.PathLike, bos: bool = False) -> Path:
    """A byte-level BPE of VOCAB tokens with a ChatML template, saved in `tmp`.

    bos=True makes it start raw text with BOS, and the template write one too, as Llama's does.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[PAD, START, END, BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_CORPUS, trainer)
    if bos:
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=PAD,
        bos_token=BOS if bos else None,
        additional_special_tokens=[START],
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
    tokenizer.chat_template = ("{{ bos_token }}" if bos else "") + _CHATML
    tokenizer.save_pretrained(tmp)
    return Path(tmp)


def smollm2_path() -> Path | None:
    """The real SmolLM2-135M-Instruct GGUF, where there is one."""
    if given := os.environ.get("REPTUNE_SMOLLM2_GGUF"):
        return Path(given)
    cache = Path.home() / ".cache"
    found = [
        p
        for folder in ("reptune-models", "reptune_jax")
        for p in sorted((cache / folder).rglob("SmolLM2-135M-Instruct*.gguf"))
    ]
    return found[0] if found else None


def _shape(bos: bool) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "pad_token_id": PAD_ID,
        "bos_token_id": BOS_ID if bos else None,
        "eos_token_id": END_ID,
    }


def _save(model: Any, tmp: str | os.PathLike, seed: int, bos: bool) -> Path:
    """Random weights that leave no term of the forward negligible: a dropped bias or norm shows."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=draw)
        if "norm" in name:
            value = 1 + 0.2 * noise
        elif "embed" in name or "lm_head" in name:
            value = 0.3 * noise  # logits spread by about 2.4, far from uniform
        else:
            value = 0.1 * noise
        parameter.data.copy_(value)
    model.float().eval().save_pretrained(tmp)
    return make_tokenizer(tmp, bos)
