"""GGUF weights and metadata under their Hugging Face names.

Layouts: a GGUF tensor is stored (out, in), as HF's; llama-architecture q and k rows are in
llama.cpp's rotary order and are put back; gemma3's norms have the 1 added that HF adds on the fly.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from reptune_jax.console import note
from reptune_jax.hub.gguf_header import Header, TensorInfo, read_header
from reptune_jax.hub.safetensors_io import TensorHandle
from reptune_jax.reading import short

# GGUF architecture -> (HF model_type, class)
_FAMILIES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA3_LAYER = {
    **_LAYER,
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_PLAIN = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
# metadata that changes the arithmetic in a way neither family knows -> the value that does not
_REFUSED = {
    "attention.scale": None,
    "attn_logit_softcapping": None,
    "embedding_scale": None,
    "expert_count": 0,
    "logit_scale": None,
    "residual_scale": None,
}
# llama.cpp stores llama3's scaling as one factor a frequency; Llama 3.x was made with these
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_ROW_ELEMENTS = 1 << 17


class GGUF(NamedTuple):
    """A GGUF file in HF terms; `metadata` is the file's own, for the tokenizer."""

    config: dict[str, Any]
    tensors: dict[str, TensorHandle]
    metadata: dict[str, Any]


def read_gguf(path: Path) -> GGUF:
    """Opens a GGUF file: HF config, lazily dequantized HF tensors, and its metadata.

    Raises:
      ValueError: not GGUF, truncated, split, or an architecture, quantization, tensor or rotary
        scaling that would be computed wrongly.
    """
    header = read_header(path)
    arch = header.metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in _FAMILIES:
        raise ValueError(
            f"{path}: got architecture {arch!r}, expected one of {', '.join(_FAMILIES)}. "
            "Load this model from its Hugging Face folder instead, if the family is supported."
        )
    if (parts := header.metadata.get("split.count", 1)) not in (0, 1):
        raise ValueError(
            f"{path}: is one of {parts} parts, expected a whole model. "
            "Merge them with llama.cpp's `llama-gguf-split --merge`."
        )
    infos = {k: v for k, v in header.tensors.items() if k != "rope_freqs.weight"}
    names = _hf_names(path, infos, _GEMMA3_LAYER if arch == "gemma3" else _LAYER)
    _check_quantizations(path, infos)
    config = _config(path, arch, header)
    tensors = {names[k]: _handle(k, v, header.data, arch, config) for k, v in infos.items()}
    return GGUF(config, tensors, header.metadata)


def _hf_names(
    path: Path, infos: Mapping[str, TensorInfo], parts: Mapping[str, str]
) -> dict[str, str]:
    names = {name: _hf_name(name, parts) for name in infos}
    if unknown := [name for name, hf in names.items() if hf is None]:
        raise ValueError(
            f"{path}: got {len(unknown)} tensors with no place in a dense decoder, such as "
            f"{', '.join(unknown[:4])}. Mixtures of experts and other variants are not supported."
        )
    return {name: hf for name, hf in names.items() if hf is not None}


def _hf_name(name: str, parts: Mapping[str, str]) -> str | None:
    if match := _LAYER_NAME.fullmatch(name):
        layer, part, leaf = match.groups()
        return f"model.layers.{layer}.{parts[part]}.{leaf}" if part in parts else None
    part, _, leaf = name.rpartition(".")
    return f"{_TOP[part]}.{leaf}" if part in _TOP and leaf == "weight" else None


def _check_quantizations(path: Path, infos: Mapping[str, TensorInfo]) -> None:
    for kind in {info.kind for info in infos.values()}:
        if kind in _PLAIN:
            continue
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            name = next(name for name, info in infos.items() if info.kind == kind)
            raise ValueError(
                f"{path}: {name} has quantization {kind.name}, which cannot be read. "
                "Use another quantization of the model (Q8_0, Q4_K_M, F16)."
            ) from None


