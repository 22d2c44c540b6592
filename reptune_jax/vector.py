"""Program: vectors between tools, and what they read: convert, info, diff, merge, plot, lens, read.

    python -m reptune_jax.vector convert IN OUT [--layers=1-] [--scale=2] [--model=NAME]
    python -m reptune_jax.vector info FILE
    python -m reptune_jax.vector diff A B
    python -m reptune_jax.vector merge A B [C …] OUT --weights=1,-0.5
    python -m reptune_jax.vector plot FILE [MORE …] OUT.png
    python -m reptune_jax.vector lens FILE --model=NAME [--top=8] [--layers=10-20]
    python -m reptune_jax.vector read FILE OUT.html --model=NAME --text="…" [--layers=10-20]

A file's ending says its format: .safetensors (ours, all there is to know), .gguf (control vectors
of llama.cpp and repeng), .svec, .pt (lm-eval; read also: a tensor of one layer or of all), .npz (a
tensor a layer; with --format=layers .safetensors is that too). Layer l is the output of 0-based
block l. OUT is a new file.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import flags

from reptune_jax import command_line, ending, lm, program
from reptune_jax.console import say
from reptune_jax.hub import digest
from reptune_jax.hub import source as sources
from reptune_jax.hub import text as texts_of
from reptune_jax.hub import weights as model_weights
from reptune_jax.hub.side_files import public_name
from reptune_jax.lm import Model
from reptune_jax.model import inputs
from reptune_jax.report import tokens as colored
from reptune_jax.report.style import STYLE
from reptune_jax.vectors import formats, lens
from reptune_jax.vectors.steering_vector import MADE_OF, SteeringVector

# ---------------------------------------------------------------- what the programs do


def convert(
    given: Path,
    to: Path,
    layers: str = "",
    scale: float = 1.0,
    model: str = "",
    hint: str = "",
    n_layers: int = 0,
    format: str = "",
) -> None:
    """Reads `given`, of any format, and writes `to`; see the program's description.

    Raises:
      ValueError: an ending that no format has, a vector of another model than `model`, layers that
        it does not have, or what the new format cannot say.
    """
    _check_new(to)
    chosen = formats.choose(to, format)
    about, N, D = _identity(model) if model else ({}, n_layers or None, None)
    vector = SteeringVector.load(given, N)
    if D is not None:
        vector.check_shape(N or 0, D)
        vector.check_model(about["model_sha"], model)
    about |= {"model_type": hint} if hint else {}
    vector = dataclasses.replace(vector, meta=vector.meta | about) * scale
    if chosen is formats.FORMATS["reptune"] and "n_layers" in vector.meta.get("unknown", ()):
        raise ValueError(
            f"{given}: does not say how many layers its model has, expected to know. Say "
            "--model=NAME, a folder, hub id or .gguf, or --n-layers=NUMBER."
        )
    vector = vector.at(parse_layers(layers, vector.layers)) if layers else vector
    vector.save(to, format)
    say(f"{given} -> {to} ({len(vector.layers)} layers, {chosen.about})")


def info(path: Path) -> str:
    """What a file says of its vector, and each layer's length."""
    vector = SteeringVector.load(path)
    N, D = vector.directions_NxD.shape
    lines = [f"{path}: {N} layers of width {D}, directions at {len(vector.layers)}"]
    lines += [f"digest: {vector.digest}"]
    shown = {k: v for k, v in vector.meta.items() if k not in ("agreement", "unknown")}
    lines += [f"{key}: {value}" for key, value in shown.items()]
    if unknown := vector.meta.get("unknown"):
        lines += [f"not in the file: {', '.join(unknown)}"]
    agreement = _agreement(vector)
    lines += ["", "layer     norm  /residual  agreement"]
    for l in vector.layers:
        norm = np.linalg.norm(vector.dose_NxD[l])
        share = np.nan if "residual_norm" in (unknown or ()) else norm / vector.residual_norm_N[l]
        cells = ["-" if np.isnan(x) else f"{x:.3f}" for x in (share, agreement[l])]
        lines += [f"{l:5d} {norm:8.4g} {cells[0]:>10} {cells[1]:>10}"]
    return "\n".join(lines)


