"""What tests do to a Hugging Face folder."""

import json

from safetensors.numpy import load_file, save_file


def tensors(folder):
    """Every tensor of a folder, of all its shards."""
    return {k: v for p in sorted(folder.glob("*.safetensors")) for k, v in load_file(p).items()}


def rewrite(folder, change):
    """Changes the tensors of a folder of one file."""
    found = tensors(folder)
    change(found)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **changes):
    """None removes a key."""
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {k: v for k, v in config.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(kept))
