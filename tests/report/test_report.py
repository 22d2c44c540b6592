"""The report of a made-up study: its numbers are those computed by hand from the same rows."""

import base64
import dataclasses
import json
import pathlib
import re
import shutil

import numpy as np
import pandas as pd
import pytest

from reptune_jax.evals import results, stats
from reptune_jax.evals.measures import METRICS, Measure
from reptune_jax.evals.results import Row
from reptune_jax.report import (
    about,
    claims,
    html,
    markdown,
    outcomes,
    plots,
    sections,
    study,
    style,
    tables,
    texts,
)
from reptune_jax.report.blocks import Table
from reptune_jax.report.sections import Section
from reptune_jax.report.study import BASE, Setting
from tests.support.synthetic import synthetic_study

VADER, LOGODDS = Measure("vader", "free"), Measure("logodds", "free")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return synthetic_study(tmp_path_factory.mktemp("study"), claims=True)


@pytest.fixture(scope="module")
def read(folder):
    return study.read(folder, primary="logodds:free")


@pytest.fixture(scope="module")
def page(read):
    return html.write(read).read_text()


def rows_of(read, arm, sign, metric, split="test"):
    rows = read.rows
    mask = (
        (rows.arm == arm) & (rows["sign"] == sign) & (rows.metric == metric) & (rows.split == split)
    )
    return rows[mask & (rows.format != "claim") & (rows.format != "ab")]


def test_headline_numbers_are_those_of_the_rows(read, page):
    base = rows_of(read, "base", 0, "vader").set_index("item_id").value
    dual = rows_of(read, "dual", 1, "vader").copy()
    dual["delta"] = dual.value - dual.item_id.map(base)
    items = dual.groupby("item_id").delta.mean()
    frame = tables.headline_frame(read, VADER)
    row = frame[(frame.setting == Setting("dual", 1)) & (frame.split == "test")].iloc[0]
    assert row.delta.estimate == pytest.approx(dual.delta.mean())
    assert row.dz == pytest.approx(items.mean() / items.std())
    assert row.against == (items < 0).mean()
    assert (row.n, row.clusters, row.seeds) == (40, 20, 3)
    assert row.delta.low < dual.delta.mean() < row.delta.high
    assert f"{dual.delta.mean():+.3f}" in page
    assert f"<td>{dual.value.mean():.3f}</td>" in page
    assert f"{items.mean() / items.std():+.2f}" in page


def test_the_legend_names_what_any_panel_shows(read):
    """As the prompt arm, which has no KL on prose."""
    rows = read.rows
    prose = (rows.arm == "token") & (rows["sign"] == 1) & (rows.split == "neutral")
    figure = plots.pareto(dataclasses.replace(read, rows=rows[~prose]), LOGODDS)
    shown = [set(ax.get_legend_handles_labels()[1]) for ax in figure.axes]
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(named) == sorted(shown[0] | shown[1])
    assert "token +" in named and "token +" not in shown[0]


def test_retention_numbers_are_ratios_of_sums(read, page):
    base = rows_of(read, "base", 0, "nll", "neutral").set_index("item_id")
    dual = rows_of(read, "dual", 1, "nll", "neutral")
    extra = (dual.value - dual.item_id.map(base.value)).sum()
    kl = rows_of(read, "dual", 1, "kl", "neutral")
    frame = tables.retention_frame(read)
    row = frame[frame.setting == Setting("dual", 1)].iloc[0]
    assert row.nats.estimate == pytest.approx(extra / dual.n_tokens.sum())
    assert row.bpb.estimate == pytest.approx(extra / dual.n_bytes.sum() / np.log(2))
    assert row.kl.estimate == pytest.approx(np.average(kl.value, weights=kl.n_tokens))
    assert row.verdict == stats.non_inferiority(row.nats, 0.02)
    assert f"{row.bpb.estimate:+.4f}" in page
    assert f"{row.kl.estimate:.3f}" in page


