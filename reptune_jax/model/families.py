"""Hugging Face `config.json` -> `Arch`: a row of data for each family, its quirks in a function.

A key that changes the arithmetic is read or refused, never ignored.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from reptune_jax.model.arch import Arch, Layer, Rope

Config = Mapping[str, Any]
_WINDOW = 4096  # of mistral and qwen in transformers, where the key is absent (null: none)


def _no_quirks(config: Config) -> dict[str, Any]:
    return {}


def _biases(config: Config) -> dict[str, Any]:
    bias = bool(config.get("attention_bias", False))
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": bool(config.get("mlp_bias", False))}


def _mistral(config: Config) -> dict[str, Any]:
    return {"layers": _every(config, config.get("sliding_window", _WINDOW), read_rope(config))}


def _qwen2(config: Config) -> dict[str, Any]:
    return {"qkv_bias": True, "layers": _upper_sliding(config)}


def _qwen3(config: Config) -> dict[str, Any]:
    return {**_biases(config), "layers": _upper_sliding(config)}


def _gemma(config: Config) -> dict[str, Any]:
    if config.get("use_bidirectional_attention"):
        raise ValueError(
            "use_bidirectional_attention: got true, expected false. This is an encoder; choose a "
            "model that generates."
        )
    return {**_biases(config), "embed_scale": _need(config, "hidden_size") ** 0.5}


def _gemma2(config: Config) -> dict[str, Any]:
    rope = read_rope(config)
    return {
        **_gemma(config),
        "scale": _need(config, "query_pre_attn_scalar") ** -0.5,
        "score_cap": float(config.get("attn_logit_softcapping", 50.0) or 0),
        "logit_cap": float(config.get("final_logit_softcapping", 30.0) or 0),
        "layers": _alternating(config, every=2, rope=rope, local=rope),
    }


def _gemma3(config: Config) -> dict[str, Any]:
    rope, local = _gemma3_ropes(config)
    every = config.get("sliding_window_pattern", 6)
    return {
        **_gemma(config),
        "scale": _need(config, "query_pre_attn_scalar") ** -0.5,
        "logit_cap": float(config.get("final_logit_softcapping") or 0),
        "layers": _alternating(config, every=every, rope=rope, local=local),
        "rope": rope,
    }


def _gemma3_ropes(config: Config) -> tuple[Rope, Rope]:
    given = config.get("rope_parameters") or {}
    if "full_attention" in given:
        of = {kind: {"rope_parameters": given[kind]} for kind in given}
        return read_rope(of["full_attention"]), read_rope(_need(of, "sliding_attention"))
    return read_rope(config), read_rope({"rope_theta": _need(config, "rope_local_base_freq")})


def _phi3(config: Config) -> dict[str, Any]:
    rope = read_rope(config, share=_rope_key(config, "partial_rotary_factor", 1.0))
    return {"rope": rope, "layers": _every(config, config.get("sliding_window"), rope)}


def _smollm3(config: Config) -> dict[str, Any]:
    N, rope = _need(config, "num_hidden_layers"), read_rope(config)
    interval = config.get("no_rope_layer_interval", 4)
    rotated = config.get("no_rope_layers") or [int((l + 1) % interval != 0) for l in range(N)]
    if config.get("use_sliding_window") and config.get("sliding_window"):
        raise ValueError(
            "use_sliding_window: got true, expected false for smollm3, whose released models have "
            "none. Choose another model."
        )
    layers = tuple(Layer(0, rope if on else None) for on in rotated[:N])
    return {**_biases(config), "layers": layers}


def _granite(config: Config) -> dict[str, Any]:
    return {
        **_biases(config),
        "scale": float(_need(config, "attention_multiplier")),
        "embed_scale": float(_need(config, "embedding_multiplier")),
        "residual_scale": float(_need(config, "residual_multiplier")),
        "logit_divisor": float(_need(config, "logits_scaling")),
    }


def _gpt2(config: Config) -> dict[str, Any]:
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if config.get(key):
            raise ValueError(f"{key}: got true, expected false for gpt2. Choose another model.")
    return {
        "positions": _need(config, "n_positions"),
        "scale": 0.0 if config.get("scale_attn_weights", True) else 1.0,
        "F": config.get("n_inner") or 4 * _need(config, "n_embd"),
        "rope": None,
    }


def _gpt_neox(config: Config) -> dict[str, Any]:
    share = float(_rope_key(config, "partial_rotary_factor", config.get("rotary_pct")))
    theta = config.get("rotary_emb_base")
    bias = bool(config.get("attention_bias", True))
    return {
        "rope": read_rope({"rope_theta": theta, **config}, share=share),
        "parallel": bool(config.get("use_parallel_residual", True)),
        "qkv_bias": bias,
        "o_bias": bias,
        "mlp_bias": True,
    }


class Family(NamedTuple):
    """A row of FAMILIES: what is the same for all of its models, and what its config says."""

    quirks: Callable[[Config], dict[str, Any]] = _no_quirks
    fixed: Mapping[str, Any] = {}
    acts: tuple[str, ...] = ("silu",)
    tied: bool = False  # where the config does not say
    keys: Mapping[str, str] = {}  # this family's names for common keys


_GELUS = ("gelu", "gelu_new", "gelu_pytorch_tanh")  # the first is the family's own
_TANH = ("gelu_pytorch_tanh",)
_GEMMA = {"norm": "rms_plus_one"}
_SANDWICH = {**_GEMMA, "post_norm": True}
_GPT = {"norm": "layer", "gated": False}
_ACT = {"hidden_act": "hidden_activation"}
_GPT2_KEYS = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "hidden_act": "activation_function",
    "rms_norm_eps": "layer_norm_epsilon",
}

FAMILIES = {
    "llama": Family(_biases),
    "mistral": Family(_mistral),
    "qwen2": Family(_qwen2),
    "qwen3": Family(_qwen3, {"qk_norm": "head"}),
    "gemma": Family(_gemma, _GEMMA, (*_TANH, "gelu"), tied=True),
    "gemma2": Family(_gemma2, _SANDWICH, _TANH, tied=True, keys=_ACT),
    "gemma3_text": Family(_gemma3, {**_SANDWICH, "qk_norm": "head"}, _TANH, True, _ACT),
    "olmo2": Family(
        _biases, {"norm": "rms_late", "pre_norm": False, "post_norm": True, "qk_norm": "all"}
    ),
    "phi3": Family(_phi3),
    "smollm3": Family(_smollm3, tied=True),
    "granite": Family(_granite),
    "gpt2": Family(
        _gpt2,
        {**_GPT, "qkv_bias": True, "o_bias": True, "mlp_bias": True},
        ("gelu_new", *_GELUS),
        True,
        _GPT2_KEYS,
    ),
    "gpt_neox": Family(_gpt_neox, _GPT, _GELUS, keys={"rms_norm_eps": "layer_norm_eps"}),
}


def from_config(config: Config) -> Arch:
    """Reads a raw `config.json` dict.

    Raises:
      ValueError: unknown family, a missing key, or a feature that would be computed wrongly.
    """
    name = config.get("model_type")
    if name not in FAMILIES:
        raise ValueError(
            f"model_type: got {name!r}, expected one of {', '.join(sorted(FAMILIES))}. "
            f"{_advice(name)}"
        )
    family = FAMILIES[name]

    def need(key: str) -> Any:
        return _need(config, family.keys.get(key, key))

    D, H, N = need("hidden_size"), need("num_attention_heads"), need("num_hidden_layers")
    found = {**family.fixed, **family.quirks(config)}
    if "rope" not in found:
        found["rope"] = read_rope(config)
    if "F" not in found:
        found["F"] = need("intermediate_size")
    if len(layers := found.get("layers", ())) not in (0, N):
        raise ValueError(
            f"layers: got the kinds of {len(layers)}, expected those of num_hidden_layers = {N}. "
            "Check layer_types or no_rope_layers."
        )
    return Arch(
        family=name,
        V=need("vocab_size"),
        D=D,
        N=N,
        H=H,
        K=config.get("num_key_value_heads") or H,
        Dh=config.get("head_dim") or D // H,
        norm_eps=float(need("rms_norm_eps")),
        tied=bool(config.get("tie_word_embeddings", family.tied)),
        act=_act(config, name, family),
        **found,
    )


def _advice(name: Any) -> str:
    if name == "gemma3":
        return "This one reads images too; use a text-only model (model_type gemma3_text)."
    return "Convert or choose another model."


def _act(config: Config, name: str, family: Family) -> str:
    key = family.keys.get("hidden_act", "hidden_act")
    act = config.get(key) or family.acts[0]
    if act not in family.acts:
        expected = " or ".join(repr(a) for a in family.acts)
        raise ValueError(f"{key}: got {act!r}, expected {expected} for {name}.")
    # Gemma 1 was released with "gelu" where its tanh approximation was meant.
    return "gelu_pytorch_tanh" if name == "gemma" else act


# ------------------------------------------------------------------ kinds of layers


def _every(config: Config, window: int | None, rope: Rope) -> tuple[Layer, ...]:
    return (Layer(window, rope),) * _need(config, "num_hidden_layers") if window else ()


def _upper_sliding(config: Config) -> tuple[Layer, ...]:
    """Layers from `max_window_layers` on, or those that `layer_types` says."""
    window = config.get("sliding_window", _WINDOW)
    if not config.get("use_sliding_window") or not window:
        return ()
    N, rope = _need(config, "num_hidden_layers"), read_rope(config)
    types = config.get("layer_types")
    if types is None:
        full = min(_need(config, "max_window_layers"), N)
        types = ["full_attention"] * full + ["sliding_attention"] * (N - full)
    return _layers(types, window, rope, rope)


def _alternating(config: Config, every: int, rope: Rope, local: Rope) -> tuple[Layer, ...]:
    """Every so manieth layer sees everything, the others a window."""
    N, types = _need(config, "num_hidden_layers"), config.get("layer_types")
    if types is None:
        full = [(l + 1) % every == 0 for l in range(N)]
        types = ["full_attention" if f else "sliding_attention" for f in full]
    return _layers(types, _need(config, "sliding_window"), rope, local)


def _layers(types: list[str], window: int, rope: Rope, local: Rope) -> tuple[Layer, ...]:
    of = {"full_attention": Layer(0, rope), "sliding_attention": Layer(window, local)}
    if unknown := set(types) - set(of):
        raise ValueError(
            f"layer_types: got {', '.join(sorted(unknown))}, expected {' or '.join(of)}. "
            "Choose another model."
        )
    return tuple(of[t] for t in types)


# ------------------------------------------------------------------ rotary settings


def read_rope(config: Config, share: float = 1.0) -> Rope:
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
        return Rope(theta, share=share)
    if kind == "linear":
        return Rope(theta, kind, factor=float(_need(rope, "factor")), share=share)
    if kind == "llama3":
        return Rope(
            theta,
            kind,
            factor=float(_need(rope, "factor")),
            low_freq_factor=float(_need(rope, "low_freq_factor")),
            high_freq_factor=float(_need(rope, "high_freq_factor")),
            original_positions=int(_need(rope, "original_max_position_embeddings")),
            share=share,
        )
    raise ValueError(
        f"rope_type: got {kind!r}, expected default, linear or llama3. "
        "Other scalings would be computed wrongly, so they are refused."
    )


def _rope_key(config: Config, key: str, default: Any) -> Any:
    """A key of `rope_parameters`, or before transformers 5 of the config itself."""
    found = (config.get("rope_parameters") or {}).get(key, config.get(key, default))
    return _need({key: found}, key)


def _need(config: Config, key: str) -> Any:
    if config.get(key) is None:
        raise ValueError(f"{key}: missing from the model's config, expected a value. Add it.")
    return config[key]
