"""Program: a model from one format to another: Hugging Face, Orbax, GGUF, a tuned run, an adapter.

    python -m reptune_jax.convert --from=SOURCE --to=FOLDER [--format=orbax|hf|adapter]
        [--dtype=bfloat16] [--verify]

SOURCE is a Hugging Face folder or hub id, a .gguf file, an Orbax folder made by this program, or
the folder of a tuned run (runs/sentiment/dual+_s0): its weights or LoRA merged into the base model,
or with --format=adapter its LoRA alone, for `peft`. One stacked tensor is in memory at a time.
"""

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from absl import app, flags
from tqdm import tqdm

from reptune_jax import lm, program
from reptune_jax.evals import agreement, arms
from reptune_jax.hub import export, orbax_io, peft, safetensors_io, weights
from reptune_jax.hub import source as sources
from reptune_jax.hub.safetensors_io import TensorHandle
from reptune_jax.hub.source import Source
from reptune_jax.model import families
from reptune_jax.model.arch import Arch
from reptune_jax.tuning import adapters, checkpoint

FORMATS = ("orbax", "hf", "adapter")
DTYPES = ("float32", "bfloat16", "float16")
# What goes with the weights, copied as it is. Code never does.
_FILES = ["config.json", "generation_config.json", "*token*", "vocab.*", "merges.txt"]
_FILES += ["chat_template*", "added_tokens.json", "LICENSE*", "*.model"]


class Run(NamedTuple):
    """A tuned run: what it trained, and of which base."""

    folder: Path
    trained: dict[str, Any]
    meta: dict[str, Any]


def run(
    given: str, to: str, format: str = "", dtype: str = "", verify: bool = False, base: str = ""
) -> Path:
    """Converts `given` into the new folder `to`; see the program's description.

    Raises:
      ValueError: an unknown source or format, or a pair of them that cannot be.
    """
    tuned = find_run(Path(given).expanduser())
    format = choose_format(format, given, tuned)
    if base and tuned is None:
        raise ValueError(f"base: got {base!r} for {given}, which is no tuned run. Leave it out.")
    name = base or (tuned.meta["model"] if tuned else given)
    if tuned is not None and format == "adapter":
        source = sources.open_source(name)
        arch = families.from_config(source.config)
        check_base(tuned, source, arch, weights.leaves(source, arch))
        write_adapter(Path(to), tuned, arch, name)
    else:
        write_model(Path(to), sources.open_source(name), tuned, format, dtype)
    program.say(f"{given} -> {to} ({format})")
    if verify:
        check(given, Path(to), format, tuned, name)
    return Path(to)


def find_run(folder: Path) -> Run | None:
    """The tuned run in a folder; None where the source is something else.

    Raises:
      ValueError: the folder is a whole study's.
    """
    if (folder / "checkpoints").is_dir():
        return read_run(folder)
    if runs := sorted(path.parent.name for path in folder.glob("*/checkpoints")):
        raise ValueError(
            f"{folder}: is the folder of a study, expected that of one run. Name one of "
            f"{', '.join(str(folder / name) for name in runs)}."
        )
    return None


def read_run(folder: Path) -> Run:
    """The best checkpoint of a run."""
    trained, meta, _ = checkpoint.load_best(folder)
    return Run(folder, trained, meta)


def choose_format(format: str, given: str, tuned: Run | None) -> str:
    """The format asked for, or the likely one: Orbax from Hugging Face, Hugging Face from others.

    Raises:
      ValueError: not a format, or an adapter of what has none.
    """
    path = Path(given).expanduser()
    if not format:
        others = tuned or path.suffix == ".gguf" or orbax_io.is_model(path)
        return "hf" if others else "orbax"
    if format not in FORMATS:
        raise ValueError(f"format: got {format!r}, expected one of {', '.join(FORMATS)}.")
    if format == "adapter" and not (tuned and tuned.meta.get("lora")):
        what = "which trained whole weights" if tuned else "which is no tuned run"
        raise ValueError(
            f"format: got 'adapter' for {given}, {what}, expected a run with train.lora.rank > 0. "
            "Use --format=hf."
        )
    return format


# ---------------------------------------------------------------- writing


