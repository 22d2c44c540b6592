"""Small models on disk for the hub tests: HF folders by transformers, GGUF files by gguf."""

from pathlib import Path

import gguf
import numpy as np

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def vocabulary() -> tuple[list[str], list[str]]:
    """A byte-level BPE vocabulary: special tokens, all bytes, and a few merges."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    merges = ["a n", "Ġ T", "Ġ F", "r u", "ru e", "ĠT rue", "Ċ Ċ", "1 2", "12 3"]
    tokens = SPECIAL + sorted(bytes_to_unicode().values()) + [m.replace(" ", "") for m in merges]
    return tokens, merges


def tokenizer_metadata(pre: str = "smollm", **changes: object) -> dict[str, object]:
    """What a GGUF header says about the tokenizer; `changes` are keys below tokenizer.ggml."""
    tokens, merges = vocabulary()
    fields = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "merges": merges,
        "token_type": [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "padding_token_id": 2,
        "unknown_token_id": 0,
        **changes,
    }
    metadata = {f"tokenizer.ggml.{k}": v for k, v in fields.items() if v is not None}
    return {**metadata, "tokenizer.chat_template": TEMPLATE}


def make_model(family: str, **changes: object):
    """A random 2-layer transformers model (q heads 4, k heads 2, Dh 8, vocabulary 300)."""
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(
        family,
        **{
            "vocab_size": 300,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "eos_token_id": 2,
            "bos_token_id": 1,
            "tie_word_embeddings": False,
            **changes,
        },
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, weight in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            torch.nn.init.normal_(weight)
    return model


def weights_of(model) -> dict[str, np.ndarray]:
    return {name: weight.detach().numpy().copy() for name, weight in model.named_parameters()}


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


_GGUF_GEMMA3 = {
    "pre_feedforward_layernorm": "ffn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}


def gguf_name(name: str, family: str = "llama") -> str:
    """HF tensor name -> GGUF's, spelled out independently of the reader."""
    names = _GGUF_NAMES | (_GGUF_GEMMA3 if family == "gemma3" else {})
    part, leaf = name.rsplit(".", 1)
    if not part.startswith("model.layers."):
        return f"{names[part]}.{leaf}"
    layer, rest = part.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{names[rest]}.{leaf}"


def to_llama_cpp_rotary(rows: np.ndarray, heads: int) -> np.ndarray:
    """The order in which llama.cpp's converter stores q and k rows of llama models."""
    split = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    path: Path,
    model,
    quantized: bool = False,
    extra: dict[str, object] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    arch: str | None = None,
    metadata: dict[str, object] | None = None,
) -> Path:
    """Writes `model` as llama.cpp's converter would; `extra` are keys below the architecture."""
    c = model.config
    family = c.model_type.removesuffix("_text")
    arch = arch or family
    writer = gguf.GGUFWriter(path, arch)
    fields: dict[str, object] = {
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "block_count": c.num_hidden_layers,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(c.rms_norm_eps),
        "rope.freq_base": float(_full_attention(c)["rope_theta"]),
        **(extra or {}),
    }
    if family == "gemma3":
        fields |= {"attention.sliding_window": c.sliding_window, "attention.key_length": c.head_dim}
    for key, value in fields.items():
        _add(writer, f"{arch}.{key}", value)
    pre = "qwen2" if family == "qwen2" else "smollm"
    for key, value in (metadata or tokenizer_metadata(pre)).items():
        _add(writer, key, value)
    for name, weight in weights_of(model).items():
        heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}
        part = name.split(".")[-2]
        if family == "llama" and part in heads:
            weight = to_llama_cpp_rotary(weight, heads[part])
        if family == "gemma3" and name.endswith("norm.weight"):
            weight = weight + 1
        _add_tensor(writer, gguf_name(name, family), weight, quantized)
    for name, weight in (tensors or {}).items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _full_attention(config) -> dict:
    return config.rope_parameters.get("full_attention", config.rope_parameters)


def _add(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    if value is None:
        return
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    add |= {str: writer.add_string, list: writer.add_array}
    add[type(value)](key, value)


def _add_tensor(writer: gguf.GGUFWriter, name: str, weight: np.ndarray, quantized: bool) -> None:
    if quantized and weight.ndim == 2:
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, weight)


def assert_same(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, array in expected.items():
        assert tensors[name].shape == array.shape
        got = tensors[name].read()
        assert got.dtype == tensors[name].dtype
        np.testing.assert_array_equal(got, array, err_msg=name)
