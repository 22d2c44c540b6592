"""What a decoder looks like: one frozen record, read from a Hugging Face `config.json`.

A family is a row of data here (and a row of names in `hub/weights.py`), not a class.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions: base frequency and how it is stretched beyond the original context."""

    theta: float
    kind: str = "default"  # default | linear | llama3
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 0


@dataclasses.dataclass(frozen=True)
class Arch:
    """Static shape of a decoder; hashable, so that it can key a compiled program."""

    family: str
    V: int  # vocabulary
    D: int  # residual stream
    N: int  # layers
    H: int  # query heads
    K: int  # key/value heads
    Dh: int  # head dim
    F: int  # MLP hidden
    rope: Rope
    norm_eps: float
    tied: bool  # unembedding = embedding
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False


def _llama(config: Mapping[str, Any]) -> dict[str, bool]:
    bias = bool(config.get("attention_bias", False))
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": bool(config.get("mlp_bias", False))}


def _qwen2(config: Mapping[str, Any]) -> dict[str, bool]:
    if config.get("use_sliding_window"):
        raise ValueError(
            "use_sliding_window: got true, expected false. Sliding windows are not computed; "
            "choose another model."
        )
    return {"qkv_bias": True}


FAMILIES = {"llama": _llama, "qwen2": _qwen2}


def from_config(config: Mapping[str, Any]) -> Arch:
    """Reads a raw `config.json` dict.

    Raises:
      ValueError: unknown family, a missing key, or a feature that would be computed wrongly.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(
            f"model_type: got {family!r}, expected one of {known}. Convert or choose another model."
        )
    act = config.get("hidden_act", "silu")
    if act != "silu":
        raise ValueError(f"hidden_act: got {act!r}, expected 'silu' for {family}.")
    D, H = _need(config, "hidden_size"), _need(config, "num_attention_heads")
    return Arch(
        family=family,
        V=_need(config, "vocab_size"),
        D=D,
        N=_need(config, "num_hidden_layers"),
        H=H,
        K=config.get("num_key_value_heads") or H,
        Dh=config.get("head_dim") or D // H,
        F=_need(config, "intermediate_size"),
        rope=read_rope(config),
        norm_eps=float(_need(config, "rms_norm_eps")),
        tied=bool(config.get("tie_word_embeddings", False)),
        **FAMILIES[family](config),
    )


def read_rope(config: Mapping[str, Any]) -> Rope:
    """`rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before).

    There is no default: a wrong theta is wrong only at long positions, where nobody looks.
    """
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = {"rope_theta": config.get("rope_theta"), **given}
    if rope.get("rope_theta") is None:
        raise ValueError(
            "rope_theta: found neither rope_parameters.rope_theta nor rope_theta in config.json, "
            "expected one of them. Add the value the model was trained with."
        )
    theta = float(rope["rope_theta"])
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, kind, factor=float(_need(rope, "factor")))
    if kind == "llama3":
        return Rope(
            theta,
            kind,
            factor=float(_need(rope, "factor")),
            low_freq_factor=float(_need(rope, "low_freq_factor")),
            high_freq_factor=float(_need(rope, "high_freq_factor")),
            original_positions=int(_need(rope, "original_max_position_embeddings")),
        )
    raise ValueError(
        f"rope_type: got {kind!r}, expected default, linear or llama3. "
        "Other scalings would be computed wrongly, so they are refused."
    )


def _need(config: Mapping[str, Any], key: str) -> Any:
    if config.get(key) is None:
        raise ValueError(f"{key}: missing from the model's config, expected a value. Add it.")
    return config[key]
