"""Answers and scores that are not finite are missing: NaN, counted, named, and never chosen."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import reptune_jax as rt
from reptune_jax import config
from reptune_jax.data import behavior as behaviors
from reptune_jax.data import neutral
from reptune_jax.evals import bench, claims, generation, judging, scoring, sweep
from reptune_jax.evals.arms import Condition
from reptune_jax.evals.results import Row
from reptune_jax.evals.sweep import Cell, choose
from reptune_jax.folder import Study
from reptune_jax.vectors.steering_vector import SteeringVector
from tests.support import tiny, tiny_behavior

LABELS: dict[str, Any] = {"behavior": "sentiment"}


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return rt.load(str(tiny.make_llama(tmp_path_factory.mktemp("llama"))))


@pytest.fixture(scope="module")
def behavior(tmp_path_factory):
    return behaviors.load(tiny_behavior.write(tmp_path_factory.mktemp("behavior")))


@pytest.fixture(scope="module")
def broken(ours):
    """Each layer's dose is finite, and their sum is not."""
    directions = np.zeros((4, 64), np.float32)
    directions[1:3] = 3e38
    steer = SteeringVector(directions, np.ones(4, np.float32), 0 * directions, (1, 2), {})
    return Condition(ours, "steer", 1, steer=steer, k=1.0, layer=1)


def test_every_measure_of_a_broken_condition_is_missing(broken, ours, behavior, monkeypatch):
    tiny_behavior.patch_neutral(monkeypatch)
    settings = tiny_behavior.settings("m", "b").eval
    items, labels = behavior.select("test", "free"), LABELS | broken.labels
    answers = generation.rows(settings, broken, labels, items, judging.own(behavior))
    assert {row.metric for row in answers} == {"distinct2", "rep4", "stopped", "vader"}
    assert all(math.isnan(row.value) and row.text == "" for row in answers)
    odds = scoring.contrast_rows(broken, labels, items, 4)
    known = scoring.refer(ours, neutral.prose(ours, "val", 1), 4)
    kept = scoring.retention_rows(broken, labels, known, 4)
    cosines = scoring.cosine_rows(broken, labels, _vector(), items, around=1)
    verdicts = claims.score(broken, labels, _claims(items), 4)
    for rows in (odds, verdicts, kept):
        assert rows and all(math.isnan(row.value) for row in rows)
    assert all(math.isnan(r.value) == (r.layer >= 1) for r in cosines)


def _vector():
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((4, 64)).astype(np.float32)
    return SteeringVector(noise, np.ones(4, np.float32), 0 * noise, (0, 1, 2, 3), {})


def _claims(items):
    from reptune_jax.data.contrast import Contrast

    return [Contrast(i, list(i.messages), "True", "False", "truefalse", "", 1) for i in items]


def test_missing_values_are_counted_by_metric(broken, capsys):
    values = {"vader": (0.5, math.nan, math.nan), "kl": (0.1, 0.2, math.nan), "top1": (1.0,)}
    rows = [
        Row(**LABELS | broken.labels, split="val", item_id=str(i), cluster="", metric=m, value=v)
        for m, found in values.items()
        for i, v in enumerate(found)
    ]
    bench.say_missing(broken, rows)
    said = capsys.readouterr().out
    assert "steer +1 seed 0, dose 1 at layer 1: missing, not finite in float32" in said
    assert said.strip().endswith("1 of 3 kl, 2 of 3 vader")
    bench.say_missing(broken, [r for r in rows if r.metric == "top1"])
    assert capsys.readouterr().out == ""


def test_a_dose_with_missing_values_is_never_chosen():
    nan = math.nan
    cells = [Cell(10, 1.0, 0.1, 0.02), Cell(10, 2.0, nan, 0.03), Cell(10, 4.0, 0.9, 0.04)]
    assert choose(cells, 1.0) == (10, pytest.approx(1.0, abs=0.01))
    cells = [Cell(5, 1.0, nan, nan), Cell(10, 1.0, 0.1, 0.02), Cell(20, 1.0, 0.9, nan)]
    assert choose(cells, 1.0) == (10, pytest.approx(1.0, abs=0.01))
    with pytest.raises(ValueError, match=r"got no dose at which every number is finite"):
        choose([Cell(5, 1.0, nan, 0.1), Cell(10, 1.0, 0.1, nan)], 1.0)


def test_a_dual_whose_kl_is_missing_is_no_budget(tmp_path, monkeypatch, capsys):
    kl = {"0": 0.02, "1": 0.04, "2": math.nan}

    def made(base, run):
        return Condition(base, "dual", 1, int(run.name[-1]))

    def kept(cond, labels, known, batch):
        return [
            SimpleNamespace(metric=m, value=v) for m, v in (("kl", kl[str(cond.seed)]), ("nll", 9))
        ]

    monkeypatch.setattr(sweep.arms, "tuned", made)
    monkeypatch.setattr(sweep.scoring, "retention_rows", kept)
    of = SimpleNamespace(base=None, c=config.default(), swept_prose=(), labels=lambda cond: {})
    study = Study(tmp_path)
    assert sweep.dual_kl(of, study, 1) is None
    for seed, expected in (("0", 0.02), ("1", 0.03), ("2", None)):
        results = tmp_path / f"dual+_s{seed}/results/tuned.parquet"
        results.parent.mkdir(parents=True)
        (tmp_path / f"dual+_s{seed}/checkpoints").mkdir()
        results.touch()
        assert sweep.dual_kl(of, study, 1) == pytest.approx(expected)
    assert "the KL of the tuned dual runs is not finite" in capsys.readouterr().out
    assert sweep.dual_kl(of, study, -1) is None
