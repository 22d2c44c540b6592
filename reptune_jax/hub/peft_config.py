"""`adapter_config.json` of PEFT: the keys that are understood, and what they say of a module.

PEFT's keys are an open set, and most that are set change the arithmetic. So a key is read, or
changes nothing whatever it says, or has to be off; that holds for keys that nobody has heard of.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from reptune_jax.reading import parse_json, short

CONFIG = "adapter_config.json"
_MERGE = "Merge it into its base with peft (merge_and_unload), and load that."
_LARGEST = 1e30  # of numbers that float32 is computed with

_READ = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"}
_READ |= {"exclude_modules", "layers_to_transform", "peft_type", "base_model_name_or_path"}
# of training, of the base's storage, or of a key below that has to be off
_NO_MATTER = {"task_type", "revision", "inference_mode", "auto_mapping", "peft_version"}
_NO_MATTER |= {"lora_dropout", "fan_in_fan_out", "layers_pattern", "runtime_config"}
_NO_MATTER |= {"megatron_core", "qalora_group_size", "loftq_config", "eva_config"}
_NO_MATTER |= {"corda_config", "lora_ga_config"}
# Anything else has to be off (null, false, empty), or one of these. Other beginnings than these
# change the base's own weights: PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA take out what they put in.
_OFF: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal", "mica"),
    "use_dora": (False,),
    "use_qalora": (False,),
    "lora_bias": (False,),
    "ensure_weight_tying": (False,),
}


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What an adapter's config says; names are of modules in the Hugging Face model."""

    base: str
    rank: int
    alpha: float
    root: bool  # divided by the root of the rank (rsLoRA)
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    targets: tuple[str, ...] | None  # None: as the weights say
    excluded: tuple[str, ...]
    layers: tuple[int, ...] | None

    def rank_of(self, name: str) -> int:
        return _of_module(self.ranks, name, self.rank)

    def scale_of(self, name: str) -> float:
        """What the product of its matrices is multiplied by."""
        rank = self.rank_of(name)
        return _of_module(self.alphas, name, self.alpha) / (math.sqrt(rank) if self.root else rank)

    def adapts(self, name: str, layer: int) -> bool:
        """Whether PEFT would put an adapter there, and not pass over its weights."""
        targeted = self.targets is None or any(_ends(name, t) for t in self.targets)
        excluded = any(_ends(name, t) for t in self.excluded)
        return targeted and not excluded and (self.layers is None or layer in self.layers)


def read_config(folder: Path) -> AdapterConfig:
    """The config of an adapter folder.

    Raises:
      ValueError: none there, no LoRA, or a key that is not understood and not off.
    """
    path = folder / CONFIG
    if not path.exists():
        raise ValueError(f"{folder}: has no {CONFIG}, expected a PEFT adapter folder.")
    config = parse_json(path.read_bytes(), path)
    if config.get("peft_type") != "LORA":
        found = short(config.get("peft_type"))
        raise ValueError(f"{path}: got peft_type {found}, expected 'LORA'. {_MERGE}")
    for key, got in config.items():
        allowed = _OFF.get(key, (None,))
        if key not in _READ | _NO_MATTER and got and got not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise ValueError(f"{path}: got {key} {short(got)}, expected {expected}. {_MERGE}")
    layers = config.get("layers_to_transform")
    layers = [layers] if type(layers) is int else layers or []
    if not isinstance(layers, list) or any(type(layer) is not int for layer in layers):
        raise ValueError(
            f"{path}: got layers_to_transform {short(layers)}, expected numbers of layers. "
            "Save it again."
        )
    return AdapterConfig(
        base=str(config.get("base_model_name_or_path"))[:200],
        rank=_rank(path, "r", config.get("r", 8)),  # peft's own default
        alpha=_number(path, "lora_alpha", config.get("lora_alpha", 8)),
        root=_flag(path, "use_rslora", config.get("use_rslora")),
        ranks=_patterns(path, "rank_pattern", config, _rank),
        alphas=_patterns(path, "alpha_pattern", config, _number),
        targets=_names(path, "target_modules", config),
        excluded=_names(path, "exclude_modules", config) or (),
        layers=tuple(layers) or None,
    )


def _names(path: Path, key: str, config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """A list of names; a string is an expression, which is not run: the weights say what it hit."""
    if isinstance(found := config.get(key), str | None):
        return None
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{path}: got {key} {short(found)}, expected names. Save it again.")
    return tuple(found) or None


def _flag(path: Path, key: str, got: Any) -> bool:
    if not isinstance(got, bool | None):
        raise ValueError(f"{path}: got {key} {short(got)}, expected a flag. Save it again.")
    return bool(got)


def _rank(path: Path, key: str, got: Any) -> int:
    if type(got) is int and 0 < got < 2**31:
        return got
    raise ValueError(
        f"{path}: got {key} {short(got)}, expected a whole number above 0. Save it again."
    )


def _number(path: Path, key: str, got: Any) -> float:
    if type(got) in (int, float) and 0 < got < _LARGEST:
        return got
    raise ValueError(f"{path}: got {key} {short(got)}, expected a number above 0. Save it again.")


def _patterns(
    path: Path, key: str, config: Mapping[str, Any], number: Callable[[Path, str, Any], Any]
) -> dict[str, Any]:
    """PEFT's way to give some modules a rank or alpha of their own: pattern -> value.

    Patterns are regular expressions there. They come from a file, and one can be made to run for
    ever; so names alone are matched, with dots that may be escaped and ends that may be fixed.
    """
    given, found = config.get(key) or {}, {}
    if not isinstance(given, dict):
        raise ValueError(
            f"{path}: got {key} {short(given)}, expected names of modules, each with a number."
        )
    for pattern, value in given.items():
        name = pattern.replace("\\.", ".").removesuffix("$")
        if re.search(r"[*+?()\[\]{}|\\$^]", name.removeprefix("^")):
            raise ValueError(
                f"{path}: got {key} {short(pattern)}, an expression, expected names of modules "
                "such as 'q_proj' or 'layers.3.self_attn.q_proj'. Name the modules."
            )
        found[name] = number(path, f"{key} of {pattern[:60]}", value)
    return found


def _of_module(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((value for pattern, value in patterns.items() if _ends(name, pattern)), default)


def _ends(name: str, pattern: str) -> bool:
    """Whether it is the name, or with no "^" before it the name's last parts."""
    return name == pattern.removeprefix("^") or name.endswith(f".{pattern}")
