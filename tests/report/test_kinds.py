"""A measure by the tags of its items, against means worked out by hand."""

import dataclasses

import numpy as np
import pytest

from reptune_jax.report import kinds, study
from reptune_jax.report.study import BASE, Setting
from tests.support.synthetic import synthetic_study


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    found = study.read(
        synthetic_study(tmp_path_factory.mktemp("kinds"), items=24, seeds=(0,), arms=("dual",))
    )
    items = sorted(found.measured(BASE, found.primary, "test").item_id.unique())
    tags = {
        item: (f"opinion:{'right' if i % 3 else 'wrong'}", f"topic:{i}", "alike:1", f"rare:{i < 2}")
        for i, item in enumerate(items)
    }
    return dataclasses.replace(found, tags=tags)


def test_only_tags_that_part_the_items_into_a_few_kinds_are_taken(read):
    found = kinds.kinds(read, read.primary)
    assert {tag: len(ids) for tag, ids in found.items()} == {
        "opinion:right": 16,
        "opinion:wrong": 8,
    }


def test_every_arms_change_is_the_mean_over_its_kinds_items(read):
    table = kinds.table(read, read.primary)
    assert table.header[:3] == ["Kind", "Items", "base, mean"] and "dual +, Δ" in table.header
    ids = kinds.kinds(read, read.primary)["opinion:wrong"]
    of = {}
    for setting in (BASE, Setting("dual", 1)):
        rows = read.measured(setting, read.primary, "test")
        of[setting] = rows[rows.item_id.isin(ids)].groupby("item_id")["value"].mean()
    (row,) = (row for row in table.rows if row[0] == "opinion:wrong")

    def shown(cell):
        return float(cell.split(" ")[0].replace("−", "-"))

    assert row[1] == "8" and shown(row[2]) == pytest.approx(of[BASE].mean(), abs=6e-4)
    delta = np.mean(of[Setting("dual", 1)] - of[BASE])
    assert shown(row[table.header.index("dual +, Δ")]) == pytest.approx(delta, abs=6e-4)


def test_items_of_one_kind_have_no_table(read):
    assert kinds.table(dataclasses.replace(read, tags={}), read.primary) is None