def _handle(
    name: str, info: TensorInfo, data: np.ndarray, arch: str, config: Mapping[str, Any]
) -> TensorHandle:
    heads = 0
    if arch == "llama" and ".attn_q." in name:
        heads = config["num_attention_heads"]
    if arch == "llama" and ".attn_k." in name:
        heads = config["num_key_value_heads"]
    dtype = _PLAIN.get(info.kind, np.dtype(np.float32))
    if arch == "gemma3" and name.endswith("norm.weight"):
        return TensorHandle(info.shape, dtype, lambda: _read(info, data, 0) - dtype.type(1))
    return TensorHandle(info.shape, dtype, lambda: _read(info, data, heads))


def _read(info: TensorInfo, data: np.ndarray, heads: int) -> np.ndarray:
    raw = np.asarray(data[info.start : info.start + info.n_bytes])
    if info.kind in _PLAIN:
        out = raw.view(_PLAIN[info.kind]).reshape(info.shape).copy()
    else:
        out = _dequantize(raw, info.kind).reshape(info.shape)
    return _to_hf_rotary(out, heads) if heads else out


def _dequantize(raw: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    # the library works on 16 rows at a time: long rows make it 3 times faster than real ones
    block, block_bytes = GGML_QUANT_SIZES[kind]
    n_blocks = raw.size // block_bytes
    per_row = _ROW_ELEMENTS // block
    while n_blocks % per_row:
        per_row //= 2
    return dequantize(raw.reshape(-1, per_row * block_bytes), kind)


def _to_hf_rotary(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's order of q/k rows: pairs (2i, 2i+1) become halves (i, i + Dh/2)."""
    split = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def _config(path: Path, arch: str, header: Header) -> dict[str, Any]:
    meta, tensors = header.metadata, header.tensors
    for key, harmless in _REFUSED.items():
        if (got := meta.get(f"{arch}.{key}", harmless)) != harmless:
            raise ValueError(
                f"{path}: got {arch}.{key} = {got}, which {arch} models here do not have."
            )
    width = _size(path, meta, f"{arch}.embedding_length")
    counts = [f"{arch}.attention.head_count", f"{arch}.attention.head_count_kv"]
    if any(isinstance(meta.get(key), list) for key in counts):
        raise ValueError(f"{path}: got a head count per layer, expected one number for all layers.")
    heads = _size(path, meta, counts[0])
    kv_heads = _size(path, meta, counts[1]) if counts[1] in meta else heads
    if heads % kv_heads or width % 2:
        raise ValueError(
            f"{path}: got {kv_heads} key heads for {heads} heads and a width of {width}, expected "
            "a divisor and an even width. The file is damaged; download it again."
        )
    length = f"{arch}.attention.key_length"
    head_dim = _size(path, meta, length) if length in meta else width // heads
    rotary = meta.get(f"{arch}.rope.dimension_count", head_dim)
    if rotary != head_dim:
        raise ValueError(f"{path}: got {rotary} rotary dims of {head_dim}, expected all of them.")
    if "token_embd.weight" not in tensors:
        raise ValueError(f"{path}: token_embd.weight is missing. The file holds no language model.")
    model_type, architecture = _FAMILIES[arch]
    depth = _size(path, meta, f"{arch}.block_count")
    if depth > len(tensors):
        raise ValueError(
            f"{path}: got {arch}.block_count {depth:,} and {len(tensors)} tensors, expected "
            "several for each block. The file is damaged; download it again."
        )
    config = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": width,
        "intermediate_size": _size(path, meta, f"{arch}.feed_forward_length"),
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": _size(path, meta, f"{arch}.context_length"),
        "rms_norm_eps": _need(path, meta, f"{arch}.attention.layer_norm_rms_epsilon"),
        **_quirks(path, arch, header, head_dim),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if (key := f"tokenizer.ggml.{theirs}_token_id") in meta:
            config[f"{ours}_token_id"] = _size(path, meta, key, least=0)
    return config


def _quirks(path: Path, arch: str, header: Header, head_dim: int) -> dict[str, Any]:
    """The part of the config that families differ in."""
    rope, window = _rope(path, arch, header, head_dim), f"{arch}.attention.sliding_window"
    if arch == "gemma3":
        return _gemma3(path, header, head_dim, rope)
    if header.metadata.get(window, 0):
        raise ValueError(
            f"{path}: got {window} = {header.metadata[window]}, which {arch} models here do not "
            "have."
        )
    found: dict[str, Any] = {"hidden_act": "silu", "rope_parameters": rope}
    if arch == "llama":
        found["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
        found["mlp_bias"] = "blk.0.ffn_down.bias" in header.tensors
    return found


def _gemma3(path: Path, header: Header, head_dim: int, rope: dict[str, Any]) -> dict[str, Any]:
    """What llama.cpp knows of gemma3 without the file saying it, and what the file may say."""
    meta, N = header.metadata, header.metadata["gemma3.block_count"]
    every = meta.get("gemma3.attention.sliding_window_pattern", 6)
    if type(every) is not int or every < 1:
        raise ValueError(
            f"{path}: got a sliding_window_pattern of {every}, expected one number. "
            "Load this model from its Hugging Face folder instead."
        )
    local = float(meta.get("gemma3.rope.freq_base_swa", 10000.0))
    heads = _need(path, meta, "gemma3.attention.head_count")
    full = [(l + 1) % every == 0 for l in range(N)]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        # Only the 27B model's scores are scaled by the width and not by the head's.
        "query_pre_attn_scalar": meta["gemma3.embedding_length"] // heads if N == 62 else head_dim,
        "sliding_window": _need(path, meta, "gemma3.attention.sliding_window"),
        "layer_types": ["full_attention" if f else "sliding_attention" for f in full],
        "final_logit_softcapping": meta.get("gemma3.final_logit_softcapping"),
        "rope_parameters": {
            "full_attention": rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
    }


def _need(path: Path, meta: Mapping[str, Any], key: str) -> Any:
    if key not in meta:
        raise ValueError(
            f"{path}: metadata {key} is missing, expected a value. Convert the file again."
        )
    return meta[key]


def _size(path: Path, meta: Mapping[str, Any], key: str, least: int = 1) -> int:
    value = _need(path, meta, key)
    if type(value) is not int or not least <= value < 2**31:
        raise ValueError(
            f"{path}: got {key} {short(value)}, expected a whole number from {least} on. "
            "The file is damaged; download it again."
        )
    return value


def _rope(path: Path, arch: str, header: Header, head_dim: int) -> dict[str, Any]:
    meta = header.metadata
    if f"{arch}.rope.freq_base" not in meta:
        note(f"{path}: {arch}.rope.freq_base: not in the file; taking 10000, as GGUF defines.")
    theta = float(meta.get(f"{arch}.rope.freq_base", 10000.0))
    kind = meta.get(f"{arch}.rope.scaling.type", "none")
    factor = float(
        meta.get(f"{arch}.rope.scaling.factor", meta.get(f"{arch}.rope.scale_linear", 1))
    )
    if kind == "none" and f"{arch}.rope.scale_linear" in meta and factor != 1:
        kind = "linear"
    if kind not in ("none", "linear"):
        raise ValueError(
            f"{path}: got rotary scaling {kind!r}, expected none, linear or llama3. "
            "Other scalings would be computed wrongly, so they are refused."
        )
    if "rope_freqs.weight" in header.tensors:
        if kind == "linear":
            raise ValueError(
                f"{path}: got rope_freqs.weight and linear scaling, expected one of them."
            )
        return _llama3(path, header, theta, head_dim)
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    return {"rope_type": "default", "rope_theta": theta}


def _llama3(path: Path, header: Header, theta: float, head_dim: int) -> dict[str, Any]:
    stored = _read(header.tensors["rope_freqs.weight"], header.data, 0).astype(np.float64).ravel()
    factor = float(stored.max())
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = _LLAMA3["original_max_position_embeddings"] / wavelengths
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-3):
        raise ValueError(
            f"{path}: rope_freqs.weight (largest factor {factor:g}) is not llama3's scaling with "
            f"{_LLAMA3}. Load this model from its Hugging Face folder instead."
        )
    return {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **_LLAMA3}
