"""Program: the report of a study folder, as one HTML page or as Markdown tables.

    python -m reptune_jax.report runs/sentiment [--markdown] [--keep=results/sentiment]

Writes `report/index.html` and `report/plots/*.png` in the study folder. With --keep: its config,
tables and per-item results into a small new folder, to be put under version control.
"""

from pathlib import Path

from absl import flags

from reptune_jax import command_line, program
from reptune_jax.console import say
from reptune_jax.report import html, keep, markdown, outcomes, study


def main() -> None:
    """Flags; the folder is the one argument, or --workdir."""
    workdir = flags.DEFINE_string("workdir", None, "the study folder")
    tables = flags.DEFINE_bool("markdown", False, "print the tables instead of writing the page")
    primary = flags.DEFINE_string(
        "primary", None, "metric:format, e.g. logodds:free; by default what the study declares"
    )
    margin = flags.DEFINE_float(
        "margin", study.MARGIN, "non-inferiority margin, nats per token", lower_bound=0.0
    )
    budget = flags.DEFINE_float(
        "kl_budget", None, "KL, nats per token, at which steering is compared; by default dual's"
    )
    kept = flags.DEFINE_string("keep", None, "a new folder for config, tables and results")
    note = flags.DEFINE_string("note", "", "for --keep: the command, the machine, the time")
    shown = ("workdir", "markdown", "primary", "margin", "kl_budget", "keep", "note")

    def entry(argv: list[str]) -> None:
        named = [*argv[1:], *([workdir.value] if workdir.value else [])]
        if len(named) != 1:
            raise ValueError(f"got {named}, expected one study folder. Example: --workdir=runs/x.")
        read = study.read(named[0], primary.value, budget.value, float(margin.value or 0))
        if kept.value:
            say(f"kept: {keep.keep(read, Path(kept.value), str(note.value))}")
        elif tables.value:
            print(markdown.render(read))
        else:
            page = html.write(read)
            for line in outcomes.headline(read):
                say(line)
            say(f"report: {page}")

    program.call(lambda: command_line.run(entry, __doc__, shown))


if __name__ == "__main__":
    main()
