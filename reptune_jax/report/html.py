"""One self-contained page from a study: its sections, laid out by `template.html`."""

import re
from pathlib import Path

import jinja2
import markupsafe

from reptune_jax.evals.attacks import verdicts as attacked
from reptune_jax.evals.suites import verdicts
from reptune_jax.folder import write_whole
from reptune_jax.report import about, outcomes, sections, style
from reptune_jax.report.blocks import Plot
from reptune_jax.report.study import Study

_SENTENCE = 60  # characters
_KINDS = {
    "good": {"dual ahead", "non-inferior", verdicts.RETAINED, outcomes.MOVED},
    "bad": {
        "dual behind", "dual collapsed", "both collapsed", "inferior", outcomes.COLLAPSED,
        outcomes.WRONG_WAY, attacked.BROKEN,
    },
    "open": {
        "no difference shown", "rival collapsed", "inconclusive", outcomes.NO_EFFECT,
        outcomes.NO_BETTER, outcomes.NOT_MEASURED, verdicts.UNDECIDED, verdicts.UNINFORMATIVE,
        attacked.HELD, attacked.UNDECIDED, attacked.NOTHING, attacked.UNSPECIFIC, attacked.TRACE,
        attacked.DESTROYED,
    },
}  # fmt: skip


def write(study: Study) -> Path:
    """Writes the study's report/index.html and report/plots/*.png; returns the page."""
    page, plot_dir = study.folder.report, study.folder.plots
    with study.folder.reporting():
        plot_dir.mkdir(parents=True, exist_ok=True)
        write_whole(page, render(study, plot_dir))
    return page


def render(study: Study, plot_dir: Path | None = None) -> str:
    """The page as text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def drawn(plot: Plot) -> str:
        png = None if plot_dir is None else plot_dir / f"{plot.name}.png"
        return style.draw(plot, png)

    environment.filters |= {"cell": _cell, "head": _head, "drawn": drawn, "texts": _texts}
    environment.filters["kind"] = lambda block: type(block).__name__
    built = [(section, section.build(study)) for section in sections.SECTIONS]
    return environment.get_template("template.html").render(
        behavior=", ".join(sorted(set(study.rows.behavior))),
        headline=outcomes.answers(study),
        facts=about.facts(study),
        selection=about.selection(study),
        sections=[(section, blocks) for section, blocks in built if blocks],
    )


def _texts(rows: list[list[str]]) -> set[int]:
    """Which columns hold sentences, which may wrap and begin at the left."""
    return {i for row in rows for i, cell in enumerate(row) if len(cell) > _SENTENCE}


def _head(text: str) -> markupsafe.Markup:
    return markupsafe.Markup(str(markupsafe.escape(text)).replace("d_z", "d<sub>z</sub>"))


def _cell(text: str) -> markupsafe.Markup:
    """A table cell: intervals dimmed, verdict words colored."""
    for kind, words in _KINDS.items():
        if text in words:
            return markupsafe.Markup('<span class="{}">{}</span>').format(kind, text)
    match = re.fullmatch(r"(.+?) (\[.+\])", text)
    if match is None:
        return markupsafe.escape(text)
    return markupsafe.Markup('{} <span class="ci">{}</span>').format(*match.groups())
