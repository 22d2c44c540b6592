"""Program: what every layer of a vector moves at every dose, on a behavior's validation prompts.

    python -m reptune_jax.sweep FILE --model=NAME --behavior=NAME [--to=OUT.png] [--doses=-1,0,1]

Prints for each layer the slope of the log-odds of a prompt's two answers over doses, with its 95 %
interval over clusters, the share of prompts that move the wrong way (arXiv 2407.12404), and what
becomes of both answers together: where they are much less likely, something else is said. OUT.png
is a new file, for the heat map, the steepest layer's doses and its prompts. --keep=FILE.safetensors
keeps what is done, and the same command goes on from there. Needs no study, and looks at no test
prompts. `reptune select` chooses how to steer within a KL budget, which this does
not look at.
"""

from pathlib import Path
from typing import Any

from absl import flags

from reptune_jax import command_line, ending, program
from reptune_jax.console import say
from reptune_jax.data import behavior as behaviors
from reptune_jax.hub.side_files import public_name
from reptune_jax.report import responses
from reptune_jax.vector import with_model
from reptune_jax.vectors import sweep as sweeps
from reptune_jax.vectors.sweep import Sweep


def run(
    path: Path,
    model: str,
    behavior: str,
    to: str = "",
    layers: str = "",
    doses: str = "",
    prompts: int = 0,
    **how: Any,
) -> Sweep:
    """Prints the table, and draws `to` if it is named; `how` are arguments of `rt.sweep`.

    Raises:
      ValueError: no behavior, or one without open prompts in `val`; a picture that is there, or
        is no .png; doses that are no numbers; or as `rt.sweep` and `vector.with_model`.
    """
    if not behavior:
        raise ValueError("behavior: got none, expected a name or a file: --behavior=sentiment.")
    items = behaviors.load(behavior).select("val", "free")[: prompts or None]
    if not items:
        raise ValueError(
            f"behavior {behavior}: has no open prompts in split 'val', expected some, each with an "
            "answer that shows the behavior and one that opposes it."
        )
    if to and (Path(to).suffix != ".png" or Path(to).exists()):
        raise ValueError(f"to: got {to!r}, expected a new file, ending in .png.")
    try:
        asked_doses = [float(dose) for dose in doses.split(",")] if doses else sweeps.DOSES
    except ValueError:
        raise ValueError(
            f"doses: got {doses!r}, expected numbers. Example: --doses=-2,-1,0,1,2"
        ) from None
    loaded, vector = with_model(path, model, layers)
    asked = [(list(item.messages), item.pos, item.neg) for item in items]
    swept = sweeps.sweep(loaded, vector, asked, asked_doses, **how)
    clusters = [item.cluster for item in items]
    print("\n".join(responses.table(swept, clusters)), flush=True)
    many = f"{len(items)} prompts, {len(swept.layers)} layers, {len(swept.doses)} doses"
    say(f"sweep: {many}; * is the steepest layer")
    if to:
        title = f"{path.name} on {public_name(model)}"
        with ending.whole(Path(to)) as scratch:
            scratch.write_bytes(responses.picture(swept, clusters, title))
        say(f"sweep: {to}")
    return swept


def main() -> None:
    """Flags; the vector's file is the argument."""
    texts = {
        "model": "a folder, hub id or .gguf",
        "behavior": "a shipped behavior, a .jsonl of one's own, or another tool's data",
        "to": "a new .png",
        "layers": "these alone, such as 15 or 10-20; by default all of the vector's",
        "doses": f"by default {','.join(f'{dose:g}' for dose in sweeps.DOSES)}",
        "operation": "add by default; docs/steering.md",
        "tokens": "answer by default; docs/steering.md",
        "keep": "a .safetensors that keeps what is done, and from which the same command goes on",
    }
    values = {name: flags.DEFINE_string(name, "", text) for name, text in texts.items()}
    prompts = flags.DEFINE_integer("prompts", 0, "how many, 0 = all", lower_bound=0)

    def entry(argv: list[str]) -> None:
        given: dict[str, Any] = {name: str(f.value) for name, f in values.items() if f.value}
        if len(argv) != 2:
            raise ValueError(f"sweep: got {len(argv) - 1} files, expected 1, a vector. See --help.")
        path = Path(argv[1]).expanduser()
        if not path.is_file():
            raise ValueError(f"{path}: no such file, expected a vector. Check the name.")
        asked = {"model": "", "behavior": ""} | given
        run(path, prompts=int(prompts.value or 0), **asked)

    program.call(lambda: command_line.run(entry, __doc__, (*texts, "prompts")))


if __name__ == "__main__":
    main()
else:
    program.is_also(sweeps.sweep, __name__)