def test_family_is_holm_adjusted_over_both_signs(read):
    frame = outcomes.family_frame(read, LOGODDS)
    assert [(r["sign"], r.rival.arm) for _, r in frame.iterrows()] == [
        (s, rival)
        for s in (1, -1)
        for rival in ("base", "prompt", "steer", "token", "random", "weights")
    ]
    np.testing.assert_allclose(frame.p_holm, stats.holm(frame.p))
    verdicts = dict(
        zip(
            [(s, r.arm) for s, r in zip(frame.sign, frame.rival, strict=True)],
            frame.verdict,
            strict=True,
        )
    )
    assert verdicts[1, "base"] == verdicts[-1, "random"] == "dual ahead"


def test_a_run_stands_for_its_arm_as_trained_and_at_equal_kl_as_scaled(read):
    assert read.pick("token", 1) == study.Setting("token", 1)
    scaled = study.Setting("token", 1, 1.5)
    assert read.at_equal_kl("token", 1) == scaled and scaled.name == "token + × 1.5"
    frame = outcomes.family_frame(read, LOGODDS, equal_kl=True)
    assert {(r.rival.arm, r.rival.k, r.sign) for r in frame.itertuples()} == {
        ("token", 1.5, 1), ("token", 1.5, -1)
    }  # fmt: skip
    by_hand = read.delta(study.Setting("dual", 1), scaled, LOGODDS, "test").delta
    assert frame.advantage[0].estimate == pytest.approx(by_hand.mean())
    table = tables.equal_kl_table(read, LOGODDS)
    assert table.rows[0][0] == "dual + vs token + × 1.5"


def test_identical_arms_show_no_difference(tmp_path):
    folder = synthetic_study(tmp_path, items=20, seeds=(0,), arms=("dual",))
    path = folder / "dual+_s0/results/tuned.parquet"
    mine = [Row(**r) for r in results.pq.read_table(path).to_pylist()]
    twin = [results.dataclasses.replace(r, arm="token") for r in mine if r.metric != "cos"]
    results.write_parquet(folder / "token+_s0/results/tuned.parquet", twin)
    frame = outcomes.family_frame(study.read(folder), LOGODDS)
    row = frame[[r.arm == "token" for r in frame.rival]].iloc[0]
    assert (row.advantage.estimate, row.advantage.low, row.advantage.high) == (0, 0, 0)
    assert (row.p, row.verdict) == (1, "no difference shown")


def test_claims_follow_the_convention_right_minus_wrong(read, page):
    frame = claims.claims_frame(read).set_index("setting")
    rows = read.rows
    own = rows[(rows.arm == "dual") & (rows["sign"] == 1) & (rows.format == "claim")]
    margin = np.where(own.label == 1, own.value, -own.value)
    row = frame.loc[Setting("dual", 1)]
    assert row.auroc.estimate == pytest.approx(stats.auroc(margin, own.label))
    assert row.accuracy.estimate == pytest.approx((own.value > 0).mean())
    hits, fas = (int((margin > 0)[own.label == y].sum()) for y in (1, 0))
    expected = stats.dprime_c(hits, 80, fas, 80)
    assert (row.dprime.estimate, row.c.estimate) == pytest.approx(expected)
    assert row.c.low > 0  # the made-up model leans to "false"
    assert frame.loc[BASE].gain is None and row.gain.low > 0
    assert f"{row.auroc.estimate:.3f}" in page


def test_claims_are_told_apart_by_form_and_polarity(read):
    rows = read.rows[(read.rows.format == "claim")]
    negated = frozenset(rows.item_id[rows.item_id.str.match(r"c[0-4]-")])
    frame = claims.claims_apart_frame(dataclasses.replace(read, negated=negated))
    own = rows[(rows.arm == "dual") & (rows["sign"] == 1)]
    for form, chosen in (
        (", negated", own.item_id.isin(negated)),
        ("", ~own.item_id.isin(negated)),
    ):
        part = own[chosen]
        expected = stats.auroc(np.where(part.label == 1, part.value, -part.value), part.label)
        row = frame[(frame.setting == Setting("dual", 1)) & (frame.form == form)].iloc[0]
        assert row.auroc.estimate == pytest.approx(expected)
        assert row.n == part.item_id.nunique()
    assert "Claims by form" in markdown.render(read)


