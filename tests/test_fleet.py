"""Runs trained together are the runs trained alone: numbers, folders, stopping, what is shared."""

import numpy as np
import pytest

from reptune_jax import lm, study, train
from reptune_jax.tuning import checkpoint
from tests import tiny, tiny_behavior
from tests.test_loop import read_log

# Other shapes mean other orders of summation: a few units in the last place a step, which Adam's
# first steps, of gradients near zero, make larger. `eps` keeps those small.
TOLERANCE = 1e-5
LORA = {"train__lora__rank": 4, "train__eps": 1e-3, "loss__retain": 0.5}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    tiny_behavior.keep_programs(tmp_path_factory.mktemp("programs"))
    return lm.load(str(tiny.make_llama(tmp_path_factory.mktemp("llama"))), "float32")


@pytest.fixture(scope="module")
def behavior(tmp_path_factory):
    return tiny_behavior.write(tmp_path_factory.mktemp("behavior"))


@pytest.fixture(autouse=True)
def neutral(monkeypatch):
    tiny_behavior.patch_neutral(monkeypatch)


def settings(model, behavior, **changes):
    c = tiny_behavior.settings(model.name, behavior, **{**LORA, **changes})
    c.study.arms = c.study.get("arms") if "study__arms" in changes else ("dual", "random", "out")
    return c


def alone(c, workdir, model):
    return [train.run(one, workdir, model) for one in study.runs(c)]


def assert_same_runs(workdir, folders):
    """Logs, best steps and trained leaves, to TOLERANCE of the largest number of a leaf."""
    for theirs in folders:
        ours = workdir / theirs.name
        logs = read_log(ours), read_log(theirs)
        assert [r.keys() for r in logs[0]] == [r.keys() for r in logs[1]], theirs.name
        for a, b in zip(*logs, strict=True):
            assert a == pytest.approx(b, rel=TOLERANCE, abs=TOLERANCE), (theirs.name, b["step"])
        (got, got_meta, got_step), (want, meta, step) = map(checkpoint.load_best, (ours, theirs))
        assert got_step == step and got_meta["vector"] == meta["vector"]
        assert got.keys() == want.keys()
        for path, leaf in want.items():
            np.testing.assert_allclose(
                got[path], leaf, rtol=0, atol=TOLERANCE * np.abs(leaf).max(), err_msg=path
            )
            assert got[path].any() or not leaf.any(), path


@pytest.fixture(scope="module")
def trained(model, behavior, tmp_path_factory):
    """(config, work folder, run folders) of runs that were trained one by one."""
    with pytest.MonkeyPatch.context() as patch:
        tiny_behavior.patch_neutral(patch)
        c = settings(model, behavior)
        c.study.seeds = (0, 1)
        workdir = tmp_path_factory.mktemp("alone")
        return c, workdir, alone(c, workdir, model)


def test_runs_together_are_those_alone(trained, model, tmp_path):
    c, _, folders = trained
    train.together(study.runs(c), tmp_path, model)
    assert len(folders) == 10
    assert_same_runs(tmp_path, folders)
