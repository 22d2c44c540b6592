"""Keys of a `config.json` as transformers reads them: its defaults, and rotary settings.

Configs are older than some of the keys. A key that a config lacks has its family's default there,
so it has it here, and the reader remembers which were taken so that they can be said.
"""

from collections.abc import Mapping
from typing import Any

from reptune_jax.model.arch import Rope

Config = Mapping[str, Any]

_COMMON = {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0}
_QWEN = {
    **_COMMON,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GEMMA = {**_COMMON, "head_dim": 256}
_GEMMA2 = {
    **_GEMMA,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
# Of every family's config class in transformers, what is neither a size of the weights, which a
# config has to say, nor off. Keys whose default is made of others (heads, D // H) are not here.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "mistral": {**_COMMON, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
    "gemma": {**_GEMMA, "num_key_value_heads": 16},
    "gemma2": {**_GEMMA2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": {
        **_GEMMA2,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "sliding_window_pattern": 6,
    },
    "olmo2": {**_COMMON, "rms_norm_eps": 1e-5},
    "phi3": {**_COMMON, "rms_norm_eps": 1e-5},
    "smollm3": {
        **_COMMON,
        "rope_theta": 2_000_000.0,
        "num_key_value_heads": 4,
        "no_rope_layer_interval": 4,
    },
    "granite": {
        **_COMMON,
        "attention_multiplier": 1.0,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    "gpt2": {"layer_norm_epsilon": 1e-5, "n_positions": 1024},
    "gpt_neox": {"layer_norm_eps": 1e-5, "rotary_emb_base": 10_000.0, "rotary_pct": 0.25},
}


class Reading(dict[str, Any]):
    """A config with its family's defaults; `taken` are those that were asked for."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.taken: dict[str, Any] = {}

    def default(self, key: str, otherwise: Any = None) -> Any:
        """The config's value, null included, or the family's default."""
        if key in self:
            return self[key]
        defaults = DEFAULTS.get(self.get("model_type", ""), {})
        if key in defaults:
            self.taken[key] = defaults[key]
        return defaults.get(key, otherwise)

    def need(self, key: str) -> Any:
        """`default`, and an error where there is none."""
        return need({key: self.default(key)}, key)


def need(config: Config, key: str) -> Any:
    """A key that a config has to say."""
    if config.get(key) is None:
        raise ValueError(f"{key}: missing from the model's config, expected a value. Add it.")
    return config[key]


# ------------------------------------------------------------------ rotary settings


def read_rope(
    config: Config, given: Config | None = None, share: float = 1.0, theta: str = "rope_theta"
) -> Rope:
    """From `given`, by default `rope_settings`; without a base there, that of the key `theta`."""
    read = config if isinstance(config, Reading) else Reading(config)
    given = rope_settings(config) if given is None else given
    if any(isinstance(value, Mapping) for value in given.values()):
        raise ValueError(
            f"rope_parameters: got one each for {' and '.join(map(str, given))}, expected one for "
            "all layers. Choose another model."
        )
    base = float(read.need(theta) if given.get("rope_theta") is None else given["rope_theta"])
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return Rope(base, share=share)
    if kind == "linear":
        return Rope(base, kind, factor=float(need(given, "factor")), share=share)
    if kind == "llama3":
        trained = "original_max_position_embeddings"
        return Rope(
            base,
            kind,
            factor=float(need(given, "factor")),
            low_freq_factor=float(need(given, "low_freq_factor")),
            high_freq_factor=float(need(given, "high_freq_factor")),
            original_positions=int(given.get(trained) or need(config, "max_position_embeddings")),
            share=share,
        )
    raise ValueError(
        f"rope_type: got {kind!r}, expected default, linear or llama3. "
        "Other scalings would be computed wrongly, so they are refused."
    )


def rope_settings(config: Config) -> Config:
    """Transformers 5 writes `rope_parameters`; where the older key is there too, it goes first."""
    return config.get("rope_scaling") or config.get("rope_parameters") or {}
