"""Where each of our leaves is in a Hugging Face checkpoint: one table, used in both directions.

A row names a tensor; rows that name the same one are its parts, in the table's order. A leaf that
a family does not have is not looked up, so that families share rows.
"""

from collections.abc import Collection
from typing import NamedTuple


class HFName(NamedTuple):
    """Where a leaf of ours is in a checkpoint."""

    hf: str  # name in the checkpoint, {l} is the layer
    inputs: int = 0  # leading axes of our leaf that are inputs; 0 = stored as it is
    by_head: bool = False  # parts of one tensor alternate head by head; else they follow on
    conv1d: bool = False  # stored [in, out] (GPT-2's Conv1D); else [out, in]


class Spelling(NamedTuple):
    """Where a checkpoint departs from the table; kept, so that it goes out as it came in."""

    bare: bool = False  # names lack the model's prefix: "h.0…" for "transformer.h.0…"
    head: str = ""  # its name for the output embedding, if it has one (a tied one: a copy)


AS_TABLED = Spelling()
Table = dict[str, HFName]  # our path within a layer (or at the top) -> HFName

_L = "model.layers.{l}."

# llama, and all that name their weights as it does
TABLE: Table = {
    "embed/embedding": HFName("model.embed_tokens.weight"),  # [V, D]
    "head/embedding": HFName("lm_head.weight"),  # [V, D]
    "final_norm/scale": HFName("model.norm.weight"),  # [D]
    "blocks/attn_norm/scale": HFName(_L + "input_layernorm.weight"),
    "blocks/mlp_norm/scale": HFName(_L + "post_attention_layernorm.weight"),
    "blocks/attn/q/kernel": HFName(_L + "self_attn.q_proj.weight", 1),  # [D, H, Dh]
    "blocks/attn/k/kernel": HFName(_L + "self_attn.k_proj.weight", 1),  # [D, K, Dh]
    "blocks/attn/v/kernel": HFName(_L + "self_attn.v_proj.weight", 1),  # [D, K, Dh]
    "blocks/attn/o/kernel": HFName(_L + "self_attn.o_proj.weight", 2),  # [H, Dh, D]
    "blocks/attn/q_norm/scale": HFName(_L + "self_attn.q_norm.weight"),  # [Dh] or [H*Dh]
    "blocks/attn/k_norm/scale": HFName(_L + "self_attn.k_norm.weight"),  # [Dh] or [K*Dh]
    "blocks/mlp/gate/kernel": HFName(_L + "mlp.gate_proj.weight", 1),  # [D, F]
    "blocks/mlp/up/kernel": HFName(_L + "mlp.up_proj.weight", 1),  # [D, F]
    "blocks/mlp/down/kernel": HFName(_L + "mlp.down_proj.weight", 1),  # [F, D]
    "blocks/attn/q/bias": HFName(_L + "self_attn.q_proj.bias"),  # [H, Dh]
    "blocks/attn/k/bias": HFName(_L + "self_attn.k_proj.bias"),
    "blocks/attn/v/bias": HFName(_L + "self_attn.v_proj.bias"),
    "blocks/attn/o/bias": HFName(_L + "self_attn.o_proj.bias"),  # [D]
    "blocks/mlp/gate/bias": HFName(_L + "mlp.gate_proj.bias"),
    "blocks/mlp/up/bias": HFName(_L + "mlp.up_proj.bias"),
    "blocks/mlp/down/bias": HFName(_L + "mlp.down_proj.bias"),
}

# norms on what attention and MLP write: gemma2, gemma3, olmo2
_POST: Table = {
    **TABLE,
    "blocks/attn_post_norm/scale": HFName(_L + "post_attention_layernorm.weight"),
    "blocks/mlp_norm/scale": HFName(_L + "pre_feedforward_layernorm.weight"),
    "blocks/mlp_post_norm/scale": HFName(_L + "post_feedforward_layernorm.weight"),
}

_PHI3: Table = {
    **TABLE,
    **{f"blocks/attn/{n}/kernel": HFName(_L + "self_attn.qkv_proj.weight", 1) for n in "qkv"},
    **{f"blocks/mlp/{n}/kernel": HFName(_L + "mlp.gate_up_proj.weight", 1) for n in ("gate", "up")},
}

