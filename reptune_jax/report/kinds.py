"""Kinds of items: a measure split by the tags of the behavior's items, all arms in one table.

A mean over all hides whether an arm moved where it should: a sycophant agrees with the right and
with the wrong, a contrarian with neither.
"""

import collections

from reptune_jax.evals.measures import Measure
from reptune_jax.report import captions
from reptune_jax.report import study as studies
from reptune_jax.report.blocks import Table, interval
from reptune_jax.report.study import BASE, Study

_FEWEST, _MOST = 8, 8  # items of a kind; kinds of a tag: others, as topics, are not kinds


def kinds(study: Study, measure: Measure, split: str = "test") -> dict[str, set[str]]:
    """tag -> ids of its items, of tags that part the measured items into a few kinds."""
    shown = set(study.measured(BASE, measure, split).item_id)
    of: dict[str, dict[str, set[str]]] = collections.defaultdict(dict)
    for item in shown:
        for tag in study.tags.get(item, ()):
            of[tag.partition(":")[0]].setdefault(tag, set()).add(item)
    few = (tags for _, tags in sorted(of.items()) if 1 < len(tags) <= _MOST)
    return {
        tag: ids
        for tags in few
        for tag, ids in sorted(tags.items())
        if all(len(own) >= _FEWEST for own in tags.values())
    }


def table(study: Study, measure: Measure, split: str = "test") -> Table | None:
    """Base mean and every arm's change by kind; None where the items are of one kind."""
    found = kinds(study, measure, split)
    arms = [s for s in study.picks(split) if s != BASE and len(study.measured(s, measure, split))]
    if not found:
        return None
    base = study.measured(BASE, measure, split)
    rows = []
    for tag, ids in found.items():
        row = [
            tag,
            str(len(ids)),
            interval(studies.interval(base[base.item_id.isin(ids)], "value")),
        ]
        for setting in arms:
            paired = study.delta(setting, BASE, measure, split)
            row.append(interval(studies.interval(paired[paired.item_id.isin(ids)])))
        rows.append(row)
    header = ["Kind", "Items", "base, mean", *(f"{setting.name}, Δ" for setting in arms)]
    return Table(f"{measure.label} by kind of item", captions.KINDS, header, rows)
