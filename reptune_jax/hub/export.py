"""Out again: an ordinary Hugging Face folder that plain `transformers` loads, with a model card."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from reptune_jax import distributed, ending, lock
from reptune_jax import mesh as meshes
from reptune_jax.hub import safetensors_io, side_files, weights


def save_hf(model: Any, folder: str | os.PathLike[str], card: str = "") -> Path:
    """Writes an `lm.Model` as an ordinary Hugging Face folder that plain `transformers` loads.

    The files of the folder that it was loaded from go with it; README.md is `card`. All or nothing.

    Raises:
      ValueError: the folder is there and not empty, or a file.
    """
    # From several hosts all weights must come together; else they are read one by one.
    params = model.params if jax.process_count() == 1 else meshes.fetch(model.params)
    origin = side_files.public_name(model.name)
    card = card or f"# {Path(folder).name}\n\nExported from {origin} by reptune_jax.\n"
    generation = {"eos_token_id": list(model.stop_ids) or None, "pad_token_id": model.pad_id}

    def write() -> None:
        with all_or_nothing(folder) as scratch:
            given = model.files, model.config, model.dtype.name, model.tokenizer, generation
            side_files.write(scratch, *given)
            tensors = weights.to_hf(params, model.config["model_type"], model.spelling)
            safetensors_io.save_tensors(scratch, tensors)
            (scratch / "README.md").write_text(card, encoding="utf-8")

    distributed.once(write)
    return Path(folder)


@contextlib.contextmanager
def all_or_nothing(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A scratch folder beside `folder` that becomes it at the end.

    An error removes it. A kill leaves it behind, hidden and under another name; the next attempt
    begins by removing it.

    Raises:
      ValueError: the folder is there and not empty, or a file; another program is making it.
    """
    folder = Path(folder).absolute()
    with lock.held(folder.parent / f".{folder.name}.lock"):
        yield from _made(folder)


def _made(folder: Path) -> Iterator[Path]:
    if folder.is_file() or (folder.exists() and any(folder.iterdir())):
        raise ValueError(
            f"{folder}: is a file or not empty, expected a new folder. Choose another or delete it."
        )
    scratch = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    with ending.temporary(scratch), ending.of_file(folder):
        scratch.mkdir(parents=True)
        yield scratch
        if folder.exists():
            folder.rmdir()
        os.replace(scratch, folder)