def diff(a: Path, b: Path) -> str:
    """Cosine and ratio of lengths at the layers that both have, of what a dose of 1 adds."""
    one, two = load_all([a, b])
    shas = [v.meta.get("model_sha") for v in (one, two)]
    lines = [f"{path}: {v!r}" for path, v in ((a, one), (b, two))]
    if all(shas) and shas[0] != shas[1]:
        lines += [f"of different models: {shas[0]} and {shas[1]}"]
    lines += ["", "layer   cosine  norm B / norm A"]
    for l in sorted({*one.layers, *two.layers}):
        if l in one.layers and l in two.layers:
            ratio = np.linalg.norm(two.dose_NxD[l]) / np.linalg.norm(one.dose_NxD[l])
            lines += [f"{l:5d} {_cosine(one.dose_NxD[l], two.dose_NxD[l]):8.4f} {ratio:16.4g}"]
        else:
            lines += [f"{l:5d} only in {a if l in one.layers else b}"]
    return "\n".join(lines)


def merge(paths: Sequence[Path], to: Path, weights: str = "", format: str = "") -> None:
    """Writes the weighted sum of vectors of one model; of what a dose of 1 adds, if units differ.

    Raises:
      ValueError: vectors of different models, or other than one weight a file.
    """
    _check_new(to)
    formats.choose(to, format)
    try:
        scales = [float(w) for w in weights.split(",")] if weights else [1.0] * len(paths)
    except ValueError:
        scales = []
    if len(scales) != len(paths) or not np.isfinite(scales).all():
        raise ValueError(
            f"weights: got {weights!r}, expected {len(paths)} numbers. Example: --weights="
            f"{','.join(['1'] * (len(paths) - 1))},-0.5."
        )
    vectors = load_all(paths)
    if known := next((v.meta for v in vectors if v.meta.get("model_sha")), None):
        for vector in vectors:
            vector.check_model(known["model_sha"], str(known.get("model")))
    if len({v.meta.get("norm", "raw") for v in vectors}) > 1:
        vectors = [
            dataclasses.replace(v, directions_NxD=v.dose_NxD, meta=v.meta | {"norm": "raw"})
            for v in vectors
        ]
    parts = list(zip(scales, vectors, strict=True))
    # What is known of a sum is what its first part knows.
    (w, vector), *others = sorted(parts, key=lambda part: len(part[1].meta.get("unknown", ())))
    total = w * vector
    for w, vector in others:
        total = total + w * vector
    merged = [
        {"digest": v.digest, "weight": w, **{k: v.meta[k] for k in MADE_OF[:3] if k in v.meta}}
        for w, v in parts
    ]
    about = {"method": "merge", "merged": merged}
    dataclasses.replace(total, meta=total.meta | about).save(to, format)
    say(f"{' + '.join(f'{w:g} x {p}' for w, p in zip(scales, paths, strict=True))} -> {to}")


def plot(paths: Sequence[Path], to: Path) -> None:
    """Draws lengths, agreement and cosines by layer, a color for each file.

    Cosines are with the first file at the same layer; of one file, with its next layer.
    """
    import matplotlib as mpl  # a second, and only this one draws
    from matplotlib.figure import Figure

    _check_new(to)
    if to.suffix != ".png":
        raise ValueError(f"{to}: got the ending {to.suffix!r}, expected .png.")
    vectors = load_all(paths)
    with mpl.rc_context(STYLE), ending.whole(to) as scratch:
        figure = Figure(figsize=(7.4, 6.4))
        norm, agreement, cosine = figure.subplots(3, 1, sharex=True)
        for path, v in zip(paths, vectors, strict=True):
            layers = list(v.layers)
            norm.plot(layers, np.linalg.norm(v.dose_NxD[layers], axis=1), ".-", label=path.name)
            agreement.plot(layers, [_agreement(v)[l] for l in layers], ".-")
            compared = v is not vectors[0] or len(vectors) == 1
            pairs = _compared(v, vectors[0]) if compared else {}
            cosine.plot(list(pairs), list(pairs.values()), ".-")
        norm.set_ylabel("length of a dose of 1")
        norm.legend()
        agreement.set_ylabel("agreement of pairs")
        cosine.set_ylabel(
            f"cosine with\n{paths[0].name}" if len(paths) > 1 else "cosine with\nthe next layer"
        )
        cosine.set_xlabel("layer (output of 0-based block)")
        figure.savefig(scratch, format="png", dpi=160, facecolor="white")
    say(f"plot: {to}")


