"""The model measured by default: SmolLM2-135M-Instruct, as a folder that both sides load."""

import os
import subprocess
from pathlib import Path

import reptune_jax as rt

_FETCH = Path(__file__).parents[1] / "launch" / "fetch_smollm2.sh"


def smollm2_folder() -> Path:
    """A Hugging Face folder with float32 weights, made once in the cache folder.

    Both sides read the same file, so a quantized source costs neither of them anything.
    """
    cache = Path(os.environ.get("REPTUNE_CACHE", "~/.cache/reptune_jax")).expanduser()
    folder = cache / "smollm2-hf"
    if not (folder / "config.json").exists():
        rt.save_hf(rt.load(fetched(), dtype="float32"), folder)
    return folder


def fetched() -> str:
    """Its GGUF file with Q4_1 weights, fetched once."""
    return subprocess.run([_FETCH], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
