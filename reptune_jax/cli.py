"""`reptune PROGRAM …` is `python -m reptune_jax.PROGRAM …`; alone it lists the programs.

reptune study --config=sentiment:quick --workdir=runs/quickstart
reptune chat --workdir=runs/quickstart
reptune convert --from=runs/quickstart --to=folder
"""

import ast
import difflib
import runpy
import sys
from pathlib import Path

from reptune_jax.folder import version

PROGRAMS = {
    "study": "reptune_jax.study",
    "extract": "reptune_jax.extract",
    "train": "reptune_jax.train",
    "baseline": "reptune_jax.evals.baseline",
    "steering": "reptune_jax.evals.steering",
    "tuned": "reptune_jax.evals.tuned",
    "dial": "reptune_jax.evals.dial",
    "capability": "reptune_jax.evals.capability",
    "specificity": "reptune_jax.evals.specificity",
    "lmeval": "reptune_jax.evals.lmeval",
    "attack": "reptune_jax.evals.attack",
    "relearn": "reptune_jax.relearn",
    "recipe": "reptune_jax.recipe",
    "select": "reptune_jax.select",
    "sweep": "reptune_jax.sweep",
    "convert": "reptune_jax.convert",
    "vector": "reptune_jax.vector",
    "report": "reptune_jax.report",
    "chat": "reptune_jax.chat",
    "plan": "reptune_jax.plan",
}


def main() -> None:
    """Runs the named program with the rest of the command line as its own."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        print(overview())
        return
    if name == "--version":
        print(f"reptune_jax {version()}")
        return
    if name not in PROGRAMS:
        print(f"error: {unknown(name)}", file=sys.stderr)
        sys.exit(1)
    sys.argv = [f"reptune {name}", *rest]
    runpy.run_module(PROGRAMS[name], run_name="__main__", alter_sys=True)


def overview() -> str:
    """Usage, and one line for each program."""
    width = max(map(len, PROGRAMS))
    lines = [f"  {name:<{width}}  {summary(module)}" for name, module in PROGRAMS.items()]
    return "\n".join(
        [
            "usage: reptune PROGRAM --workdir=DIR [--config=NAME[:ARG]] [--config.key=value …]",
            "",
            *lines,
            "",
            "reptune PROGRAM --help says more.",
        ]
    )


def unknown(name: str) -> str:
    """What to say about a program that does not exist."""
    close = difflib.get_close_matches(name, PROGRAMS, n=1)
    meant = f" Did you mean {close[0]!r}?" if close else ""
    return f"program: got {name!r}, expected one of {', '.join(PROGRAMS)}.{meant}"


def summary(module: str) -> str:
    """First line of a module's docstring, read without importing the module."""
    path = Path(__file__).parent.joinpath(*module.split(".")[1:])
    source = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    doc = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    return doc.partition("\n")[0].removeprefix("Program: ")


if __name__ == "__main__":
    main()
