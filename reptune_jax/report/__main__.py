"""Program: the report of a study folder, as one HTML page or as Markdown tables."""

from absl import app, flags, logging

from reptune_jax.report import html, study, tables, verdicts

_WORKDIR = flags.DEFINE_string("workdir", None, "The study folder.", required=True)
_MARKDOWN = flags.DEFINE_bool(
    "markdown",
    False,
    "Print the headline, comparison, claims and retention tables instead of writing the page.",
)
_PRIMARY = flags.DEFINE_string(
    "primary",
    None,
    "Primary measure as metric:format, e.g. logodds:free. Default: claims, then log-odds.",
)
_MARGIN = flags.DEFINE_float(
    "margin", tables.MARGIN, "Non-inferiority margin in nats per token.", lower_bound=0.0
)
_KL_BUDGET = flags.DEFINE_float(
    "kl_budget",
    None,
    "KL in nats/token at which steering is compared. Default: the dual arm's own.",
)


def main(argv: list[str]) -> None:
    """Reads the study, writes WORKDIR/report/index.html or prints Markdown."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}. Pass the folder as --workdir=DIR.")
    read = study.read(_WORKDIR.value, _PRIMARY.value, _KL_BUDGET.value)
    if _MARKDOWN.value:
        print(tables.headline_markdown(read))
        print(tables.family_markdown(read))
        print(verdicts.verdicts_markdown(read))
        print(tables.retention_markdown(read, _MARGIN.value))
        return
    logging.info("Wrote %s", html.write(read, _MARGIN.value))


if __name__ == "__main__":
    app.run(main)