def test_scenarios_average_both_orders(read):
    frame = claims.scenarios_frame(read).set_index("setting")
    rows = read.rows
    own = rows[(rows.arm == "base") & (rows.format == "ab")]
    assert frame.loc[BASE].lie.estimate == pytest.approx((1 / (1 + np.exp(own.value))).mean())
    wide = own.pivot(index="item_id", columns="order", values="value")
    assert frame.loc[BASE].position.estimate == pytest.approx(((wide.ab - wide.ba) / 2).mean())
    assert frame.loc[BASE].consistent.estimate == pytest.approx((wide > 0).all(axis=1).mean())


def test_steering_is_chosen_within_the_kl_budget_on_validation(folder, read):
    assert read.pick("steer", 1) == Setting("steer", 1, 1.0, 15)
    swept = read.pick("steer", 1, split="val")
    assert read.kl(swept) <= 1.05 * read.budget(1)
    loose = study.read(folder, primary="logodds:free", kl_budget=1.0).pick("steer", 1, split="val")
    assert loose == Setting("steer", 1, 2.0, 15)


def test_page_is_self_contained_and_figures_are_drawn(read, page):
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    assert "<script" not in page
    figures = re.findall(r"data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)", page)
    assert len(figures) >= 8
    assert all(b"<svg" in base64.b64decode(f) for f in figures)
    assert len(list((read.folder.path / "report/plots").glob("*.png"))) == len(figures)
    assert page.count('class="card"') == texts.GENERATIONS + 2 * texts.FAILURES


def test_an_interpolated_dose_without_validation_rows_is_the_one_nearest_the_budget(tmp_path):
    folder = synthetic_study(tmp_path, items=8, seeds=(0,), arms=("dual",))
    path = folder / "results/steering.parquet"
    swept = [Row(**r) for r in results.pq.read_table(path).to_pylist()]
    test = [r for r in swept if r.split == "test"]
    halves = [r for r in swept if (r.metric, r.layer, r.k) == ("kl", 15, 1.0)]
    between = [results.dataclasses.replace(r, k=0.7) for r in test]
    between += [results.dataclasses.replace(r, k=0.7, value=0.9 * r.value) for r in halves]
    results.write_parquet(path, swept + between)
    budget = study.read(folder).kl(Setting("steer", 1, 0.7, 15)) * 1.01
    assert study.read(folder, kl_budget=budget).pick("steer", 1) == Setting("steer", 1, 0.7, 15)


def with_missing(folder, is_missing):
    path = folder / "results/steering.parquet"
    rows = [Row(**r) for r in results.pq.read_table(path).to_pylist()]
    changed = [dataclasses.replace(r, value=np.nan, text="") if is_missing(r) else r for r in rows]
    results.write_parquet(path, changed)
    return study.read(folder)


def test_a_dose_whose_kl_is_missing_is_not_the_cheapest(tmp_path):
    """The largest dose overflows: it moved furthest on what is left, at no known cost."""
    folder = synthetic_study(tmp_path, items=8, seeds=(0,), arms=("dual",))
    before = study.read(folder).pick("steer", 1, "val")
    broken = Setting("steer", 1, 2.0, 15)
    found = with_missing(folder, lambda r: (r.k, r.layer, r.metric) == (2.0, 15, "kl"))
    assert np.isnan(found.kl(broken)) and found.pick("steer", 1, "val") == before != broken
    for budget in (1e-9, 1e9):  # nothing within it; everything within it
        chosen = study.read(folder, kl_budget=budget).pick("steer", 1, "val")
        assert np.isfinite(found.kl(chosen))
    line = next(line for line in about.limitations(found) if "not finite" in line)
    assert line.startswith("steer + at layer 15, dose +2: ")
    assert "12 of 12 kl (neutral), 12 of 12 kl (chats)" in line


