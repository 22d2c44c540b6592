"""Keys of a `config.json` as transformers reads them: its defaults, and rotary settings.

Configs are older than some of the keys. A key that a config lacks has its family's default there,
so it has it here, and the reader remembers which were taken so that they can be said.
"""

from collections.abc import Callable, Mapping
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


# What the values of these keys are, where they are not null: a kind, by the name of its test.
_SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads head_dim "
    "num_key_value_heads n_embd n_layer n_head n_positions n_inner sliding_window_pattern "
    "no_rope_layer_interval original_max_position_embeddings"
)
_COUNTS = "sliding_window max_window_layers"
_ABOVE = (
    "rms_norm_eps layer_norm_eps layer_norm_epsilon rope_theta rope_local_base_freq "
    "rotary_emb_base query_pre_attn_scalar logits_scaling factor low_freq_factor high_freq_factor"
)
_FROM_0 = "attn_logit_softcapping final_logit_softcapping"
_FINITE = "attention_multiplier embedding_multiplier residual_multiplier"
_SHARES = "rotary_pct partial_rotary_factor"
_FLAGS = (
    "attention_bias mlp_bias tie_word_embeddings use_sliding_window use_parallel_residual "
    "scale_attn_weights scale_attn_by_inverse_layer_idx add_cross_attention "
    "use_bidirectional_attention"
)
_TEXTS = "hidden_act hidden_activation activation_function"
_OBJECTS = "rope_scaling rope_parameters full_attention sliding_attention"
_LARGEST = 1e30  # of numbers that float32 is computed with


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _real(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < _LARGEST  # not NaN either


def _list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(type(v) is kind for v in value)


_Test = tuple[Callable[[Any], bool], str]
_TESTS: dict[str, _Test] = {
    **dict.fromkeys(_SIZES.split(), (lambda v: _whole(v) and v > 0, "a whole number above 0")),
    **dict.fromkeys(_COUNTS.split(), (_whole, "a whole number from 0 on")),
    **dict.fromkeys(_ABOVE.split(), (lambda v: _real(v) and v > 0, "a number above 0")),
    **dict.fromkeys(_FROM_0.split(), (lambda v: _real(v) and v >= 0, "a number from 0 on")),
    **dict.fromkeys(_FINITE.split(), (_real, "a number")),
    **dict.fromkeys(_SHARES.split(), (lambda v: _real(v) and 0 < v <= 1, "a share up to 1")),
    **dict.fromkeys(_FLAGS.split(), (lambda v: type(v) is bool, "true or false")),
    **dict.fromkeys(_TEXTS.split(), (lambda v: isinstance(v, str), "a name")),
    **dict.fromkeys(_OBJECTS.split(), (lambda v: isinstance(v, Mapping), "an object")),
    "layer_types": (_list_of(str), "a list of names"),
    "no_rope_layers": (_list_of(int), "a list of 0 and 1"),
}


def check_values(config: Config) -> None:
    """Raises ValueError where a key that is computed with has a value of another kind."""
    for key, value in config.items():
        fits, expected = _TESTS.get(key, (None, ""))
        if fits and value is not None and not fits(value):
            raise ValueError(f"{key}: got {repr(value)[:60]}, expected {expected}. Correct it.")
        if isinstance(value, Mapping) and key in _OBJECTS.split():
            check_values(value)


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
