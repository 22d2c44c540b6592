"""Program: a model from one format to another: Hugging Face, Orbax, GGUF, a tuned run, an adapter.

    python -m reptune_jax.convert --from=SOURCE --to=FOLDER [--format=orbax|hf|adapter]
        [--dtype=bfloat16] [--scale=1.5] [--verify]

SOURCE is a Hugging Face folder or hub id, a .gguf file, an Orbax folder made by this program, or
the folder of a tuned run (runs/sentiment/dual+_s0) or of its study: its weights or LoRA merged into
the base model, or with --format=adapter its LoRA alone, for `peft`; with --scale, that many times
what tuning changed (less than 0: its opposite). One stacked tensor is in memory at a time.
"""

import math
from pathlib import Path

import jax.numpy as jnp
from absl import flags

from reptune_jax import cards, command_line, lm, program, tuned_run
from reptune_jax.console import counted, say
from reptune_jax.evals import agreement
from reptune_jax.folder import Run, Study
from reptune_jax.hub import export, orbax_io, peft, safetensors_io, side_files, stored, weights
from reptune_jax.hub import source as sources
from reptune_jax.hub.rounding import Rounding
from reptune_jax.hub.source import Source
from reptune_jax.model.arch import Arch
from reptune_jax.tuned_run import TunedRun

FORMATS = ("orbax", "hf", "adapter")
DTYPES = ("float32", "bfloat16", "float16")


def run(
    given: str,
    to: str,
    format: str = "",
    dtype: str = "",
    verify: bool = False,
    base: str = "",
    scale: float = 1.0,
) -> Path:
    """Converts `given` into the new folder `to`; see the program's description.

    Raises:
      ValueError: an unknown source or format, or a pair of them that cannot be.
    """
    tuned = find_run(Path(given).expanduser())
    format = choose_format(format, given, tuned)
    if base and tuned is None:
        raise ValueError(f"base: got {base!r} for {given}, which is no tuned run. Leave it out.")
    if scale != 1 and tuned is None:
        raise ValueError(f"scale: got {scale:g} for {given}, which is no tuned run. Leave it out.")
    if not math.isfinite(scale):
        raise ValueError(f"scale: got {scale}, expected a finite number.")
    tuned = tuned and tuned.scaled(scale)
    name = base or (tuned.meta["model"] if tuned else given)
    if tuned is not None and format == "adapter":
        source = sources.open_source(name)
        arch = source.arch()
        tuned.check_leaves(name, arch, weights.leaves(source, arch))
        write_adapter(Path(to), tuned, arch, name)
    else:
        write_model(Path(to), sources.open_source(name), tuned, format, dtype)
    say(f"{given} -> {to} ({format})")
    if verify:
        check(given, Path(to), format, tuned, name, dtype)
    return Path(to)


def find_run(folder: Path) -> TunedRun | None:
    """The tuned run in a folder, of a study the exported one; None where it is something else.

    Raises:
      ValueError: the study has several runs, and none that is meant without saying so.
    """
    if Run(folder).checkpoints.is_dir():
        return tuned_run.load(folder)
    study = Study(folder)
    runs, chosen = study.runs(), study.chosen()
    if not runs:
        return None
    if chosen is None:
        raise ValueError(
            f"{folder}: is the folder of a study, expected that of one run. Name one of "
            f"{', '.join(str(run.path) for run in runs)}."
        )
    others = ", ".join(run.path.name for run in runs if run != chosen) or "no other"
    say(f"{folder}: a study; taking {chosen.path.name} (there is {others})")
    return tuned_run.load(chosen.path)


def choose_format(format: str, given: str, tuned: TunedRun | None) -> str:
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
    if format == "adapter" and not (tuned and tuned.lora):
        what = "which trained whole weights" if tuned else "which is no tuned run"
        raise ValueError(
            f"format: got 'adapter' for {given}, {what}, expected a run with train.lora.rank > 0. "
            "Use --format=hf."
        )
    return format


# ---------------------------------------------------------------- writing


def write_adapter(to: Path, tuned: TunedRun, arch: Arch, base: str) -> None:
    """A LoRA run as a PEFT folder."""
    about = {**(tuned.lora or {}), "layers": tuned.meta["layers"]}
    identity = side_files.public_name(base), tuned.meta["model_sha"]
    card = cards.adapter_card(base, tuned)
    peft.save_adapter(to, arch, tuned.trained, about, identity, card)


