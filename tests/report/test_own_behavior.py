"""The three changes of docs/own_behavior.md, made and run as the page shows them."""

import dataclasses
import re
from pathlib import Path

import pytest

from reptune_jax.data import behavior, schema
from reptune_jax.evals import measures, results
from reptune_jax.evals.results import Row
from reptune_jax.report import about, blocks, html, markdown, sections, study, texts
from tests.support.synthetic import synthetic_study

PAGE = Path(__file__).parents[2] / "docs" / "own_behavior.md"
ITEMS, METRIC, BUILD, SECTION = re.findall(r"```(?:json|python)\n(.*?)```", PAGE.read_text(), re.S)


@pytest.fixture(autouse=True)
def own_metric(monkeypatch):
    """The entry of METRICS; returns its judge."""
    entry = eval(f"{{{METRIC}}}", vars(measures))
    for name, metric in entry.items():
        monkeypatch.setitem(measures.METRICS, name, metric)
    return entry["exclamations"].judge


@pytest.fixture
def own_section(monkeypatch):
    """The entry of SECTIONS, before the limitations."""
    names = vars(sections) | {"Table": blocks.Table, "percent": blocks.percent}
    exec(BUILD, names)
    (section,) = eval(f"({SECTION})", names)
    monkeypatch.setattr(sections, "SECTIONS", (section, *sections.SECTIONS[-2:]))


def own_study(folder, judge):
    """A made-up study whose answers are judged by `judge`."""
    synthetic_study(folder, items=6, seeds=(0,), arms=("dual",))
    for path in folder.glob("**/results/*.parquet"):
        rows = [Row(**row) for row in results.pq.read_table(path).to_pylist()]
        results.write_parquet(path, [judged(row, judge) for row in rows])
    return folder


def judged(row, judge):
    if row.metric == "vader":
        text = "It rains! " * (1 + row.sign) + "It stopped."
        return dataclasses.replace(row, metric="exclamations", value=judge(text), text=text)
    return row


def test_the_behavior_is_read_with_its_measures(tmp_path, own_metric):
    path = tmp_path / "excitement.jsonl"
    path.write_text(ITEMS)
    read = behavior.load(path)
    assert read.name == "excitement" and read.kind == "free"
    assert measures.judged(read.measures) == "exclamations"
    assert not schema.check(read.items)
    assert {item.split for item in read.select(format="free")} == {"train", "tune", "val", "test"}
    for item in read.select(format="free"):
        assert own_metric(item.pos) > own_metric(item.neg)


def test_the_report_treats_the_measure_as_any_judged_one(tmp_path, own_metric):
    read = study.read(own_study(tmp_path, own_metric), primary="exclamations:free")
    assert read.judged == read.primary == measures.Measure("exclamations", "free")
    answers = [a for card in texts.generations(read) for a in card["answers"]]
    assert {a["arm"]: a["value"] for a in answers}["dual +"] == "+0.67"
    assert all("It stopped." in a["text"] for a in answers)
    (line,) = (line for line in about.limitations(read) if line.startswith("The judge"))
    assert "Exclaimed sentences" in line and "AUROC" in line


def test_the_section_is_on_the_page_and_in_the_markdown(tmp_path, own_metric, own_section):
    read = study.read(own_study(tmp_path, own_metric))
    page, text = html.render(read), markdown.render(read)
    assert '<a href="#loud">Loudness</a>' in page and '<h2 id="loud">' in page
    assert "| dual + | 100.0 % | 0.0 % | 6 |" in text and "| dual − | 0.0 % |" in text


def test_another_behaviors_report_goes_without_the_section(tmp_path, own_section):
    read = study.read(synthetic_study(tmp_path, items=4, seeds=(0,), arms=()))
    assert "Loudness" not in html.render(read)