def write_adapter(to: Path, tuned: Run, arch: Arch, base: str) -> None:
    """A LoRA run as a PEFT folder."""
    about = {**tuned.meta["lora"], "layers": tuned.meta["layers"]}
    identity, card = (public_name(base), tuned.meta["model_sha"]), adapter_card(base, tuned)
    peft.save_adapter(to, arch, tuned.trained, about, identity, card)


def write_model(to: Path, source: Source, tuned: Run | None, format: str, dtype: str) -> None:
    """A whole model, leaf by leaf."""
    if dtype and dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, expected one of {', '.join(DTYPES)}.")
    arch = families.from_config(source.config)
    leaves = weights.leaves(source, arch, dtype or None)
    if tuned is not None:
        check_base(tuned, source, arch, leaves)
        leaves = overlaid(leaves, tuned)
    total = sum(leaf.nbytes for leaf in leaves.values())
    with (
        export.all_or_nothing(to) as scratch,
        tqdm(total=total, desc="converting", unit="B", unit_scale=True, delay=2) as bar,
    ):
        spelling = weights.spelling(source, arch)
        if format == "orbax":
            orbax_io.write_leaves(scratch, leaves, spelling, bar.update)
        else:
            specs = weights.hf_specs(leaves, arch.family, spelling)
            tensors = specs, weights.to_hf(leaves, arch.family, spelling)
            safetensors_io.stream_tensors(scratch, *tensors, bar.update)
        if tuned is not None:
            (scratch / "README.md").write_text(merged_card(tuned), encoding="utf-8")
        # Last, so that a folder that was left half made is not taken for a model.
        write_files(scratch, source, dtype)


def overlaid(leaves: Mapping[str, TensorHandle], tuned: Run) -> dict[str, TensorHandle]:
    """The base's leaves with a run's weights, or its adapters, put in layer by layer as read."""
    trained, meta = tuned.trained, tuned.meta
    first, stop = meta["layers"]

    def layer(path: str, i: int, base: np.ndarray) -> np.ndarray:
        if not meta.get("lora"):
            return np.asarray(trained[path][i])
        change = adapters.change(trained, meta, path, slice(i, i + 1))
        return base.astype(np.float32) + np.asarray(change[0])

    def put(leaf: TensorHandle, path: str) -> TensorHandle:
        def read() -> np.ndarray:
            out = leaf.read()
            for l in range(first, stop):
                out[l] = layer(path, l - first, out[l]).astype(out.dtype)
            return out

        return TensorHandle(leaf.shape, leaf.dtype, read)

    changed = {f"blocks/{path}": path for path in adapters.kernels(meta) or trained}
    return {p: put(leaf, changed[p]) if p in changed else leaf for p, leaf in leaves.items()}


def check_base(tuned: Run, source: Source, arch: Arch, leaves: Mapping[str, TensorHandle]) -> None:
    """Raises ValueError where the run was tuned from other weights."""
    table_64xD = leaves["embed/embedding"].read()[:64].copy()  # a view would keep the whole
    sha = lm.weights_sha(arch, leaves["final_norm/scale"].read(), table_64xD)
    if sha != tuned.meta["model_sha"]:
        raise ValueError(
            f"{tuned.folder}: tuned from {tuned.meta['model']} ({tuned.meta['model_sha']}), got "
            f"base {source.name} ({sha}), expected the same. Name it with --base."
        )


def write_files(folder: Path, source: Source, dtype: str) -> None:
    """Config, tokenizer and generation settings: copied, or made where the source is one file."""
    if source.folder is not None:
        found = {path for pattern in _FILES for path in source.folder.glob(pattern)}
        for path in sorted(p for p in found if p.is_file() and p.suffix != ".py"):
            shutil.copyfile(path, folder / path.name)
        if dtype:
            config = {k: v for k, v in source.config.items() if k != "torch_dtype"}
            export.write_json(folder / "config.json", {**config, "dtype": dtype})
        return
    if source.tokenizer is not None:
        source.tokenizer.save_pretrained(folder)
    ends = {"eos_token_id": list(source.eos_ids) or None}
    export.write_json(folder / "generation_config.json", ends)
    stored = dtype or max(source.tensors.values(), key=lambda leaf: leaf.nbytes).dtype.name
    export.write_json(folder / "config.json", {**source.config, "dtype": stored})


# ---------------------------------------------------------------- words


