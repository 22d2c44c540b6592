"""Out again: an ordinary Hugging Face folder that plain `transformers` loads, with a model card."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
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
    with all_or_nothing(folder) as scratch:
        write_json(scratch / "config.json", config)
        write_json(scratch / "generation_config.json", generation)
        tensors = weights.to_hf(params, config["model_type"], spelling)
        safetensors_io.save_tensors(scratch, tensors)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
        (scratch / "README.md").write_text(card, encoding="utf-8")
    return Path(folder)


@contextlib.contextmanager
def all_or_nothing(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A scratch folder beside `folder` that becomes it at the end.

    An error removes it. A kill leaves it behind, hidden and under another name; the next attempt
    begins by removing it.

    Raises:
      ValueError: the folder is there and not empty, or a file.
    """
    folder = Path(folder).absolute()
    if folder.is_file() or (folder.exists() and any(folder.iterdir())):
        raise ValueError(
            f"{folder}: is a file or not empty, expected a new folder. Choose another or delete it."
        )
    scratch = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        if folder.exists():
            folder.rmdir()
        os.replace(scratch, folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """As transformers writes its configs."""
    path.write_text(json.dumps(value, indent=2) + "\n")