def tokens(path: Path, model: str, layers: str = "", top: int = 8) -> str:
    """The tokens that each layer's vector, and its opposite, raise most in the logit lens.

    Raises:
      ValueError: no model, one of another shape, or one without a tokenizer.
    """
    loaded, vector = with_model(path, model, layers)
    found = lens.top_tokens(loaded, vector, top)
    about = "v and -v through the final norm and the unembedding, largest logits first"
    lines = [f"{path} on {model}: {about}", ""]
    for l, (toward, away) in found.items():
        for sign, texts in (("+", toward), ("-", away)):
            lines += [f"{l if sign == '+' else '':>5} {sign}  {' '.join(map(repr, texts))}"]
    return "\n".join(lines)


def read(path: Path, to: Path, model: str, text: str, layers: str = "") -> None:
    """Draws how far along the vector each token of a text lies, layer by layer.

    Raises:
      ValueError: as `tokens`; no text, or an ending that is neither .html nor .png.
    """
    _check_new(to)
    if to.suffix not in (".html", ".png"):
        raise ValueError(f"{to}: got the ending {to.suffix!r}, expected .html or .png.")
    if not text:
        raise ValueError('text: got none, expected some. Example: --text="I love gardens."')
    loaded, vector = with_model(path, model, layers)
    (ids,) = inputs.token_rows([loaded.encode_prompt(text, chat=False)], loaded.arch.V)
    value_NxT = lens.project(loaded, vector, ids)
    pieces = [loaded.tokenizer.decode([i]) for i in ids]
    shown = pieces, value_NxT, vector.layers, f"{path.name} on {public_name(model)}"
    with ending.whole(to) as scratch:
        if to.suffix == ".html":
            scratch.write_text(colored.page(*shown), encoding="utf-8")
        else:
            scratch.write_bytes(colored.picture(*shown))
    say(f"read: {len(ids)} tokens at {len(vector.layers)} layers -> {to}")


# ---------------------------------------------------------------- parts


def with_model(path: Path, name: str, layers: str) -> tuple[Model, SteeringVector]:
    """A model, and a vector of its shape at some layers."""
    if not name:
        raise ValueError("model: got none, expected a folder, hub id or .gguf file: --model=NAME.")
    SteeringVector.load(path)  # what is wrong with it need not wait for the model
    model = lm.load(name)
    texts_of.need(model.tokenizer, name)
    vector = SteeringVector.load(path, model.arch.N)
    vector.check_shape(model.arch.N, model.arch.D)
    vector.note_model(model)
    return model, vector.at(parse_layers(layers, vector.layers)) if layers else vector


def parse_layers(text: str, there: Sequence[int]) -> list[int]:
    """`1-`, `10-20` or `3,7,12-15` as numbers of layers; a range means those of it that are there.

    Raises:
      ValueError: something else.
    """
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()):
            raise ValueError(
                f"layers: got {text!r}, expected numbers and ranges. Example: --layers=3,10-20."
            )
        stop = int(last) if last else max(there)
        found += [l for l in there if int(first) <= l <= stop] if dash else [int(first)]
    if not found:
        raise ValueError(f"layers: got {text!r}, expected some of {list(there)}.")
    return found


def load_all(paths: Sequence[Path]) -> list[SteeringVector]:
    """Vectors of one depth: that of the files that say it, or the deepest."""
    vectors = [SteeringVector.load(path) for path in paths]
    said = [v for v in vectors if "n_layers" not in v.meta.get("unknown", ())]
    N = max(len(v.directions_NxD) for v in said or vectors)
    silent = [v not in said for v in vectors]
    pairs = zip(paths, vectors, silent, strict=True)
    vectors = [SteeringVector.load(path, N) if again else v for path, v, again in pairs]
    for vector in vectors[1:]:
        vector.check_shape(*vectors[0].directions_NxD.shape)
    return vectors


def _identity(name: str) -> tuple[dict[str, Any], int, int]:
    """(name, type and digest of a model, its layers, its width); reads two of its weights."""
    source = sources.open_source(name)
    arch = source.arch()
    leaves = model_weights.leaves(source, arch)
    paths = "final_norm/scale", "embed/embedding"
    norm_D, table_VxD = (jnp.asarray(leaves[path].read()) for path in paths)
    sha = digest.weights_sha(arch, norm_D, table_VxD[:64])
    about = {"model": public_name(name), "model_sha": sha}
    return about | {"model_type": source.config["model_type"]}, arch.N, arch.D


