"""LoRA adapters as folders of Hugging Face's `peft`: adapter_config.json and safetensors.

Ours are stacked over layers and shaped as their kernels; PEFT has a pair of matrices for every
module, lora_A [R, in] and lora_B [out, R], under the module's name in the base model.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from reptune_jax.hub.export import all_or_nothing, write_json
from reptune_jax.hub.names import HFName, table
from reptune_jax.hub.safetensors_io import read_file
from reptune_jax.hub.weights import abstract_params, matrix_shape
from reptune_jax.model import lora
from reptune_jax.model.arch import Arch

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TENSOR = re.compile(re.escape(_PREFIX) + r"(.+)\.lora_([AB])\.weight")
# settings that change the arithmetic in a way not computed here -> the values that do not
_REFUSED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "fan_in_fan_out": (False, None, True),  # how the base stores its weight: no matter here
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "megatron_config": (None,),
}


class Module(NamedTuple):
    """One projection of one layer."""

    path: str  # "attn/v"
    layer: int


class Factors(NamedTuple):
    """The two matrices of one module, and what their product is multiplied by."""

    a_RxI: np.ndarray
    b_OxR: np.ndarray
    scale: float


def save_adapter(
    folder: Path,
    arch: Arch,
    trained: Mapping[str, Any],
    about: Mapping[str, Any],
    base: tuple[str, str],
    card: str,
) -> Path:
    """Writes a run's adapters so that `peft.PeftModel.from_pretrained(base, folder)` takes them.

    `about` has rank, alpha, targets and layers (first, stop); `base` its name and `Model.sha`.

    Raises:
      ValueError: a target that is only a part of a module there, or the folder is not empty.
    """
    if fused := sorted(set(about["targets"]) - set(_projections(arch))):
        raise ValueError(
            f"adapter: got {', '.join(fused)}, which {arch.family} fuses with others into one "
            "module, expected projections of their own. Export the merged model (--format=hf)."
        )
    first, stop = about["layers"]
    name, sha = base
    tensors = dict(_tensors(arch, trained, about["targets"], first))
    conv1d = any(_row(arch, path).conv1d for path in about["targets"])
    with all_or_nothing(folder) as scratch:
        save_file(tensors, scratch / WEIGHTS, metadata={"format": "pt", "base_sha": sha})
        (scratch / "README.md").write_text(card, encoding="utf-8")
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": name,
            "r": about["rank"],
            "lora_alpha": about["alpha"],
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": conv1d,
            "use_rslora": False,
            "use_dora": False,
            "target_modules": _short_names(arch, about["targets"]),
            "layers_to_transform": list(range(first, stop)),
            "inference_mode": True,
        }
        write_json(scratch / CONFIG, config)
    return Path(folder)


def _tensors(
    arch: Arch, trained: Mapping[str, Any], targets: Sequence[str], first: int
) -> Iterator[tuple[str, np.ndarray]]:
    for path in targets:
        a, b = (np.asarray(trained[f"{path}/{leaf}"], np.float32) for leaf in (lora.A, lora.B))
        for l in range(a.shape[0]):
            where = f"{_PREFIX}{_module_name(arch, Module(path, first + l))}"
            rank = a.shape[-1]
            yield f"{where}.lora_A.weight", np.ascontiguousarray(a[l].reshape(-1, rank).T)
            yield f"{where}.lora_B.weight", np.ascontiguousarray(b[l].reshape(rank, -1).T)


def _short_names(arch: Arch, targets: Sequence[str]) -> list[str]:
    """Last part of each module's name, or two parts where one would name other modules too."""
    parts = {path: _module_name(arch, Module(path, 0)).split(".") for path in _projections(arch)}
    last = [p[-1] for p in parts.values()]
    return [".".join(parts[p][-1 if last.count(parts[p][-1]) == 1 else -2 :]) for p in targets]


def _projections(arch: Arch) -> list[str]:
    """Those that are a module of their own in the Hugging Face model, not fused with others."""
    tensors = [row.hf for row in table(arch.family).values()]
    return [path for path in lora.input_axes(arch) if tensors.count(_row(arch, path).hf) == 1]


def _row(arch: Arch, path: str) -> HFName:
    return table(arch.family)[f"blocks/{path}/kernel"]


def _module_name(arch: Arch, module: Module) -> str:
    return _row(arch, module.path).hf.format(l=module.layer).removesuffix(".weight")


# ---------------------------------------------------------------- in


