"""What tests do to a Hugging Face folder."""

import json

from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors


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


def spaced_tokenizer(folder, tokenizer_class, **settings):
    """A tokenizer.json in Llama 2's form (a space put before the text, then pieces with byte
    fallback) beside a tokenizer_config.json that names a class; returns the `tokenizers` object.
    """
    special = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    pieces = [*"▁hielowrd[INST]/.", "▁h", "▁hi", "he", "▁w", "lo"]
    vocab = {token: i for i, token in enumerate([*special, *bytes_, *pieces])}
    merges = [("▁", "h"), ("▁h", "i"), ("h", "e"), ("▁", "w"), ("l", "o")]
    core = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    core.save(str(folder / "tokenizer.json"))
    about = {
        "tokenizer_class": tokenizer_class,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": False,
        **settings,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return core
