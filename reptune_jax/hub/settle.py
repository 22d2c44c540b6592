"""Where the parts of one model disagree, or leave something out: as transformers has it, and said.

The config's own disagreements are `model.families`'; here is what only the weights can tell.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from reptune_jax.console import note
from reptune_jax.hub.names import HEADS, prefix_and_embedding, table
from reptune_jax.hub.safetensors_io import TensorHandle
from reptune_jax.model import families
from reptune_jax.model.rope import rope_frequencies


def check_layers(
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorHandle],
    leaves: Mapping[str, TensorHandle] | None = None,
) -> None:
    """That weights may have as many layers as the config says, before anything is made for each.

    A layer has a tensor at least, or its part of a stack of all of them.

    Raises:
      ValueError: it cannot. What exactly is missing is said later, by name.
    """
    stacks = [leaf.shape for path, leaf in (leaves or {}).items() if path.startswith("blocks/")]
    most = max((len(tensors), *(shape[0] for shape in stacks if shape)))
    if (N := families.depth(config) or 0) > most:
        what = f"stacks of {most} layers" if leaves else f"{most} tensors"
        raise ValueError(
            f"num_hidden_layers: got {N:,}, expected as many as there are weights for: there are "
            f"{what}. Check that config.json belongs to these weights."
        )


def settled(
    name: str, config: dict[str, Any], tensors: Mapping[str, TensorHandle]
) -> tuple[dict[str, Any], Mapping[str, TensorHandle]]:
    """(config, tensors) with one meaning; each decision is printed once.

    A config that says "tied" over an output embedding that differs is wrong: the stored one counts,
    as in transformers 5, and `tie_word_embeddings` becomes false. Where only the output embedding
    is stored, it is both.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in families.FAMILIES:
        return config, tensors  # refused later, by name
    for line in families.notes(config):
        note(f"{name}: {line}")
    _say_stored_rope(name, config, tensors)
    prefix, embed = prefix_and_embedding(table(family))
    embed = next((n for n in (prefix + embed, embed) if n in tensors), prefix + embed)
    heads = [head for head in HEADS if head in tensors]
    if not heads or not families.is_tied(config):
        return config, tensors
    if embed not in tensors:
        note(
            f"{name}: config.json ties the embeddings and of the two {heads[0]} alone is stored; "
            f"reading it as {embed} too."
        )
        return config, {**tensors, embed: tensors[heads[0]]}
    if all(_same(tensors[head], tensors[embed]) for head in heads):
        return config, tensors
    note(
        f"{name}: config.json says tie_word_embeddings, but {heads[0]} and {embed} are stored and "
        "differ; reading both, as transformers does. Exports say tie_word_embeddings = false."
    )
    return {**config, "tie_word_embeddings": False}, tensors


def _say_stored_rope(
    name: str, config: Mapping[str, Any], tensors: Mapping[str, TensorHandle]
) -> None:
    """Says where the frequencies that old checkpoints store are not those of the config.

    Transformers passes over them, so we do; a config that lacks its base is found by this.
    """
    buffer = next((n for n in tensors if n.endswith("rotary_emb.inv_freq")), None)
    try:
        arch = families.from_config(config)
    except ValueError:  # refused later, by name
        return
    if buffer is None or arch.rope is None:
        return
    stored = tensors[buffer].read().astype(np.float32)
    want = rope_frequencies(arch.rope, arch.Dh)
    if stored.shape == want.shape and np.allclose(stored, want, rtol=0.02):
        return
    note(
        f"{name}: {buffer} is not what config.json makes with rope_theta {arch.rope.theta:g} "
        f"({arch.rope.kind}); reading config.json, as transformers does."
    )


def _same(a: TensorHandle, b: TensorHandle) -> bool:
    """In value: one may be stored more coarsely than it needs."""
    if a.shape != b.shape or a.dtype == b.dtype:  # the usual case, without copies
        return a.shape == b.shape and bool(np.array_equal(a.read(), b.read()))
    return bool(np.array_equal(a.read().astype(np.float32), b.read().astype(np.float32)))
