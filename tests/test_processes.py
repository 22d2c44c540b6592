"""Two real processes of two CPU devices each: training, stopping, resuming, evaluating together."""

import json
import signal

import numpy as np
import pyarrow.parquet as pq
import pytest

from reptune_jax import distributed, train, tuned_run
from reptune_jax.evals import steering, tuned
from tests.support import processes, tiny_behavior

FLAGS = ("--config.mesh.fsdp=2",)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """And the run of one process with one device."""
    folder = tmp_path_factory.mktemp("study")
    # A large eps: else Adam turns rounding noise in tiny gradients into whole steps.
    settings = {"train__steps": 16, "train__eval_every": 8, "train__batch": 4}
    study = processes.Study(
        folder, **settings, loss__retain=0.5, train__retain_batch=4, train__eps=1e-3
    )
    with pytest.MonkeyPatch.context() as patch:
        tiny_behavior.patch_neutral(patch)
        alone = train.run(study.c, study.workdir("alone"))
        tuned.run(study.c, alone.parent)
    return study, alone


def read_log(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {(r["step"], k): v for r in rows for k, v in r.items() if k.endswith("loss")}


@pytest.fixture(scope="module")
def together(study):
    """(output of the stopped start, output of the one that went on, the run's folder)."""
    study, alone = study
    workdir = study.workdir("together")
    first = study.pair("train", workdir, *FLAGS, sleep=0.3)
    first[0].until("step 2/16")
    first[1].process.send_signal(signal.SIGTERM)
    stopped = [p.check(128 + signal.SIGTERM) for p in first]
    again = [p.check() for p in study.pair("train", workdir, *FLAGS)]
    return stopped, again, workdir / alone.name


def test_sigterm_to_one_stops_both_at_the_same_step(together):
    stopped, again, folder = together
    step = int(stopped[0].split("stopped by SIGTERM: step ")[1].split()[0])
    assert 2 <= step < 16
    assert f"step {step + 1}/16" in again[0] and f"step {step}/16" not in again[0]
    assert json.loads((folder / "done.json").read_text())["steps"] == 16


def test_only_the_first_process_writes_and_speaks(together):
    stopped, again, folder = together
    assert "step 2/16" in stopped[0] and again[0]
    assert not stopped[1] and not again[1]
    assert len(list(folder.glob("events.*"))) == 2  # one a start
    assert json.loads((folder.parent / "config.json").read_text())["processes"] in (1, 2)


def test_losses_and_weights_are_those_of_one_process(together, study):
    ours, theirs = read_log(together[2]), read_log(study[1])
    assert ours.keys() == theirs.keys() and len(ours) > 60
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key
    a, b = (tuned_run.load(folder) for folder in (together[2], study[1]))
    assert a.step == b.step
    for path in a.trained:
        np.testing.assert_allclose(a.trained[path], b.trained[path], rtol=1e-5, atol=1e-5)


KEY = ("arm", "sign", "k", "metric", "split", "item_id", "layer", "position")


def values(folder, name):
    """The numbers of a results table by what they are of; generated texts may part ways."""
    rows = pq.read_table(folder / "results" / f"{name}.parquet").to_pylist()
    rows = [r for r in rows if r["metric"] in ("logodds", "kl", "nll", "cos")]
    found = {tuple(r[k] for k in KEY): r["value"] for r in rows}
    assert len(found) > 20
    return found


def test_both_evaluate_and_find_what_one_does(together, study):
    (study, alone), folder = study, together[2]
    for p in study.pair("evals.tuned", folder.parent, *FLAGS):
        p.check()
    ours, theirs = values(folder, "tuned"), values(alone, "tuned")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key


def test_both_steer_the_untuned_model_as_one_does(study, monkeypatch):
    """A sweep, with the doses that it chooses."""
    study, _ = study
    alone, together = (study.workdir(f"steering {who}") for who in ("alone", "together"))
    tiny_behavior.patch_neutral(monkeypatch)
    steering.run(study.c, alone)
    first, second = study.pair("evals.steering", together, *FLAGS)
    assert "steering: " in first.check() and not second.check()
    ours, theirs = values(together, "steering"), values(alone, "steering")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key


@pytest.mark.parametrize("what", ["config", "behavior"])
def test_hosts_that_disagree_stop_and_both_values_are_named(what, study, tmp_path):
    study, _ = study
    rows, workdir, cwds = (
        study.behavior.read_text(),
        tmp_path / "work",
        (tmp_path / "a", tmp_path / "b"),
    )
    for cwd in cwds:  # each its own file of one name
        cwd.mkdir()
        (cwd / "sentiment.jsonl").write_text(rows)
    each = [[], ["--config.train.lr=0.5"] if what == "config" else []]
    if what == "behavior":
        (cwds[1] / "sentiment.jsonl").write_text(rows.replace("mountains", "moorland"))
    flags = (*FLAGS, "--config.behavior=sentiment.jsonl")
    pair = study.pair("train", workdir, *flags, each=each, cwds=cwds)
    assert [p.end() for p in pair] == [1, 1]
    errors = ["".join(p.err) for p in pair]
    for error in errors:
        assert f"error: {what}: got '" in error and "on process 0 and '" in error
        assert "Traceback" not in error


def test_some_of_the_flags_are_an_error():
    with pytest.raises(ValueError, match="expected all three or none"):
        distributed.start(coordinator="localhost:1")


def test_one_process_needs_no_start():
    distributed.same(x="a")
    assert distributed.agree(True) and not distributed.everywhere(False)
    assert not distributed.stop_asked()
    wrote = []
    distributed.once(lambda: wrote.append(1))
    assert wrote == [1]
    with pytest.raises(OSError, match="full"):
        distributed.once(lambda: (_ for _ in ()).throw(OSError("full")))
