"""Program: the untuned, the steered and the tuned model answer the same prompts side by side.

    python -m reptune_jax.chat --workdir=runs/sentiment [--config.chat.run=dual-_s0] \\
        [--prompt="Tell me about soup." --prompt=…]

Reads prompts from the terminal, or answers those given with --prompt and ends. Every prompt is a
chat of its own. The study's folder is enough: it holds the config. `--config.chat.…` says which run
is shown (by default the one that was exported), and how the steered model is steered.
"""

import itertools
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from reptune_jax import program
from reptune_jax.console import say
from reptune_jax.evals import arms
from reptune_jax.evals.arms import Condition
from reptune_jax.folder import Study
from reptune_jax.vectors import extraction
from reptune_jax.vectors.steering_vector import SteeringVector

_GAP = " | "
_NARROWEST = 20  # characters; narrower columns go below one another


def run(c: ConfigDict, workdir: Path, prompts: Sequence[str] = ()) -> None:
    """Answers `prompts`, or those typed until end of input."""
    converse(c, conditions(c, workdir), prompts)


def converse(c: ConfigDict, columns: Mapping[str, Condition], prompts: Sequence[str]) -> None:
    """Prints every column's answer to each prompt."""
    if sys.stdin.isatty() and not prompts:
        say("Type a prompt; Ctrl-D ends. Each prompt is a new chat.")
    for prompt in prompts or typed():
        if prompts or not sys.stdin.isatty():
            print(f"> {prompt}")
        answers = {name: answer(c, cond, prompt) for name, cond in columns.items()}
        width = shutil.get_terminal_size().columns
        print("\n".join(side_by_side(answers, width)) + "\n", flush=True)


def conditions(c: ConfigDict, workdir: Path) -> dict[str, Condition]:
    """Column title -> model, of the study in `workdir`.

    Raises:
      ValueError, FileNotFoundError: no vector or no such run there, or they are another model's.
    """
    study = Study(workdir)
    if not study.vector.exists():
        raise FileNotFoundError(
            f"{study.vector}: not there. Run `extract` or `study` in this --workdir first."
        )
    vector, run_folder = SteeringVector.load(study.vector), find_run(study, c.chat.run)
    base = program.load_model(c)
    extraction.fit(vector, base)
    tuned = arms.tuned(base, run_folder, c.chat.scale)
    scale = f" × {c.chat.scale:g}" if c.chat.scale != 1 else ""
    layer = c.chat.layer if c.chat.layer >= 0 else c.steer.layers[0]
    steered = arms.steered(base, vector, layer, c.chat.dose, tuned.sign, c.steer)
    return {
        "base": Condition(base, "base"),
        f"steered {tuned.sign * c.chat.dose:+g} at layer {layer}": steered,
        f"tuned {run_folder.name}{scale}": tuned,
    }


def find_run(study: Study, name: str) -> Path:
    """The folder of a tuned run; an unknown name is answered with those that are there."""
    if not name and (chosen := study.chosen()):
        return chosen.path
    there = [run.path.name for run in study.runs()]
    if name not in there:
        raise ValueError(
            f"chat.run: got {name!r}, expected one of {', '.join(there) or '(no run yet)'} in "
            f"{study.path}. Run `train` or `study` there, or set --config.chat.run."
        )
    return study.run(name).path


def answer(c: ConfigDict, cond: Condition, prompt: str) -> str:
    """One greedy answer, without what could move the terminal's cursor."""
    (text,) = cond.model.generate(
        [prompt], max_new_tokens=c.chat.new_tokens, steer=cond.steer, batch_size=1
    )
    return "".join(ch if ch.isprintable() or ch == "\n" else " " for ch in text)


def typed() -> Iterator[str]:
    """Prompts from standard input until its end; blank lines are skipped."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            if sys.stdin.isatty():
                print()  # the shell's prompt belongs on a line of its own
            return
        if line.strip():
            yield line.strip()


def side_by_side(texts: Mapping[str, str], width: int) -> list[str]:
    """Lines of titled columns as wide as the terminal allows, or a list where it is too narrow."""
    each = (width - len(_GAP) * (len(texts) - 1)) // len(texts)
    if each < _NARROWEST:
        lists = ([f"{title}:", *wrap(text, width - 2), ""] for title, text in texts.items())
        return list(itertools.chain.from_iterable(lists))[:-1]
    columns = [
        [*textwrap.wrap(title, each), "-" * each, *wrap(text, each)]
        for title, text in texts.items()
    ]
    rows = itertools.zip_longest(*columns, fillvalue="")
    return [_GAP.join(cell.ljust(each) for cell in row).rstrip() for row in rows]


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` characters; the text's own line breaks stay."""
    return [
        line
        for paragraph in text.strip().split("\n")
        for line in textwrap.wrap(paragraph, max(width, 1)) or [""]
    ]


def main() -> None:
    """The other programs' flags, and --prompt."""
    prompts = flags.DEFINE_multi_string("prompt", [], "answer this and end; may be repeated")
    program.main(lambda c, workdir: run(c, workdir, prompts.value), __doc__, of_study=True)


if __name__ == "__main__":
    main()