def write_model(to: Path, source: Source, tuned: TunedRun | None, format: str, dtype: str) -> None:
    """A whole model, leaf by leaf."""
    if dtype and dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, expected one of {', '.join(DTYPES)}.")
    arch = source.arch()
    leaves = weights.leaves(source, arch, None if tuned else dtype or None)
    if tuned is not None:
        tuned.check_leaves(source.name, arch, leaves)
        rounding = Rounding(dtype or leaves["embed/embedding"].dtype)
        leaves = tuned.over_leaves(leaves, dtype or None, rounding)
    total = sum(leaf.nbytes for leaf in leaves.values())
    with (
        export.all_or_nothing(to) as scratch,
        counted(total, "converting", unit="B", unit_scale=True) as bar,
    ):
        spelling = weights.spelling(source, arch)
        if format == "orbax":
            orbax_io.write_leaves(scratch, leaves, spelling, bar.update)
        else:
            specs = weights.hf_specs(leaves, arch.family, spelling)
            tensors = specs, weights.to_hf(leaves, arch.family, spelling)
            safetensors_io.stream_tensors(scratch, *tensors, bar.update)
        if tuned is not None:
            rounding.report(tuned.folder)
            (scratch / "README.md").write_text(cards.merged_card(tuned), encoding="utf-8")
        # Last, so that a folder that was left half made is not taken for a model.
        made = source.folder is None
        largest = max(leaves.values(), key=lambda leaf: leaf.nbytes)
        side_files.write(
            scratch,
            source.folder,
            source.config,
            largest.dtype.name if made or dtype else "",
            source.tokenizer,
            {"eos_token_id": list(source.eos_ids) or None},
        )


# ---------------------------------------------------------------- verifying


def check(
    given: str, to: Path, format: str, tuned: TunedRun | None, base: str, dtype: str = ""
) -> None:
    """Compares what is stored, byte for byte, and prints how far the predictions lie apart.

    Raises:
      SystemExit: another byte or key of the config than was asked for, or predictions beyond the
        tolerance of the type that the weights were stored in.
    """
    if format != "adapter":
        source = sources.open_source(base)
        changed = tuned.tensor_names(source.arch().family) if tuned else ()
        if wrong := stored.differences(source, to, dtype, changed):
            for line in wrong[:10]:
                say(f"verify: {line}")
            say(
                f"verify: FAILED. {to} does not hold what {base} stores ({len(wrong)} differences)."
            )
            raise SystemExit(1)
    before = lm.load(base)
    if tuned is not None:
        before = tuned.over(before)
    batches = agreement.batches(before)
    want = agreement.logits(before, batches)
    del before
    after = lm.load_adapter(lm.load(base), to) if format == "adapter" else lm.load(str(to))
    found = agreement.compare(want, agreement.logits(after, batches))
    allowed = agreement.ALLOWED[stored_dtype(to, format)]
    say(f"verify: {found} (allowed: {allowed})")
    if not found.within(allowed):
        say(f"verify: FAILED. {to} does not predict as {given} does.")
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
    names = {
        "from": "Hugging Face folder or hub id, .gguf file, Orbax folder, or a tuned run's folder",
        "to": "a new folder",
        "format": f"{' | '.join(FORMATS)}; by default orbax from Hugging Face, hf from others",
        "dtype": f"{' | '.join(DTYPES)}; by default as stored (.gguf: as dequantized, float32)",
        "base": "for a tuned run: its base model, if it is no longer where it was",
    }
    values = {name: flags.DEFINE_string(name, None, text) for name, text in names.items()}
    text = "compare the bytes and the predictions of source and result"
    verify = flags.DEFINE_bool("verify", False, text)
    scale = flags.DEFINE_float("scale", 1.0, "for a tuned run: times what tuning changed")
    flags.mark_flags_as_required(["from", "to"])

    def entry(argv: list[str]) -> None:
        if len(argv) > 1:
            raise ValueError(f"unexpected argument {argv[1]!r}; see --help.")
        program.start()
        v = {name: value.value or "" for name, value in values.items()}
        run(
            v["from"],
            v["to"],
            v["format"],
            v["dtype"],
            bool(verify.value),
            v["base"],
            float(scale.value or 0),
        )

    program.call(lambda: command_line.run(entry, __doc__, (*names, "verify", "scale")))


if __name__ == "__main__":
    main()