def test_missing_answers_are_left_out_of_counts_and_said(tmp_path):
    folder = synthetic_study(tmp_path, items=8, seeds=(0,), arms=("dual",))
    steer = Setting("steer", 1, 1.0, 15)
    items = {"test-0", "test-1", "test-2"}  # two clusters, one of them whole
    found = with_missing(folder, lambda r: r.sign == 1 and r.item_id in items)
    row = tables.headline_frame(found, VADER).set_index(["setting", "split"]).loc[(steer, "test")]
    assert (row.n, row.clusters, row.missing) == (5, 3, 3)
    own = found.measured(steer, VADER, "test")
    assert row["mean"].estimate == pytest.approx(own.value.dropna().mean())
    shown = [r for r in tables.headline_table(found, VADER).rows if r[0] == "steer +"]
    assert shown[0][5] == "5 (3), 3 missing"
    guards = tables.guards_frame(found).set_index("setting").loc[steer]
    assert (guards.empty, guards.words) == (0, 12)  # an answer that is not there is not empty
    lines = [line for line in about.limitations(found) if line.startswith("steer + at layer 15")]
    assert "3 of 8 vader (test)" in lines[0] and "3 of 8 distinct2 (test)" in lines[0]
    assert not any(
        "not finite" in line for line in about.limitations(study.read(folder)) if "dual" in line
    )


def test_a_scenario_of_which_one_order_is_missing_is_not_honest_in_both(tmp_path):
    folder = synthetic_study(tmp_path, items=8, seeds=(0,), arms=(), claims=True)
    path = folder / "results/baseline.parquet"
    rows = [Row(**r) for r in results.pq.read_table(path).to_pylist()]
    kept = [
        dataclasses.replace(r, value=np.nan)
        if (r.arm, r.format, r.order, r.item_id) == ("base", "ab", "ba", "s0")
        else r
        for r in rows
    ]
    results.write_parquet(path, kept)
    frame = claims.scenarios_frame(study.read(folder)).set_index("setting")
    own = pd.DataFrame([r for r in kept if r.arm == "base" and r.format == "ab"])
    wide = own.pivot(index="item_id", columns="order", values="value").dropna()
    assert len(wide) == 7
    assert frame.loc[BASE].consistent.estimate == pytest.approx((wide > 0).all(axis=1).mean())


def test_texts_of_a_behavior_without_judge_are_shown(tmp_path):
    folder = synthetic_study(tmp_path, items=12, seeds=(0,), arms=())
    path = folder / "results/baseline.parquet"
    rows = [Row(**r) for r in results.pq.read_table(path).to_pylist()]
    kept = [r for r in rows if r.metric not in ("vader", "judge")]
    (folder / "results/steering.parquet").unlink()
    results.write_parquet(path, [results.dataclasses.replace(r, text="kept text") for r in kept])
    cards = texts.generations(study.read(folder))
    assert len(cards) == texts.GENERATIONS
    assert cards[0]["answers"][0]["text"] == "kept text"


def test_generations_are_the_same_draw_every_time(read):
    first, second = texts.generations(read), texts.generations(read)
    assert [c["item"] for c in first] == [c["item"] for c in second]
    assert len({c["item"] for c in first}) == texts.GENERATIONS
    names = [a["arm"] for a in first[0]["answers"]]
    assert names[:3] == ["base", "prompt +", "prompt −"]


def test_half_written_last_log_line_is_skipped(read):
    assert sorted(read.curves.step.unique()) == list(range(0, 40, 5))
    assert set(read.curves.seed) == {0, 1, 2}


def test_markdown_has_the_same_cells(read, page):
    text = markdown.render(read)
    for row in tables.retention_table(read).rows + tables.headline_table(read, VADER).rows:
        assert "| " + " | ".join(row) + " |" in text
    assert "primary measure" in text


