"""What every arm does to behaviors that it was not tuned to, as a table: arms by behaviors."""

from reptune_jax.evals import specificity
from reptune_jax.report import captions
from reptune_jax.report.blocks import Block, Table, number
from reptune_jax.report.study import Setting, Study


def blocks(study: Study) -> list[Block]:
    """The table; nothing where no other behavior was asked for."""
    found = specificity.frame(study.rows)
    if not len(found):
        return []
    tests = specificity.tests(found, str(study.rows.behavior.iloc[0]))
    rows = []
    for (arm, sign, k, layer), part in found.groupby(["arm", "sign", "k", "layer"], sort=False):
        changes = part.set_index("test").change
        cells = [_cell(changes[test]) if test in changes else "–" for test in tests]
        name = Setting(str(arm), int(sign), float(k), int(layer)).name
        rows.append([name, *cells, str(changes.iloc[0].n_seeds)])
    items = ", ".join(f"{test} {found[found.test == test]['items'].max()}" for test in tests)
    caption = captions.SPECIFICITY.format(items=items)
    return [Table("Other behaviors", caption, ["Arm", *tests, "Seeds"], rows)]


def _cell(change: specificity.stats.Interval) -> str:
    """Estimate, half of the interval's width, and a star where that excludes zero."""
    half = (change.high - change.low) / 2
    star = " *" if change.excludes() else ""
    return f"{number(change.estimate, 2, signed=True)} ± {number(half, 2)}{star}"