def _agreement(vector: SteeringVector) -> list[float]:
    known = vector.meta.get("agreement") or []
    known = [np.nan if a is None else float(a) for a in known]
    return known + [np.nan] * (len(vector.directions_NxD) - len(known))


def _cosine(a_D: np.ndarray, b_D: np.ndarray) -> float:
    return float(a_D @ b_D / (np.linalg.norm(a_D) * np.linalg.norm(b_D)))


def _compared(vector: SteeringVector, first: SteeringVector) -> dict[int, float]:
    """Layer -> cosine with `first` there, or with the next layer where it is the vector itself."""
    step = int(vector is first)
    there = [l for l in vector.layers if l + step in first.layers]
    return {l: _cosine(vector.dose_NxD[l], first.dose_NxD[l + step]) for l in there}


def _check_new(to: Path) -> None:
    if to.exists():
        raise ValueError(f"{to}: is there already, expected a new file. Name another, or move it.")


# ---------------------------------------------------------------- the command line


def run(
    argv: Sequence[str],
    weights: str = "",
    format: str = "",
    text: str = "",
    top: int = 8,
    **options: Any,
) -> None:
    """One of the subcommands with its files; `options` are those of `convert`.

    Raises:
      ValueError: no such subcommand, or other than the files it takes.
    """
    name, *rest = argv or [""]
    paths = [Path(arg).expanduser() for arg in rest]
    model, layers = options.get("model", ""), options.get("layers", "")
    takes: dict[str, tuple[int, int, Callable[[], Any]]] = {
        "convert": (2, 2, lambda: convert(paths[0], paths[1], format=format, **options)),
        "info": (1, 1, lambda: print(info(paths[0]))),
        "diff": (2, 2, lambda: print(diff(paths[0], paths[1]))),
        "merge": (3, 99, lambda: merge(paths[:-1], paths[-1], weights, format)),
        "plot": (2, 99, lambda: plot(paths[:-1], paths[-1])),
        "lens": (1, 1, lambda: print(tokens(paths[0], model, layers, top))),
        "read": (2, 2, lambda: read(paths[0], paths[1], model, text, layers)),
    }
    if name not in takes:
        raise ValueError(f"vector: got {name!r}, expected one of {', '.join(takes)}. See --help.")
    least, most, act = takes[name]
    if not least <= len(paths) <= most:
        number = f"{least}" if least == most else f"{least} or more"
        raise ValueError(f"{name}: got {len(paths)} files, expected {number}. See --help.")
    for path in paths[: len(paths) - (name not in ("info", "diff", "lens"))]:
        if not path.is_file():
            raise ValueError(f"{path}: no such file, expected a vector. Check the name.")
    act()


def main() -> None:
    """Flags; what is to be done and its files are the arguments."""
    texts = {
        "layers": "convert, lens, read: these alone, such as 15 or 1- or 3,10-20",
        "model": "a folder, hub id or .gguf. convert: whose vector it is, checked where known",
        "text": "read: what is read, as it stands",
        "model-hint": "convert: the model's type, for a .gguf: llama, qwen2, …",
        "weights": "merge: one number a file, 1 each by default",
        "format": f"{' | '.join(formats.FORMATS)}; by default what OUT's ending stands for",
    }
    values = {name: flags.DEFINE_string(name, "", text) for name, text in texts.items()}
    scale = flags.DEFINE_float("scale", 1.0, "convert: times the directions")
    top = flags.DEFINE_integer("top", 8, "lens: tokens of either sign", lower_bound=1)
    n_layers = flags.DEFINE_integer("n-layers", 0, "convert: of the model", lower_bound=0)

    def entry(argv: list[str]) -> None:
        given: dict[str, Any] = {name: str(f.value or "") for name, f in values.items()}
        given["hint"] = given.pop("model-hint")
        given |= {"scale": float(scale.value or 0), "n_layers": int(n_layers.value or 0)}
        run(argv[1:], top=int(top.value or 8), **given)

    program.call(lambda: command_line.run(entry, __doc__, (*texts, "scale", "top", "n-layers")))


if __name__ == "__main__":
    main()