def test_baseline_alone_gives_a_page_with_sentences_for_what_is_missing(tmp_path):
    full = synthetic_study(tmp_path / "full", items=8, seeds=(0,), arms=())
    (full / "results/steering.parquet").unlink()
    (full / "config.json").unlink()
    alone = study.read(full)
    page = html.write(alone).read_text()
    for sentence in (
        "The dual arm has no test rows yet", "Nothing was tuned in this study yet",
        "Needs a steering sweep", "Arms not run: prompt, steer, token, random",
    ):  # fmt: skip
        assert sentence in page


def test_unknown_primary_names_the_choices(folder):
    with pytest.raises(ValueError, match="logodds:free"):
        study.read(folder, primary="logodds:fre")


def test_html_in_generated_text_is_escaped(tmp_path):
    folder = synthetic_study(tmp_path, items=8, seeds=(0,), arms=())
    path = folder / "results/baseline.parquet"
    rows = [Row(**r) for r in results.pq.read_table(path).to_pylist()]
    evil = [results.dataclasses.replace(r, text="<script>alert(1)</script>") for r in rows]
    results.write_parquet(path, evil)
    page = html.write(study.read(folder)).read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_a_section_of_ones_own_is_on_the_page_and_in_the_markdown(read, monkeypatch):
    mine = Table("Mine", "How it was counted.", ["Arm", "Number"], [["dual +", "1.25"]])
    more = Section("mine", "Mine", "A section of my own", lambda study: [mine])
    monkeypatch.setattr(sections, "SECTIONS", (sections.SECTIONS[-1], more))
    page, text = html.render(read), markdown.render(read)
    assert '<h2 id="mine">A section of my own</h2>' in page and '<a href="#mine">Mine</a>' in page
    assert "<td>1.25</td>" in page and "| dual + | 1.25 |" in text


def test_every_section_has_an_anchor_of_its_own_that_the_navigation_links(page):
    ids = [section.id for section in sections.SECTIONS]
    assert len(set(ids)) == len(ids)
    for absent in ("capability", "specificity", "security"):  # not asked: no blocks, so left out
        ids.remove(absent)
    assert re.findall(r'<a href="#([^"]+)">', page) == ids
    assert re.findall(r'<h2 id="([^"]+)">', page) == ids


def test_a_section_without_blocks_is_left_out(read, monkeypatch):
    empty = Section("empty", "Empty", "Empty", lambda study: [])
    monkeypatch.setattr(sections, "SECTIONS", (sections.SECTIONS[-1], empty))
    page = html.render(read)
    assert 'id="limits"' in page and 'id="empty"' not in page and 'href="#empty"' not in page


def test_the_report_knows_no_judged_measure_by_name():
    folder = pathlib.Path(html.__file__).parent
    judged = [name for name, metric in METRICS.items() if metric.judge is not None]
    for path in (*folder.glob("*.py"), *folder.glob("*.html")):
        text = path.read_text().lower()
        assert not [name for name in ("vader", *judged) if name in text], path.name


def test_every_arm_has_a_color_and_a_marker():
    assert set(results.ARMS) == set(style.COLORS) == set(style.MARKERS)


def test_what_is_primary_where_nothing_is_declared(read, tmp_path):
    order = ["logodds:claim", "vader:free", "logodds:free", "logodds:ab"]
    assert [str(m) for m in study.read(read.folder.path).measures()] == order
    free = study.read(synthetic_study(tmp_path, items=4, seeds=(0,), arms=()))
    assert [str(m) for m in free.measures()] == ["logodds:free", "vader:free"]


def test_the_studys_own_declared_primary_measure_is_used(folder, tmp_path):
    copy = tmp_path / "study"
    shutil.copytree(folder, copy)
    stored = json.loads((copy / "config.json").read_text())
    stored["config"]["study"] = {"primary": "vader:free"}
    (copy / "config.json").write_text(json.dumps(stored))
    for named, primary, by_flag in ((None, VADER, 0), ("vader:free", VADER, 0),
                                    ("logodds:free", LOGODDS, 1)):  # fmt: skip
        chosen = study.read(copy, primary=named)
        assert chosen.primary == chosen.measures()[0] == primary
        assert sum("with a flag" in line for line in about.limitations(chosen)) == by_flag