_G = "transformer.h.{l}."
_GPT2: Table = {
    "embed/embedding": HFName("transformer.wte.weight"),
    "positions/embedding": HFName("transformer.wpe.weight"),  # [positions, D]
    "head/embedding": HFName("lm_head.weight"),
    "final_norm/scale": HFName("transformer.ln_f.weight"),
    "final_norm/bias": HFName("transformer.ln_f.bias"),
    "blocks/attn_norm/scale": HFName(_G + "ln_1.weight"),
    "blocks/attn_norm/bias": HFName(_G + "ln_1.bias"),
    "blocks/mlp_norm/scale": HFName(_G + "ln_2.weight"),
    "blocks/mlp_norm/bias": HFName(_G + "ln_2.bias"),
    **{f"blocks/attn/{n}/kernel": HFName(_G + "attn.c_attn.weight", 1, conv1d=True) for n in "qkv"},
    **{f"blocks/attn/{n}/bias": HFName(_G + "attn.c_attn.bias") for n in "qkv"},
    "blocks/attn/o/kernel": HFName(_G + "attn.c_proj.weight", 2, conv1d=True),
    "blocks/attn/o/bias": HFName(_G + "attn.c_proj.bias"),
    "blocks/mlp/up/kernel": HFName(_G + "mlp.c_fc.weight", 1, conv1d=True),
    "blocks/mlp/up/bias": HFName(_G + "mlp.c_fc.bias"),
    "blocks/mlp/down/kernel": HFName(_G + "mlp.c_proj.weight", 1, conv1d=True),
    "blocks/mlp/down/bias": HFName(_G + "mlp.c_proj.bias"),
}

_X = "gpt_neox.layers.{l}."
_QKV = _X + "attention.query_key_value."
_GPT_NEOX: Table = {
    "embed/embedding": HFName("gpt_neox.embed_in.weight"),
    "head/embedding": HFName("embed_out.weight"),
    "final_norm/scale": HFName("gpt_neox.final_layer_norm.weight"),
    "final_norm/bias": HFName("gpt_neox.final_layer_norm.bias"),
    "blocks/attn_norm/scale": HFName(_X + "input_layernorm.weight"),
    "blocks/attn_norm/bias": HFName(_X + "input_layernorm.bias"),
    "blocks/mlp_norm/scale": HFName(_X + "post_attention_layernorm.weight"),
    "blocks/mlp_norm/bias": HFName(_X + "post_attention_layernorm.bias"),
    **{f"blocks/attn/{n}/kernel": HFName(_QKV + "weight", 1, by_head=True) for n in "qkv"},
    **{f"blocks/attn/{n}/bias": HFName(_QKV + "bias", by_head=True) for n in "qkv"},
    "blocks/attn/o/kernel": HFName(_X + "attention.dense.weight", 2),
    "blocks/attn/o/bias": HFName(_X + "attention.dense.bias"),
    "blocks/mlp/up/kernel": HFName(_X + "mlp.dense_h_to_4h.weight", 1),
    "blocks/mlp/up/bias": HFName(_X + "mlp.dense_h_to_4h.bias"),
    "blocks/mlp/down/kernel": HFName(_X + "mlp.dense_4h_to_h.weight", 1),
    "blocks/mlp/down/bias": HFName(_X + "mlp.dense_4h_to_h.bias"),
}

_OTHERS = {
    "gemma2": _POST,
    "gemma3_text": _POST,
    "olmo2": _POST,
    "phi3": _PHI3,
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
}


HEADS = ("lm_head.weight", "embed_out.weight")  # GPT-NeoX's output embedding has either name


def table(family: str) -> Table:
    """The names of a family's weights."""
    return _OTHERS.get(family, TABLE)


# What wrappers of a model put before or within the names of its tensors -> whose it is, what to do.
_MERGE = "PEFT's. Merge the adapter first (merge_and_unload, then save_pretrained)"
_WRAPPERS = {
    "base_model.model.": _MERGE,
    ".base_layer": _MERGE,
    "_fsdp_wrapped_module.": "FSDP's. Save the model's full state dict",
    "_checkpoint_wrapped_module.": "checkpointing's. Save the module inside",
    "_orig_mod.": "torch.compile's. Save the module inside (model._orig_mod)",
    "language_model.": "of a model that also reads images. Save its language model alone",
    "module.": "DataParallel's. Save the module inside (model.module)",
}


def wrapper(found: Collection[str], expected: Collection[str]) -> str:
    """What every name of a checkpoint has too much, in one line; "" where that is not it."""
    bodies = set(expected) - set(HEADS)
    bodies |= {name.partition(".")[2] for name in bodies}  # and without the model's own prefix
    firsts = {name.partition(".")[0] for name in found}
    common = [f"{firsts.pop()}."] if len(firsts) == 1 else []
    for part in (*_WRAPPERS, *common):
        having = [name for name in found if part in name]
        if not having:
            continue
        begin = f"{len(having)} of {len(found)} tensors have {part!r} in their names, such as "
        begin += f"{min(having)}: "
        if _WRAPPERS.get(part) == _MERGE:
            return begin + _MERGE
        if bodies & {name.replace(part, "") for name in having} and not bodies & set(found):
            whose = _WRAPPERS.get(part, "a wrapper's. Save the model inside")
            return f"{begin}{whose}, or take it out of the names"
    return ""


def prefix_and_embedding(names: Table) -> tuple[str, str]:
    """("transformer.", "wte.weight"): the prefix that bare checkpoints lack, the embedding."""
    prefix, _, embed = names["embed/embedding"].hf.partition(".")
    return f"{prefix}.", embed
