"""Tiny random chat models and a tokenizer, saved as ordinary Hugging Face folders, offline."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import reptune_jax as rt

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

CHATML = (
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


def make_family(
    tmp: str | os.PathLike, name: str, seed: int = 0, bos: bool = False, **overrides: Any
) -> Path:
    """A random model of FAMILIES, its family's peculiarities switched on, saved in `tmp`."""
    kind, quirks = FAMILIES[name]
    shape = {**_shape(bos), "num_hidden_layers": 3}
    for key, theirs in {"gpt2": _GPT2_KEYS, "gpt_neox": _NEOX_KEYS}.get(kind, {}).items():
        shape[theirs] = shape.pop(key)
    for key in _LACKS.get(kind, ()):
        del shape[key]
    config = AutoConfig.for_model(kind, **{**shape, **quirks, **overrides})
    return _save(
        AutoModelForCausalLM.from_config(config), tmp, seed, bos, mixed=config.tie_word_embeddings
    )


_GPT2_KEYS = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "rms_norm_eps": "layer_norm_epsilon",
}
_LACKS = {
    "gpt2": ("rope_parameters", "num_key_value_heads"),
    "gpt_neox": ("num_key_value_heads",),
}
_NEOX_KEYS = {"rms_norm_eps": "layer_norm_eps"}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {**LINEAR_ROPE, "rope_theta": 50_000.0},
}
_NEOX = {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5}, "hidden_act": "gelu"}

# One random model a family, with what is peculiar to it: name -> (model_type, config). Windows are
# shorter than the tests' rows, and rope contexts too; caps are low enough to bend what they cap.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "mistral": ("mistral", {"sliding_window": 12, "head_dim": 24}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
    "gemma": ("gemma", {"head_dim": 24, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 24,
            "query_pre_attn_scalar": 12,
            "sliding_window": 12,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 4.0,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3_text": (
        "gemma3_text",
        {
            "head_dim": 24,
            "query_pre_attn_scalar": 12,
            "sliding_window": 12,
            "num_hidden_layers": 7,  # its pattern: five with a window, one without
            "rope_parameters": _GEMMA3_ROPE,
            "tie_word_embeddings": True,
        },
    ),
    "olmo2": ("olmo2", {}),
    "phi3": (
        "phi3",
        {"sliding_window": 12, "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5}},
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": True}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.1,
            "logits_scaling": 0.5,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "gpt2": ("gpt2", {"tie_word_embeddings": True}),
    "gpt_neox": ("gpt_neox", _NEOX),
    "gpt_neox_serial": ("gpt_neox", {**_NEOX, "use_parallel_residual": False}),
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
    tokenizer.chat_template = ("{{ bos_token }}" if bos else "") + CHATML
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


@functools.cache
def smollm2_in_torch() -> Any:
    """That file as transformers reads it, float32; None where there is none. Takes long: once."""
    path = smollm2_path()
    return path and AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )


@functools.cache
def smollm2() -> Any:
    """… and as we do."""
    return rt.load(str(smollm2_path()))


def real_gguf(pattern: str) -> Path | None:
    """A real GGUF file from the user's cache, where there is one."""
    return next(iter(sorted((Path.home() / ".cache").glob(f"*/{pattern}"))), None)


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


def _save(model: Any, tmp: str | os.PathLike, seed: int, bos: bool, mixed: bool = False) -> Path:
    """Random weights that leave no term of the forward negligible: a dropped bias or norm shows.

    `mixed` gives the final norm scales of both signs: a tied model else repeats its last token.
    """
    plus_one = float(
        "gemma" in model.config.model_type
    )  # its norms multiply by one plus the weight
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=draw)
        if mixed and name.endswith(("model.norm.weight", "ln_f.weight")):
            value = noise - plus_one
        elif ("norm" in name or ".ln_" in name) and name.endswith("weight"):
            value = 0.2 * noise + 1 - plus_one
        elif any(part in name for part in ("embed", "lm_head", "wte", "wpe")):
            value = 0.3 * noise  # logits spread by about 2.4, far from uniform
        else:
            value = 0.1 * noise
        parameter.data.copy_(value)
    model.float().eval().save_pretrained(tmp)
    return make_tokenizer(tmp, bos)
