"""Out again: an ordinary Hugging Face folder that plain `transformers` loads, with a model card."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reptune_jax.hub import safetensors_io, weights


def save_folder(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    params: Mapping[str, Any],
    tokenizer: Any,
    generation: Mapping[str, Any],
    card: str,
    spelling: weights.Spelling = weights.AS_TABLED,
) -> Path:
    """Writes config.json, safetensors, tokenizer and README.md (the model card); all or nothing.

    Raises:
      ValueError: the folder is there and not empty, or a file.
    """
    folder = Path(folder)
    if folder.is_file() or (folder.exists() and any(folder.iterdir())):
        raise ValueError(
            f"{folder}: is a file or not empty, expected a new folder. Choose another or delete it."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        _write_json(scratch / "config.json", config)
        _write_json(scratch / "generation_config.json", generation)
        safetensors_io.save_tensors(scratch, weights.to_hf(params, config["model_type"], spelling))
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
        (scratch / "README.md").write_text(card, encoding="utf-8")
        scratch.chmod(0o755)  # mkdtemp's folders are private
        if folder.exists():
            folder.rmdir()
        os.replace(scratch, folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return folder


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
