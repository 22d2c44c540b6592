"""The report's tables as Markdown."""

from reptune_jax.report import outcomes, sections
from reptune_jax.report.blocks import Table
from reptune_jax.report.study import Study


def render(study: Study) -> str:
    """The first lines, then every section's tables, in the page's order."""
    blocks = (block for section in sections.SECTIONS for block in section.build(study))
    tables = [markdown(block) for block in blocks if isinstance(block, Table)]
    return "\n".join([*(f"- {line}" for line in outcomes.headline(study)), "", *tables])


def markdown(table: Table) -> str:
    """GitHub Markdown of a table: title, rows, caption."""
    lines = [f"**{table.title}**", ""]
    if not table.rows:
        return "\n".join([*lines, table.note, ""])
    lines += [
        "| " + " | ".join(table.header) + " |",
        "|:--" + "|--:" * (len(table.header) - 1) + "|",
    ]
    lines += ["| " + " | ".join(row) + " |" for row in table.rows]
    return "\n".join([*lines, "", f"<sub>{table.caption}</sub>", ""])
