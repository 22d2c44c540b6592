"""LoRA adapters as folders of Hugging Face's `peft`: adapter_config.json and safetensors.

Ours are stacked over layers and shaped as their kernels; PEFT has a pair of matrices for every
module, lora_A [R, in] and lora_B [out, R], under the module's name in the base model.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from reptune_jax.hub.export import all_or_nothing
from reptune_jax.hub.names import HFName, table
from reptune_jax.hub.peft_config import CONFIG, AdapterConfig, read_config
from reptune_jax.hub.rounding import Rounding
from reptune_jax.hub.safetensors_io import check_written, read_file, save_file
from reptune_jax.hub.side_files import write_json
from reptune_jax.hub.weights import abstract_params, matrix_shape, output_parts
from reptune_jax.model import lora
from reptune_jax.model.arch import Arch

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TENSOR = re.compile(re.escape(_PREFIX) + r"(.+)\.lora_([AB])\.weight")


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
    for module, array in tensors.items():
        check_written(module, array)
    conv1d = any(_row(arch, path).conv1d for path in about["targets"])
    with all_or_nothing(folder) as scratch:
        save_file(tensors, scratch / WEIGHTS, {"format": "pt", "base_sha": sha})
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


def merge(params: Mapping[str, Any], arch: Arch, base_sha: str, folder: Path) -> dict[str, Any]:
    """The weights with an adapter folder's update added, in their own type.

    Raises:
      ValueError: as `read_adapter`.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    rounding = Rounding(flat["embed/embedding"].dtype)
    for path, layers, change in changes(read_adapter(folder, arch, base_sha), arch):
        at = jnp.asarray(layers)
        before = flat[path][at]
        stored = (before.astype(jnp.float32) + change).astype(before.dtype)
        rounding.add(before, change, stored)
        flat[path] = flat[path].at[at].set(stored)
    rounding.report(folder)
    return traverse_util.unflatten_dict(flat, sep="/")


def read_adapter(folder: Path, arch: Arch, base_sha: str) -> dict[Module, Factors]:
    """The pairs of an adapter folder, by our projection and layer.

    What the base fuses into one module is split by the rows of its table of names.

    Raises:
      ValueError: no LoRA adapter, one with a setting that is not understood, or another base's.
    """
    config = read_config(folder)
    path = folder / WEIGHTS
    if not path.exists():
        raise ValueError(
            f"{folder}: has no {WEIGHTS}, expected one beside {CONFIG}. Pickles are not opened: "
            "save the adapter with peft's save_pretrained(safe_serialization=True)."
        )
    tensors, metadata = read_file(path)
    if (made_for := metadata.get("base_sha", base_sha)) != base_sha:
        raise ValueError(
            f"{folder}: made for {config.base} ({made_for}), got base "
            f"({base_sha}), expected the same. Load the model it was made for."
        )
    known = _modules(arch)
    matrices: dict[str, dict[str, np.ndarray]] = {}
    for name, handle in tensors.items():
        module, which = _place(folder, name, known, config)
        matrices.setdefault(module, {})[which] = handle.read().astype(np.float32)
    if not matrices:
        raise ValueError(f"{folder}: holds no LoRA weights, expected lora_A and lora_B.")
    pairs: dict[Module, Factors] = {}
    for name, found in matrices.items():
        pairs |= _pairs(folder, name, known[name], found, config, arch)
    return pairs


def _modules(arch: Arch) -> dict[str, list[Module]]:
    """Name of every module -> the projections of ours that are in it, in its order."""
    ours = [f"blocks/{path}/kernel" for path in lora.input_axes(arch)]
    out: dict[str, list[Module]] = {}
    for layer in range(arch.N):
        for leaf in (path for path in table(arch.family) if path in ours):
            path = leaf.removeprefix("blocks/").removesuffix("/kernel")
            module = Module(path, layer)
            out.setdefault(_module_name(arch, module), []).append(module)
    return out


def _place(
    folder: Path, name: str, known: Mapping[str, Sequence[Module]], config: AdapterConfig
) -> tuple[str, str]:
    """Which module's, and which of its matrices, a tensor is."""
    match = _TENSOR.fullmatch(name)
    if not match or match[1] not in known:
        raise ValueError(
            f"{folder}: got {name}, which is no LoRA weight of this base's layers; the adapter "
            f"says it is for {config.base}. Expected modules such as {', '.join(list(known)[:2])}. "
            "Load the model it was made for."
        )
    if not config.adapts(match[1], known[match[1]][0].layer):
        raise ValueError(
            f"{folder}: {WEIGHTS} holds {name}, but by target_modules, exclude_modules and "
            f"layers_to_transform of {CONFIG} that module has none: peft would pass over it. "
            "Correct the config."
        )
    return match[1], match[2]


def _pairs(
    folder: Path,
    name: str,
    modules: Sequence[Module],
    found: Mapping[str, np.ndarray],
    config: AdapterConfig,
    arch: Arch,
) -> dict[Module, Factors]:
    if missing := {"A", "B"} - found.keys():
        raise ValueError(f"{folder}: {name} lacks lora_{missing.pop()}. Download it again.")
    a, b = found["A"], found["B"]
    leaves = [f"blocks/{module.path}/kernel" for module in modules]
    shapes = {leaf: abstract_params(arch)[leaf].shape[1:] for leaf in leaves}
    sizes = [matrix_shape(arch.family, leaf, shape) for leaf, shape in shapes.items()]
    out, inputs = sum(outs for outs, _ in sizes), sizes[0][1]
    rank = config.rank_of(name)
    if a.shape != (rank, inputs) or b.shape != (out, rank):
        raise ValueError(
            f"{folder}: {name} got lora_A {list(a.shape)} and lora_B {list(b.shape)}, expected "
            f"[{rank}, {inputs}] and [{out}, {rank}]; the adapter says it is for {config.base}. "
            "Load the model it was made for."
        )
    if broken := [
        f"lora_{which}" for which, array in found.items() if not np.isfinite(array).all()
    ]:
        raise ValueError(
            f"{folder}: {name} has NaN or infinite weights in {broken[0]}. Use another."
        )
    parts = output_parts(arch.family, shapes, b)
    scale = config.scale_of(name)
    return {m: Factors(a, part, scale) for m, part in zip(modules, parts, strict=True)}


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
