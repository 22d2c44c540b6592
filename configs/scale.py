"""Large models, for `reptune_jax.plan` and as a start for a run: `configs/scale.py:llama-2-13b`.

Trains all attention projections of the middle layers (13B: the paper's 11 to 17), weights sharded
over all devices. `--config.train.modules=attn,mlp,norm` trains everything in them.
"""

from ml_collections import ConfigDict

from reptune_jax.config import default

LAYERS = {
    "llama-2-7b": (9, 14),
    "llama-3-8b": (9, 14),
    "llama-2-13b": (11, 18),
    "llama-3-70b": (22, 36),
}


def get_config(arg: str = "llama-3-8b") -> ConfigDict:
    if arg not in LAYERS:
        raise ValueError(f"configs/scale.py: got {arg!r}, expected one of {', '.join(LAYERS)}.")
    c = default()
    c.model = arg  # for a run: --config.model=<folder or hub id>
    c.train.layers = c.loss.layers = LAYERS[arg]
    c.train.modules = ("attn/q", "attn/k", "attn/v", "attn/o")
    c.train.batch = 64
    c.train.lr = 1e-5
    c.train.remat = "full"
    c.train.save_minutes = 15.0
    c.mesh.data = 1
    c.mesh.fsdp = -1
    return c
