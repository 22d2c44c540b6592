"""What goes with the weights of a model: config, tokenizer, generation settings, license.

The source's own files travel as they are, byte for byte, and of config.json only those keys change
whose values have. Where there are none (a GGUF file) they are made so that older and newer readers
of Hugging Face folders (transformers 4.45 to 5, llama.cpp's converter, vLLM) see the same model.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reptune_jax.console import say

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedTokenizerBase

# What of a model's folder is downloaded, and copied: nothing that could be a secret, or code.
PATTERNS = ["config.json", "generation_config.json", "tokenizer*", "*tokens.json", "tekken.json"]
PATTERNS += ["special_tokens_map.json", "vocab.*", "merges.txt", "*.model", "chat_template*"]
PATTERNS += ["additional_chat_templates/*.jinja", "*processor_config.json", "USE_POLICY*"]
PATTERNS += ["LICEN[CS]E*", "Licen[cs]e*", "licen[cs]e*", "COPYING*", "NOTICE*", "Notice*"]
_CODE = (".py", ".pyc", ".so")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def write(
    folder: Path,
    source: Path | None,
    config: Mapping[str, Any],
    dtype: str,
    tokenizer: "PreTrainedTokenizerBase | None",
    generation: Mapping[str, Any],
) -> None:
    """Copies the files of the folder `source`, or makes them where it is None.

    `dtype` is what the weights are stored in now, or "" where that has not changed. `generation` is
    for a source without files.

    Raises:
      ValueError: the source folder is gone.
    """
    if source is None:
        write_json(folder / "config.json", spelled_for_all({**config, "dtype": dtype}))
        write_json(folder / "generation_config.json", generation)
        if tokenizer is not None:
            _make_tokenizer(folder, tokenizer)
        return
    if not source.is_dir():
        raise ValueError(
            f"{source}: is gone, expected the model's folder, whose tokenizer and license go with "
            "it. Put it back."
        )
    for path in _own_files(source):
        target = folder / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
        if path.suffix == ".json":
            _forget_paths(target)
    _update_config(folder / "config.json", config, dtype)
    if tokenizer is not None and not (folder / "tokenizer.json").exists():
        _make_tokenizer(folder, tokenizer)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """As transformers writes its configs."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def public_name(name: str) -> str:
    """A local path means nothing to who downloads a model, and says where it was made."""
    known = _HUB_ID.fullmatch(name) and not Path(name).exists()
    return name if known else Path(name).name


def spelled_for_all(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config whose rotary settings and type have both their old and their new keys.

    transformers before 5 knows neither `rope_parameters` nor `dtype`, and takes 10000 for a missing
    `rope_theta` without a word.
    """
    rope = config.get("rope_parameters") or {}
    full = rope.get("full_attention", rope)
    out = {**config, "torch_dtype": config["dtype"]}
    if "rope_theta" in full:
        out["rope_theta"] = full["rope_theta"]
        scaling = {k: v for k, v in full.items() if k != "rope_theta"}
        out["rope_scaling"] = scaling if scaling.get("rope_type", "default") != "default" else None
    if "sliding_attention" in rope:
        out["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    return out


def _own_files(source: Path) -> Iterator[Path]:
    """Those that are copied; links only to where a model's files may lie."""
    found = {path for pattern in PATTERNS for path in source.glob(pattern)}
    for path in sorted(p for p in found if p.is_file() and p.suffix not in _CODE):
        if _lies_there(path.resolve(), source.resolve()):
            yield path
        else:
            say(f"{path}: is a link out of the model's folder, not copied")


def _lies_there(path: Path, folder: Path) -> bool:
    """In the folder, or among the blobs of the hub cache's folder that it is a snapshot of."""
    if path.is_relative_to(folder):
        return True
    return folder.parent.name == "snapshots" and path.parent == folder.parents[1] / "blobs"


def _update_config(path: Path, config: Mapping[str, Any], dtype: str) -> None:
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    wanted = {k: v for k, v in config.items() if not is_local(k, v)}
    if dtype:
        there = [k for k in ("torch_dtype", "dtype") if k in wanted]
        made = ["torch_dtype", "dtype"] if dtype != "float32" else []  # which is the default
        wanted |= dict.fromkeys(there or made, dtype)
    if wanted != stored:
        write_json(path, wanted)


def _forget_paths(path: Path) -> None:
    """Takes out what says where on this machine a model lay; other files keep their bytes."""
    if path.name == "tokenizer.json":
        return  # large, and knows no paths
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return  # not ours to mend
    if isinstance(value, dict) and any(is_local(k, v) for k, v in value.items()):
        write_json(path, {k: v for k, v in value.items() if not is_local(k, v)})


def is_local(key: str, value: Any) -> bool:
    """Whether a key of a JSON file says where on this machine something lies."""
    if not isinstance(value, str) or not value:
        return False
    if key.endswith("name_or_path"):
        return not _HUB_ID.fullmatch(value) or Path(value).exists()
    home = value.startswith(f"{Path.home()}/")
    return Path(value).is_absolute() and len(value) < 4096 and (home or Path(value).exists())


def _make_tokenizer(folder: Path, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Not `save_pretrained`: version 5 writes a class and keys that version 4 cannot read."""
    core = tokenizer.backend_tokenizer
    core.save(str(folder / "tokenizer.json"))
    special = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    keys = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    added = {
        str(i): {key: getattr(token, key) for key in keys}
        for i, token in sorted(core.get_added_tokens_decoder().items())
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": added,
        **special,
        "add_bos_token": core.encode("a").ids[0] == tokenizer.bos_token_id,
        "clean_up_tokenization_spaces": False,
        "model_max_length": tokenizer.model_max_length,
    }
    if tokenizer.chat_template:
        config["chat_template"] = tokenizer.chat_template
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", special)