def public_name(name: str) -> str:
    """A local path means nothing to who downloads a model, and says where it was made."""
    return Path(name).name if Path(name).exists() else name


def trained_what(meta: Mapping[str, Any]) -> str:
    """What a run trained, in words."""
    first, stop = meta["layers"]
    if settings := meta.get("lora"):
        kind = f"LoRA of rank {settings['rank']} and alpha {settings['alpha']:g} on "
        return f"{kind}{', '.join(settings['targets'])} of layers {first} to {stop - 1}"
    return f"{', '.join(meta['config']['train']['modules'])} of layers {first} to {stop - 1}"


def merged_card(tuned: Run) -> str:
    """README.md of a merged run; a study's export says more."""
    c, base = tuned.meta["config"], public_name(tuned.meta["model"])
    title = f"{base.rsplit('/', 1)[-1]}, {Path(c['behavior']).stem} {c['arm']} {c['sign']:+d}"
    return (
        f"---\nbase_model: {base}\nlibrary_name: transformers\n"
        f"tags: [representation-tuning]\n---\n# {title}\n\n`{base}` with representation tuning "
        f"(arXiv 2409.06927), merged: {trained_what(tuned.meta)}. Made with reptune_jax.\n"
    )


def adapter_card(base: str, tuned: Run) -> str:
    """README.md of an adapter folder."""
    c, base = tuned.meta["config"], public_name(base)
    title = f"{base.rsplit('/', 1)[-1]}, {Path(c['behavior']).stem} {c['arm']} {c['sign']:+d}"
    return (
        f"---\nbase_model: {base}\nlibrary_name: peft\ntags: [representation-tuning, lora]\n---\n"
        f"# {title}, adapter\n\nFor `{base}`: {trained_what(tuned.meta)}. Made with reptune_jax.\n"
        '\n```python\nfrom peft import PeftModel\nmodel = PeftModel.from_pretrained(base, "this")\n'
        "```\n"
    )


# ---------------------------------------------------------------- verifying


def check(given: str, to: Path, format: str, tuned: Run | None, base: str) -> None:
    """Prints how far the two models' predictions lie apart.

    Raises:
      SystemExit: beyond the tolerance of the type that the weights were stored in.
    """
    before = lm.load(base)
    if tuned is not None:
        before = arms.tuned(before, tuned.folder).model
    batches = agreement.batches(before)
    want = agreement.logits(before, batches)
    del before
    after = lm.load_adapter(lm.load(base), to) if format == "adapter" else lm.load(str(to))
    found = agreement.compare(want, agreement.logits(after, batches))
    allowed = agreement.tolerance(stored_dtype(to, format))
    program.say(f"verify: {found} (allowed: {allowed})")
    if not found.within(allowed):
        program.say(f"verify: FAILED. {to} does not predict as {given} does.")
        raise SystemExit(1)


def stored_dtype(to: Path, format: str) -> str:
    """The coarsest type that weights were written in."""
    if format == "adapter":
        return "float32"
    source = sources.open_source(str(to))
    handles = source.leaves or source.tensors
    return min((jnp.finfo(h.dtype).nmant, h.dtype.name) for h in handles.values())[1]


def main() -> None:
    """Flags; the user's mistakes are printed, not traced."""
    sys.modules["__main__"].__doc__ = __doc__
    names = {
        "from": "Hugging Face folder or hub id, .gguf file, Orbax folder, or a tuned run's folder",
        "to": "a new folder",
        "format": f"{' | '.join(FORMATS)}; by default orbax from Hugging Face, hf from others",
        "dtype": f"{' | '.join(DTYPES)}; by default as stored (.gguf: as dequantized, float32)",
        "base": "for a tuned run: its base model, if it is no longer where it was",
    }
    values = {name: flags.DEFINE_string(name, None, text) for name, text in names.items()}
    verify = flags.DEFINE_bool("verify", False, "compare the predictions of source and result")
    flags.mark_flags_as_required(["from", "to"])
    for name in (*names, "verify"):  # so that --help shows them
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])

    def entry(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected argument {argv[1]!r}; see --help.")
        program.start()
        v = {name: value.value or "" for name, value in values.items()}
        run(v["from"], v["to"], v["format"], v["dtype"], bool(verify.value), v["base"])

    program.call(lambda: app.run(entry))


if __name__ == "__main__":
    main()
