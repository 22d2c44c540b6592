"""A training run end to end on a tiny model: its log, its checkpoints, stopping and resuming."""

import contextlib
import json
import math
import types

import numpy as np
import pytest

from reptune_jax import config, folder, lm, train, tuned_run
from reptune_jax.evals import arms
from reptune_jax.tuning import loop
from reptune_jax.tuning.run import Run
from reptune_jax.vectors.steering_vector import SteeringVector
from reptune_jax.watch.log import Log
from tests.support import tiny, tiny_behavior
from tests.support.runs import Stop, read_log, stop_at


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return lm.load(str(tiny.make_llama(tmp_path_factory.mktemp("llama"))), "float32")


@pytest.fixture(scope="module")
def behavior(tmp_path_factory):
    return tiny_behavior.write(tmp_path_factory.mktemp("behavior"))


@pytest.fixture(autouse=True)
def neutral(monkeypatch):
    tiny_behavior.patch_neutral(monkeypatch)


@pytest.fixture(scope="module")
def finished(model, behavior, tmp_path_factory):
    """A run that nothing disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        tiny_behavior.patch_neutral(patch)
        c = tiny_behavior.settings(model.name, behavior, loss__retain=0.5)
        return c, train.run(c, tmp_path_factory.mktemp("study"), model)


def test_the_log_holds_what_a_run_promises(finished):
    c, folder = finished
    rows = read_log(folder)
    trained = [r for r in rows if "loss" in r]
    validated = [r for r in rows if "val/loss" in r]
    assert [r["step"] for r in trained] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in validated] == [0, 2, 4, 6]
    assert steps_with_a_speed(folder) == [2, 3, 4, 5, 6]
    names = [
        "token_loss",
        "cosine_loss",
        "retain_loss",
        "cosine/mean",
        "grad_norm",
        "grad_norm/token",
        "lr",
    ]
    names += ["grad_norm/token", "grad_norm/cosine", "grad_norm/retain", "grad_norm/conflict"]
    names += [f"cosine/layer_{n:02d}" for n in range(4)]
    for row in trained:
        assert set(names) <= row.keys() and all(math.isfinite(row[k]) for k in names)
        expected = row["token_loss"] + row["cosine_loss"] + 0.5 * row["retain_loss"]
        expected += 0.1 * row["ending_loss"]
        assert row["loss"] == pytest.approx(expected, rel=1e-5)
        mean = (row["cosine/layer_01"] + row["cosine/layer_02"]) / 2
        assert row["cosine/mean"] == pytest.approx(mean, abs=1e-6)
    assert trained[0]["retain_loss"] == pytest.approx(0, abs=1e-5)  # the base itself
    assert trained[-1]["retain_loss"] > 1e-4
    assert validated[-1]["val/loss"] < validated[0]["val/loss"]
    assert trained[0]["lr"] == pytest.approx(c.train.lr)
    lowest = [min(r["val/loss"] for r in validated[: n + 1]) for n in range(4)]
    assert [r["val/best"] for r in validated] == lowest


def test_steps_reported_late_say_the_same_and_no_speed_that_was_not_seen(
    finished, model, monkeypatch, tmp_path
):
    class Late(Run):
        def __init__(self, *args):
            super().__init__(*args)
            self.late = True

    monkeypatch.setattr(loop, "Run", Late)
    c, folder = finished
    late = train.run(c, tmp_path, model)
    # Before a validation a step is reported right behind its predecessor.
    assert steps_with_a_speed(late) == [3, 5]
    assert read_log(late) == read_log(folder)


def steps_with_a_speed(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [r["step"] for r in rows if "examples_per_s" in r]


def test_the_checkpoint_is_the_best_one_and_says_where_it_comes_from(finished, model):
    c, folder = finished
    run = tuned_run.load(folder)
    _, meta, step = run.trained, run.meta, run.step
    validated = {r["step"]: r["val/loss"] for r in read_log(folder) if "val/loss" in r}
    assert step == min(validated, key=validated.get)
    assert meta["model_sha"] == model.sha and meta["config"]["train"]["lr"] == c.train.lr
    done = json.loads((folder / "done.json").read_text())
    assert done == {"steps": 6, "best": min(validated.values())}


def test_a_finished_run_is_left_alone(finished, model):
    c, folder = finished
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert train.run(c, folder.parent, model) == folder
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


@pytest.mark.parametrize("step", [1, 4, 5])
def test_a_stopped_run_resumes_to_the_same_bits(step, finished, model, monkeypatch, tmp_path):
    c, folder = finished
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(Stop):
            train.run(c, tmp_path, model)
    assert not (tmp_path / folder.name / "done.json").exists()
    resumed = train.run(c, tmp_path, model)
    assert read_log(resumed) == read_log(folder)
    ours, theirs = tuned_run.load(resumed), tuned_run.load(folder)
    assert ours.step == theirs.step
    for path, leaf in theirs.trained.items():
        assert leaf.tobytes() == ours.trained[path].tobytes()


def test_the_best_step_is_kept_when_later_ones_are_worse(model, behavior, tmp_path, capsys):
    c = tiny_behavior.settings(model.name, behavior, loss__retain=0.5, train__lr=1.0)
    folder = train.run(c, tmp_path, model)
    validated = {r["step"]: r["val/loss"] for r in read_log(folder) if "val/loss" in r}
    best = min(validated, key=validated.get)
    assert best < 6  # a rate of 1 destroys the model, which is said while it goes on
    token = {r["step"]: r["val/token_loss"] for r in read_log(folder) if "val/loss" in r}
    said, text = "validation is worse than before training", capsys.readouterr()
    assert (text.out + text.err).count(said) == sum(v > token[0] for v in token.values()) > 0
    run = tuned_run.load(folder)
    trained, _, step = run.trained, run.meta, run.step
    assert step == best
    kept = {int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit()}
    assert kept == {best, 6}
    if best == 0:
        v = np.asarray(model.params["blocks"]["attn"]["v"]["kernel"])[1:3]
        assert (trained["attn/v/kernel"] == v).all()


def test_patience_stops_a_run_also_after_a_restart(model, behavior, monkeypatch, tmp_path):
    c = tiny_behavior.settings(
        model.name, behavior, loss__retain=0.5, train__lr=1.0, train__steps=20, train__patience=2
    )
    whole = train.run(c, tmp_path / "whole", model)
    stopped = json.loads((whole / "done.json").read_text())["steps"]
    assert stopped < 20
    with monkeypatch.context() as patch:
        stop_at(patch, stopped - 1)
        with pytest.raises(Stop):
            train.run(c, tmp_path / "cut", model)
    cut = train.run(c, tmp_path / "cut", model)
    assert (cut / "done.json").read_text() == (whole / "done.json").read_text()


def test_a_loss_that_is_no_number_ends_the_run_and_is_not_saved(model, behavior, tmp_path):
    c = tiny_behavior.settings(model.name, behavior, train__eval_every=5)
    c.train.lr = 1e30  # beyond what a config may say
    c.train.save_every = 1
    message = r"training, step 2: loss is nan, .*The last good checkpoint is of step 1\. Lower"
    with pytest.raises(ValueError, match=message):
        train.run(c, tmp_path, model)
    folder = tmp_path / "dual+_s0"
    assert not (folder / "done.json").exists()
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"0", "1"}
    assert read_log(folder)[-1]["step"] == 2  # it is in the log, as null


def test_saves_by_step_and_by_time_change_nothing_else(model, behavior, tmp_path):
    steps = {}
    for name, changes in {
        "evaluations": {},
        "steps": {"train__save_every": 3},
        "time": {"train__save_minutes": 1e-9},
    }.items():
        c = tiny_behavior.settings(model.name, behavior, train__keep=9, **changes)
        folder = train.run(c, tmp_path / name, model)
        steps[name] = {int(p.name) for p in (folder / "checkpoints").iterdir()}
    assert steps == {
        "evaluations": {0, 2, 4, 6},
        "steps": {0, 2, 3, 4, 6},
        "time": {0, 1, 2, 3, 4, 5, 6},
    }
    logs = [read_log(tmp_path / name / folder.name) for name in steps]
    assert logs[0] == logs[1] == logs[2]
    seconds = [tuned_run.read_meta(folder / "checkpoints" / str(n))["progress"][3] for n in (2, 6)]
    assert 0 < seconds[0] < seconds[1]


def test_where_the_peak_is_unknown_no_mfu_is_logged(finished):
    assert not [row for row in read_log(finished[1]) if "mfu" in row]


def test_the_steps_of_a_window_are_traced(model, behavior, tmp_path):
    c = tiny_behavior.settings(model.name, behavior, train__steps=3, train__profile=(1, 3))
    folder = train.run(c, tmp_path, model)
    assert list((folder / "profile").rglob("*.xplane.pb"))
    with pytest.raises(ValueError, match=r"train.profile: got \(2, 9\), expected first < stop <="):
        tiny_behavior.settings(model.name, behavior, train__profile=(2, 9))


def test_what_is_left_counts_the_time_of_earlier_starts(tmp_path, capsys):
    with contextlib.closing(Log(tmp_path, 40, 10, spent=3000.0)) as log:
        log.begin()
        log.progress(20, {"loss": 1.0})
    assert "step 20/40 loss 1, 50 min 00 s left" in capsys.readouterr().out


def test_a_folder_of_another_config_is_refused_by_key(finished, model):
    c, folder = finished
    other = c.copy_and_resolve_references()
    other.train.lr, other.loss.mode = 0.5, "out"
    with pytest.raises(ValueError, match=r"loss.mode: 'in' there, 'out' now; train.lr: 0.003"):
        train.run(other, folder.parent, model)


def test_a_study_may_grow(finished, model):
    c, folder = finished
    more = c.copy_and_resolve_references()
    more.study.seeds = (0, 1, 2)
    assert train.run(more, folder.parent, model) == folder


def test_arms_that_train_nothing_are_refused(finished, model, tmp_path):
    c, _ = finished
    other = c.copy_and_resolve_references()
    other.arm = "steer"
    with pytest.raises(ValueError, match="arm: got 'steer', expected one of token, vector"):
        train.run(other, tmp_path, model)
    assert not list(tmp_path.iterdir())


def test_the_random_arm_keeps_the_vector_it_used(finished, model, behavior, tmp_path):
    c = tiny_behavior.settings(model.name, behavior, arm="random", loss__retain=0.5, train__steps=1)
    folder = train.run(c, tmp_path, model)
    used = SteeringVector.load(folder / "vector.safetensors")
    vector = SteeringVector.load(tmp_path / "vector.safetensors")
    assert used.meta["method"] == "random:0" and used.digest != vector.digest
    assert tuned_run.load(folder).meta["vector"] == used.digest


def test_a_checkpoint_of_another_base_model_is_refused(finished, model, tmp_path):
    _, folder = finished
    other = lm.load(str(tiny.make_llama(tmp_path, seed=1)), "float32")
    assert arms.tuned(model, folder).arm == "dual"
    with pytest.raises(ValueError, match=r"tuned from .*expected the same"):
        arms.tuned(other, folder)
    with pytest.raises(FileNotFoundError, match="no checkpoints there"):
        arms.tuned(model, tmp_path)


def test_a_split_without_examples_is_an_error(model, behavior, tmp_path):
    rows = [json.loads(line) for line in behavior.read_text().splitlines()]
    path = tmp_path / "short.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows if r.get("split") != "val"))
    c = tiny_behavior.settings(model.name, path)
    with pytest.raises(ValueError, match=r"has no open prompts in split 'val'"):
        train.run(c, tmp_path / "study", model)


@pytest.mark.parametrize(
    "claims,token_loss,said",
    [
        (True, 0.695, "is that of one verdict for all claims (ln 2)"),
        (True, 0.6, ""),
        (True, 1.1, "is worse than before training"),
        (False, 0.695, ""),  # of answers in words ln 2 means nothing
    ],
)
def test_a_run_that_unlearns_says_so(claims, token_loss, said, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "val/token_loss": 1.0}\n')
    run = Run.__new__(Run)
    run.folder, run.claims, run.c = folder.Run(tmp_path), claims, config.default()
    run.objective = types.SimpleNamespace(weight_J=[1.0])
    run._warn(0, 5.0)
    assert capsys.readouterr().out == ""
    run._warn(8, token_loss)
    out = capsys.readouterr().out
    assert said in out and bool(out) == bool(said)
