"""Hugging Face `config.json` -> `Arch`: a row of data for each family, its quirks in a function.

A key that changes the arithmetic is read or refused, never ignored.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from reptune_jax.model.arch import Arch, Layer, Rope
from reptune_jax.model.config_keys import (
    Config,
    Reading,
    check_values,
    need,
    read_rope,
    rope_settings,
)


def _no_quirks(config: Reading) -> dict[str, Any]:
    return {}


def _biases(config: Reading) -> dict[str, Any]:
    bias = bool(config.get("attention_bias", False))
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": bool(config.get("mlp_bias", False))}


def _mistral(config: Reading) -> dict[str, Any]:
    return {"layers": _every(config, config.default("sliding_window"), read_rope(config))}


def _qwen2(config: Reading) -> dict[str, Any]:
    return {"qkv_bias": True, "layers": _upper_sliding(config)}


def _qwen3(config: Reading) -> dict[str, Any]:
    return {**_biases(config), "layers": _upper_sliding(config)}


def _gemma(config: Reading) -> dict[str, Any]:
    if config.get("use_bidirectional_attention"):
        raise ValueError(
            "use_bidirectional_attention: got true, expected false. This is an encoder; choose a "
            "model that generates."
        )
    return {**_biases(config), "embed_scale": need(config, "hidden_size") ** 0.5}


def _gemma2(config: Reading) -> dict[str, Any]:
    rope = read_rope(config)
    return {
        **_gemma(config),
        "scale": config.need("query_pre_attn_scalar") ** -0.5,
        "score_cap": float(config.default("attn_logit_softcapping") or 0),
        "logit_cap": float(config.default("final_logit_softcapping") or 0),
        "layers": _alternating(config, 2, rope, rope),
    }


def _gemma3(config: Reading) -> dict[str, Any]:
    rope, local = _gemma3_ropes(config)
    return {
        **_gemma(config),
        "scale": config.need("query_pre_attn_scalar") ** -0.5,
        "logit_cap": float(config.get("final_logit_softcapping") or 0),
        "layers": _alternating(config, 0, rope, local),
        "rope": rope,
    }


def _gemma3_ropes(config: Reading) -> tuple[Rope, Rope]:
    """One of full attention, which `rope_scaling` is laid over, and one of the others."""
    given, scaling = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    if unknown := sorted(given.keys() - {"full_attention", "sliding_attention"}):
        raise ValueError(
            f"rope_parameters: got {', '.join(unknown)} for gemma3_text, expected full_attention "
            "and sliding_attention. Nest them."
        )
    if "type" in scaling and "rope_type" not in scaling:
        raise ValueError(
            f"rope_scaling: got type = {scaling['type']!r} for gemma3_text, expected the key "
            "rope_type: transformers passes over the other."
        )
    full = {**(given.get("full_attention") or {}), **scaling}
    local = given.get("sliding_attention") or {}
    return read_rope(config, full), read_rope(config, local, theta="rope_local_base_freq")


def _phi3(config: Reading) -> dict[str, Any]:
    share = rope_settings(config).get(_SHARE, config.get(_SHARE, 1.0))
    rope = read_rope(config, share=need({_SHARE: share}, _SHARE))
    return {"rope": rope, "layers": _every(config, config.get("sliding_window"), rope)}


def _smollm3(config: Reading) -> dict[str, Any]:
    N, rope = need(config, "num_hidden_layers"), read_rope(config)
    rotated = config.get("no_rope_layers")
    if not rotated:
        interval = config.need("no_rope_layer_interval")
        rotated = [int((l + 1) % interval != 0) for l in range(N)]
    if config.get("use_sliding_window") and config.get("sliding_window"):
        raise ValueError(
            "use_sliding_window: got true, expected false for smollm3, whose released models have "
            "none. Choose another model."
        )
    layers = tuple(Layer(0, rope if on else None) for on in rotated[:N])
    return {**_biases(config), "layers": layers}


def _granite(config: Reading) -> dict[str, Any]:
    return {
        **_biases(config),
        "scale": float(config.need("attention_multiplier")),
        "embed_scale": float(config.need("embedding_multiplier")),
        "residual_scale": float(config.need("residual_multiplier")),
        "logit_divisor": float(config.need("logits_scaling")),
    }


def _gpt2(config: Reading) -> dict[str, Any]:
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if config.get(key):
            raise ValueError(f"{key}: got true, expected false for gpt2. Choose another model.")
    return {
        "positions": config.need("n_positions"),
        "scale": 0.0 if config.get("scale_attn_weights", True) else 1.0,
        "F": config.get("n_inner") or 4 * need(config, "n_embd"),
        "rope": None,
    }


def _gpt_neox(config: Reading) -> dict[str, Any]:
    given = rope_settings(config)
    share = float(given[_SHARE] if _SHARE in given else config.need("rotary_pct"))
    theta = "rotary_emb_base"
    beside = None if "rope_theta" in given else config.get("rope_theta")
    if beside is not None and beside != config.need(theta):
        raise ValueError(
            f"{theta}: got {config.need(theta)} and rope_theta {beside}, expected one base. "
            f"Transformers reads {theta}; delete the wrong one."
        )
    bias = bool(config.get("attention_bias", True))
    return {
        "rope": read_rope(config, share=share, theta=theta),
        "parallel": bool(config.get("use_parallel_residual", True)),
        "qkv_bias": bias,
        "o_bias": bias,
        "mlp_bias": True,
    }


class Family(NamedTuple):
    """A row of FAMILIES: what is the same for all of its models, and what its config says."""

    quirks: Callable[[Reading], dict[str, Any]] = _no_quirks
    fixed: Mapping[str, Any] = {}
    acts: tuple[str, ...] = ("silu",)
    tied: bool = False  # where the config does not say
    keys: Mapping[str, str] = {}  # this family's names for common keys


_SHARE = "partial_rotary_factor"
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
    """Reads a raw `config.json` dict; keys that it lacks are transformers' defaults.

    Raises:
      ValueError: unknown family, a missing key, or a feature that would be computed wrongly.
    """
    return _read(Reading(config))


def is_tied(config: Config) -> bool:
    """Whether the config says that the unembedding is the embedding."""
    return bool(config.get("tie_word_embeddings", FAMILIES[config["model_type"]].tied))


def context(config: Config) -> int | None:
    """How many tokens it was made to read at most; None where it does not say."""
    gpt2 = config.get("model_type") == "gpt2"
    said = Reading(config).default("n_positions" if gpt2 else "max_position_embeddings")
    return said if type(said) is int and said > 0 else None


def depth(config: Config) -> int | None:
    """How many layers it says there are; None for a family that is refused.

    Raises:
      ValueError: no such number.
    """
    family = FAMILIES.get(name) if isinstance(name := config.get("model_type"), str) else None
    if family is None:
        return None
    check_values(config)
    return need(config, family.keys.get("num_hidden_layers", "num_hidden_layers"))


# Where a config may say a thing twice: what transformers reads, what it then passes over.
_RIVALS = (
    ("rope_scaling", "rope_parameters"),
    ("rope_parameters/rope_theta", "rope_theta"),
    ("rope_parameters/rope_theta", "rotary_emb_base"),
    ("rope_parameters/partial_rotary_factor", "partial_rotary_factor"),
    ("rope_parameters/partial_rotary_factor", "rotary_pct"),
    ("rope_parameters/rope_type", "rope_parameters/type"),
    ("rope_parameters/full_attention/rope_theta", "rope_theta"),
    ("rope_parameters/sliding_attention/rope_theta", "rope_local_base_freq"),
    ("rope_scaling/rope_theta", "rope_theta"),
    ("rope_scaling/rope_type", "rope_scaling/type"),
    ("layer_types", "sliding_window_pattern"),
    ("layer_types", "max_window_layers"),
    ("no_rope_layers", "no_rope_layer_interval"),
)


def notes(config: Config) -> list[str]:
    """What a person should know of how `from_config` reads this: defaults taken, rivals.

    Nothing for a config that is refused.
    """
    read = Reading(config)
    try:
        arch = _read(read)
    except ValueError:
        return []
    out = [
        f"{key}: not in config.json; taking {value}, transformers' default for {arch.family}."
        for key, value in read.taken.items()
    ]
    for first, second in _RIVALS:
        if None in (taken := _at(config, first), passed := _at(config, second)):
            continue
        try:
            same = from_config(_without(config, first.split("/"))) == arch
        except ValueError:
            same = False
        if not same:
            out.append(
                f"{first} = {taken!r} and {second} = {passed!r} disagree; reading {first}, as "
                "transformers does."
            )
    return out


def _at(config: Config, path: str) -> Any:
    for key in path.split("/"):
        config = (config or {}).get(key)  # type: ignore[assignment]
    return config


def _without(config: Config, path: list[str]) -> dict[str, Any]:
    key, *rest = path
    kept = {k: v for k, v in config.items() if k != key}
    return {**kept, key: _without(config[key], rest)} if rest else kept


def _read(config: Reading) -> Arch:
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(
            f"model_type: got {name!r}, expected one of {', '.join(sorted(FAMILIES))}. "
            f"{_advice(name)}"
        )
    family = FAMILIES[name]
    check_values(config)

    def size(key: str) -> Any:
        return need(config, family.keys.get(key, key))

    D, H, N = size("hidden_size"), size("num_attention_heads"), size("num_hidden_layers")
    found = {**family.fixed, **family.quirks(config)}
    if "rope" not in found:
        found["rope"] = read_rope(config)
    if "F" not in found:
        found["F"] = size("intermediate_size")
    if len(layers := found.get("layers", ())) not in (0, N):
        raise ValueError(
            f"layers: got the kinds of {len(layers)}, expected those of num_hidden_layers = {N}. "
            "Check layer_types or no_rope_layers."
        )
    K = config.default("num_key_value_heads") or H
    if H % K:
        raise ValueError(
            f"num_key_value_heads: got {K}, expected a divisor of the {H} heads. Correct it."
        )
    return Arch(
        family=name,
        V=size("vocab_size"),
        D=D,
        N=N,
        H=H,
        K=K,
        Dh=config.default("head_dim") or D // H,
        norm_eps=float(config.need(family.keys.get("rms_norm_eps", "rms_norm_eps"))),
        tied=is_tied(config),
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
    return (Layer(window, rope),) * need(config, "num_hidden_layers") if window else ()


def _upper_sliding(config: Reading) -> tuple[Layer, ...]:
    """Layers from `max_window_layers` on, or those that `layer_types` says."""
    if not config.get("use_sliding_window") or not (window := config.default("sliding_window")):
        return ()
    N, rope = need(config, "num_hidden_layers"), read_rope(config)
    types = config.get("layer_types")
    if types is None:
        full = min(config.need("max_window_layers"), N)
        types = ["full_attention"] * full + ["sliding_attention"] * (N - full)
    return _layers(types, window, rope, rope)


def _alternating(config: Reading, every: int, rope: Rope, local: Rope) -> tuple[Layer, ...]:
    """Every so manieth layer sees everything, the others a window; 0: the config says which."""
    N, types = need(config, "num_hidden_layers"), config.get("layer_types")
    if types is None:
        every = every or config.need("sliding_window_pattern")
        full = [(l + 1) % every == 0 for l in range(N)]
        types = ["full_attention" if f else "sliding_attention" for f in full]
    return _layers(types, config.need("sliding_window"), rope, local)


def _layers(types: list[str], window: int, rope: Rope, local: Rope) -> tuple[Layer, ...]:
    of = {"full_attention": Layer(0, rope), "sliding_attention": Layer(window, local)}
    if unknown := set(types) - set(of):
        raise ValueError(
            f"layer_types: got {', '.join(sorted(unknown))}, expected {' or '.join(of)}. "
            "Choose another model."
        )
    return tuple(of[t] for t in types)
