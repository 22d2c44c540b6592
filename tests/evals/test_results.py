"""The results table: written whole or not at all, read back exactly, refused if misleading."""

import dataclasses
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reptune_jax.evals import judges, results
from reptune_jax.evals.results import Row

ROW = Row(
    run_id="r0", behavior="sentiment", arm="base", sign=0, seed=0, split="test", item_id="i1",
    cluster="c1", metric="logodds", value=0.25, template="t0", prompt_sha="aaa",
)  # fmt: skip
DUAL = dataclasses.replace(ROW, run_id="r1", arm="dual", sign=1)


def test_round_trip_over_several_files(tmp_path):
    results.write_parquet(tmp_path / "results/baseline.parquet", [ROW])
    results.write_parquet(tmp_path / "dual+_s0/results/tuned.parquet", [DUAL])
    rows = results.read_study(tmp_path)
    assert list(rows.columns) == list(results.SCHEMA.names)
    assert sorted(rows.arm) == ["base", "dual"]
    assert rows.value.tolist() == [0.25, 0.25]
    assert rows.label.isna().all()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "results/a.parquet"
    results.write_parquet(path, [ROW])
    broken = dataclasses.replace(ROW)
    object.__setattr__(broken, "value", "not a number")
    with pytest.raises(pa.ArrowInvalid):
        results.write_parquet(path, [broken])
    assert [p.name for p in path.parent.iterdir()] == ["a.parquet"]
    assert pq.read_table(path).num_rows == 1


@pytest.mark.parametrize(
    "change",
    [{"arm": "duel"}, {"metric": "logods"}, {"split": "dev"}, {"sign": 1}, {"value": math.inf}],
)
def test_rows_refuse_unknown_names(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(ROW, **change)


def test_foreign_schema_is_named(tmp_path):
    (tmp_path / "results").mkdir()
    table = results.rows_to_table([ROW]).drop_columns(["mass"])
    pq.write_table(table, tmp_path / "results/x.parquet")
    with pytest.raises(ValueError, match=r"x\.parquet.*mass"):
        results.read_study(tmp_path)


def test_empty_study_says_what_to_run(tmp_path):
    with pytest.raises(ValueError, match=r"evals\.baseline"):
        results.read_study(tmp_path)


def test_mixed_prompts_are_refused_and_both_named(tmp_path):
    results.write_parquet(tmp_path / "results/a.parquet", [ROW])
    results.write_parquet(
        tmp_path / "results/b.parquet", [dataclasses.replace(DUAL, prompt_sha="bbb")]
    )
    with pytest.raises(ValueError, match=r"aaa in .*a\.parquet.*bbb in .*b\.parquet"):
        results.read_study(tmp_path)


def test_the_prompt_arm_may_differ_in_its_prompt(tmp_path):
    prompted = dataclasses.replace(ROW, arm="prompt", sign=1, prompt_sha="bbb")
    results.write_parquet(tmp_path / "results/a.parquet", [ROW, prompted])
    assert len(results.read_study(tmp_path)) == 2


def test_the_same_measurement_twice_is_refused(tmp_path):
    results.write_parquet(tmp_path / "results/a.parquet", [ROW])
    results.write_parquet(tmp_path / "old/results/b.parquet", [dataclasses.replace(ROW, value=9.0)])
    with pytest.raises(ValueError, match=r"twice.*a\.parquet|twice.*b\.parquet"):
        results.read_study(tmp_path)


def test_vader_caps_repeated_words_but_keeps_negations():
    assert judges.vader("A great day.") > 0.5 > 0 > judges.vader("A terrible day.")
    assert judges.vader("great " * 30) == judges.vader("great great")
    assert (
        judges.cap_repeats("not good, not bad, not good, not good!")
        == "not good, not bad, not good, not"
    )


def test_guards():
    assert judges.distinct_n("a b a b a b") == pytest.approx(2 / 5)
    assert judges.repetition_rate("one two three four five") == 0
    assert judges.repetition_rate("go on and on " * 5) > 0.5


def test_a_judges_auroc_is_of_its_scores():
    texts = [("I love it.", 1.0), ("I hate it.", 0.0), ("So good!", 1.0), ("So bad!", 0.0)] * 10
    scores, labels = [judges.vader(text) for text, _ in texts], [label for _, label in texts]
    assert judges.judge_auroc(scores, labels).estimate == 1
    assert judges.judge_auroc(scores, [1 - label for label in labels]).estimate == 0
