"""`adapter_config.json` of PEFT: the keys that are understood, and what they say of a module.

PEFT's keys are an open set, and most that are set change the arithmetic. So a key is read, or
changes nothing whatever it says, or has to be off; that holds for keys that nobody has heard of.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG = "adapter_config.json"
_MERGE = "Merge it into its base with peft (merge_and_unload), and load that."
_NUMBER = (int, float)

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
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is not valid JSON ({error}). Download it again.") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: got a JSON {type(config).__name__}, expected an object.")
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{path}: got peft_type {config.get('peft_type')!r}, expected 'LORA'. {_MERGE}"
        )
    for key, got in config.items():
        allowed = _OFF.get(key, (None,))
        if key not in _READ | _NO_MATTER and got and got not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise ValueError(f"{path}: got {key} {got!r}, expected {expected}. {_MERGE}")
    layers = config.get("layers_to_transform")
    return AdapterConfig(
        base=str(config.get("base_model_name_or_path")),
        rank=int(_number(path, "r", config.get("r", 8))),
        alpha=_number(path, "lora_alpha", config.get("lora_alpha", 8)),
        root=bool(config.get("use_rslora")),
        ranks=_patterns(path, "rank_pattern", config),
        alphas=_patterns(path, "alpha_pattern", config),
        targets=_names(config.get("target_modules")),
        excluded=_names(config.get("exclude_modules")) or (),
        layers=tuple([layers] if isinstance(layers, int) else layers) if layers else None,
    )


def _names(found: Any) -> tuple[str, ...] | None:
    """A list of names; a string is an expression, which is not run: the weights say what it hit."""
    return tuple(map(str, found)) if isinstance(found, list) and found else None


def _number(path: Path, key: str, got: Any) -> float:
    if isinstance(got, _NUMBER) and not isinstance(got, bool) and 0 < got < math.inf:
        return got
    raise ValueError(f"{path}: got {key} {got!r}, expected a number above 0. Save it again.")


def _patterns(path: Path, key: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's way to give some modules a rank or alpha of their own: pattern -> value.

    Patterns are regular expressions there. They come from a file, and one can be made to run for
    ever; so names alone are matched, with dots that may be escaped and ends that may be fixed.
    """
    found = {}
    for pattern, value in (config.get(key) or {}).items():
        name = pattern.replace("\\.", ".").removesuffix("$")
        if re.search(r"[*+?()\[\]{}|\\$^]", name.removeprefix("^")):
            raise ValueError(
                f"{path}: got {key} {pattern!r}, an expression, expected names of modules such as "
                f"'q_proj' or 'layers.3.self_attn.q_proj'. Name the modules."
            )
        found[name] = _number(path, f"{key} of {pattern}", value)
    return found


def _of_module(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((value for pattern, value in patterns.items() if _ends(name, pattern)), default)


def _ends(name: str, pattern: str) -> bool:
    """Whether it is the name, or with no "^" before it the name's last parts."""
    return name == pattern.removeprefix("^") or name.endswith(f".{pattern}")