def read_adapter(folder: Path, arch: Arch, base_sha: str) -> dict[Module, Factors]:
    """The pairs of an adapter folder, by our projection and layer.

    Raises:
      ValueError: no LoRA adapter, one of a kind that is not computed here, or another base's.
    """
    config = _read_config(folder)
    path = folder / WEIGHTS
    if not path.exists():
        raise ValueError(
            f"{folder}: has no {WEIGHTS}, expected one beside {CONFIG}. Pickles are not opened: "
            "save the adapter with peft's save_pretrained(safe_serialization=True)."
        )
    tensors, metadata = read_file(path)
    if (made_for := metadata.get("base_sha", base_sha)) != base_sha:
        raise ValueError(
            f"{folder}: made for {config.get('base_model_name_or_path')} ({made_for}), got base "
            f"({base_sha}), expected the same. Load the model it was made for."
        )
    known = {
        _module_name(arch, module): module
        for module in (Module(p, l) for p in _projections(arch) for l in range(arch.N))
    }
    matrices: dict[Module, dict[str, np.ndarray]] = {}
    for name, handle in tensors.items():
        module, which = _place(folder, name, known, config)
        matrices.setdefault(module, {})[which] = handle.read().astype(np.float32)
    pairs = {
        module: _pair(folder, module, found, config, arch) for module, found in matrices.items()
    }
    if not pairs:
        raise ValueError(f"{folder}: holds no LoRA weights, expected lora_A and lora_B.")
    return pairs


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.exists():
        raise ValueError(f"{folder}: has no {CONFIG}, expected a PEFT adapter folder.")
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is not valid JSON ({error}). Download it again.") from None
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{path}: got peft_type {config.get('peft_type')!r}, expected 'LORA'. "
            "Merge it into its base with peft, and load that."
        )
    for key, harmless in _REFUSED.items():
        if (got := config.get(key)) not in harmless:
            raise ValueError(
                f"{path}: got {key} {got!r}, expected {harmless[0]!r}. "
                "Merge it into its base with peft (merge_and_unload), and load that."
            )
    return config


def _place(
    folder: Path, name: str, known: Mapping[str, Module], config: Mapping[str, Any]
) -> tuple[Module, str]:
    """Which module, and which of its matrices, a tensor is."""
    match = _TENSOR.fullmatch(name)
    if match and match[1] in known:
        return known[match[1]], match[2]
    raise ValueError(
        f"{folder}: got {name}, which is no LoRA weight of this base's layers; the adapter says it "
        f"is for {config.get('base_model_name_or_path')}. Expected modules such as "
        f"{', '.join(list(known)[:2])}. Load the model it was made for."
    )


def _pair(
    folder: Path,
    module: Module,
    found: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    arch: Arch,
) -> Factors:
    name = _module_name(arch, module)
    if missing := {"A", "B"} - found.keys():
        raise ValueError(f"{folder}: {name} lacks lora_{missing.pop()}. Download it again.")
    a, b = found["A"], found["B"]
    leaf = f"blocks/{module.path}/kernel"
    out, inputs = matrix_shape(arch.family, leaf, abstract_params(arch)[leaf].shape[1:])
    rank = _of_module(config.get("rank_pattern"), name, config["r"])
    if a.shape != (rank, inputs) or b.shape != (out, rank):
        raise ValueError(
            f"{folder}: {name} got lora_A {list(a.shape)} and lora_B {list(b.shape)}, expected "
            f"[{rank}, {inputs}] and [{out}, {rank}]; the adapter says it is for "
            f"{config.get('base_model_name_or_path')}. Load the model it was made for."
        )
    alpha = _of_module(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
    return Factors(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _of_module(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's way to give some modules a rank or alpha of their own."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def changes(
    pairs: Mapping[Module, Factors], arch: Arch
) -> Iterator[tuple[str, list[int], np.ndarray]]:
    """(leaf, its layers L, what the adapter adds to them, float32 [L, ...]), leaf by leaf."""
    shapes = abstract_params(arch)
    for path in sorted({module.path for module in pairs}):
        layers = sorted(module.layer for module in pairs if module.path == path)
        leaf = f"blocks/{path}/kernel"
        added = [
            scale * (b_OxR @ a_RxI).T
            for a_RxI, b_OxR, scale in (pairs[Module(path, l)] for l in layers)
        ]
        yield leaf, layers, np.stack(added).reshape(-1, *shapes[leaf].shape[1:])
