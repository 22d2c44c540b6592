"""Runs trained together are the runs trained alone: numbers, folders, stopping, what is shared."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reptune_jax import distributed, lm, program, study, train
from reptune_jax.tuning import checkpoint, cost, fleet
from reptune_jax.tuning import step as steps
from reptune_jax.tuning.run import Run
from reptune_jax.vectors.steering_vector import SteeringVector
from tests import lora_case, tiny, tiny_behavior, tuning_case
from tests.test_loop import Stop, read_log, stop_at

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
    c.study.arms = ("dual", "random", "out")
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


def steps_of(folder):
    return json.loads((folder / "done.json").read_text())["steps"]


def test_runs_together_are_those_alone(trained, model, tmp_path):
    """Arms x signs x seeds; the signless `out` has other rows, and is a fleet of its own."""
    c, _, folders = trained
    train.together(study.runs(c), tmp_path, model)
    assert {f.name for f in folders} == {p.parent.name for p in tmp_path.glob("*/done.json")}
    assert len(folders) == 10
    assert_same_runs(tmp_path, folders)
    for theirs in folders:
        ours = tmp_path / theirs.name
        assert names_in(ours) == names_in(theirs)
        assert (
            json.loads((ours / "config.json").read_text())["config"]
            == (json.loads((theirs / "config.json").read_text())["config"])
        )
        vectors = [SteeringVector.load(f / "vector.safetensors") for f in (ours, theirs)]
        assert vectors[0].digest == vectors[1].digest


def names_in(folder):
    """Files, but for TensorBoard's, which are named after the time, and Orbax's own."""
    files = {str(p.relative_to(folder)) for p in folder.glob("*") if "events" not in p.name}
    events = len(list(folder.glob("events.*")))
    return files | {f"checkpoints/{p.name}" for p in (folder / "checkpoints").iterdir()} | {events}


def test_groups_at_once_as_on_accelerators_are_the_same(trained, model, monkeypatch, tmp_path):
    c, _, folders = trained
    monkeypatch.setattr(fleet, "_at_once", lambda: True)
    first = [one for one in study.runs(c) if one.seed == 0 and one.arm != "out"]
    train.together(first, tmp_path, model)
    assert_same_runs(tmp_path, [f for f in folders if f.name[-1] == "0" and "out" not in f.name])


def test_what_is_finished_is_left_alone_and_the_rest_joins(trained, model, tmp_path):
    """Two arms of a group are there, one of them half trained: it waits for the others."""
    c, _, folders = trained
    plus = [one for one in study.runs(c) if one.sign > 0 and one.seed == 0 and one.arm != "out"]
    done = train.run(plus[0], tmp_path, model)
    before = {p: p.stat().st_mtime_ns for p in done.rglob("*")}
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 5)  # its checkpoint is of step 4
        with pytest.raises(Stop):
            train.run(plus[1], tmp_path, model)
    fewer = [one for one in study.runs(c) if one.seed == 0 and one.arm != "out"]
    for one in fewer:
        one.study.together = True
    train.together(fewer, tmp_path, model)
    assert {p: p.stat().st_mtime_ns for p in done.rglob("*")} == before
    assert_same_runs(tmp_path, [f for f in folders if f.name[-1] == "0" and "out" not in f.name])


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_stopped_fleet_resumes_to_the_same_bits(step, model, behavior, monkeypatch, tmp_path):
    c = settings(model, behavior)
    c.study.signs = (1,)
    train.together(study.runs(c), tmp_path / "whole", model)
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(Stop):
            train.together(study.runs(c), tmp_path / "cut", model)
    assert not list((tmp_path / "cut").glob("*/done.json"))
    train.together(study.runs(c), tmp_path / "cut", model)
    assert_same_bits(tmp_path / "cut", tmp_path / "whole", 3)


def test_at_a_sigterm_every_run_is_saved(model, behavior, monkeypatch, tmp_path):
    c = settings(model, behavior)
    c.study.signs, c.study.arms = (1,), ("dual", "random")
    train.together(study.runs(c), tmp_path / "whole", model)
    asked = iter([False] * 4 + [True])  # before either run, then after steps 1, 2 and 3
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "stop_asked", lambda: next(asked))
        with pytest.raises(program.Stopped, match="step 3 of 6 is saved"):
            train.together(study.runs(c), tmp_path / "cut", model)
    for folder in (tmp_path / "cut").glob("*/checkpoints"):
        assert "3" in {p.name for p in folder.iterdir()}
    train.together(study.runs(c), tmp_path / "cut", model)
    assert_same_bits(tmp_path / "cut", tmp_path / "whole", 2)


def test_a_kill_between_two_saves_resumes_to_the_same_bits(model, behavior, monkeypatch, tmp_path):
    """One arm has saved step 4, the other has not."""
    c = settings(model, behavior)
    c.study.signs, c.study.arms = (1,), ("dual", "random")
    train.together(study.runs(c), tmp_path / "whole", model)
    save = Run.save

    def once(self, state, val_loss=None):
        if int(state.step) == 4 and self.c.arm == "random":
            raise Stop
        save(self, state, val_loss)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", once)
        with pytest.raises(Stop):
            train.together(study.runs(c), tmp_path / "cut", model)
    found = [(tmp_path / "cut" / f"{arm}+_s0" / "checkpoints") for arm in ("dual", "random")]
    newest = [max(int(p.name) for p in f.iterdir() if p.name.isdigit()) for f in found]
    assert newest == [4, 2]
    train.together(study.runs(c), tmp_path / "cut", model)
    assert_same_bits(tmp_path / "cut", tmp_path / "whole", 2)


def assert_same_bits(cut, whole, runs):
    folders = [p.parent for p in whole.glob("*/done.json")]
    assert len(folders) == runs
    for folder in folders:
        assert read_log(cut / folder.name) == read_log(folder)
        (ours, _, a), (theirs, _, b) = map(checkpoint.load_best, (cut / folder.name, folder))
        assert a == b
        for path, leaf in theirs.items():
            assert leaf.tobytes() == ours[path].tobytes(), path


def test_each_run_has_its_own_patience(model, behavior, tmp_path):
    """Others go on when one has stopped, and it is not touched any more."""
    changes = {"train__lr": 0.01, "train__steps": 20, "train__patience": 2}
    c = settings(model, behavior, **changes)
    c.study.signs, c.study.arms = (1,), ("token", "vector", "dual")
    folders = alone(c, tmp_path / "alone", model)
    assert len({steps_of(f) for f in folders}) > 1, "choose other settings"
    train.together(study.runs(c), tmp_path / "fleet", model)
    for theirs in folders:
        ours = tmp_path / "fleet" / theirs.name
        assert steps_of(ours) == steps_of(theirs)
        assert [r["step"] for r in read_log(ours)] == [r["step"] for r in read_log(theirs)]


def test_a_run_that_diverges_is_named(model, behavior, tmp_path):
    c = settings(model, behavior, train__lr=1e30, train__eval_every=5)
    c.study.signs, c.study.arms = (1,), ("dual", "token")
    with pytest.raises(ValueError, match=r"dual\+_s0: training, step 2: loss is nan"):
        train.together(study.runs(c), tmp_path, model)


def test_runs_are_arranged_by_the_rows_they_see(trained, model):
    c, workdir, _ = trained
    jobs = [train.make_job(one, workdir, model) for one in study.runs(c)]
    found = [[[j.folder.name for j in group] for group in groups] for groups in fleet.arrange(jobs)]
    assert found == [
        [
            [f"{arm}{sign}_s{seed}" for arm in ("dual", "random")]
            for seed in (0, 1)
            for sign in "+-"
        ],
        [["out+_s0"], ["out+_s1"]],
    ]


# ------------------------------------------------------------------ what is shared


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "one by one"])
def test_arms_share_the_layers_below_and_the_bases_logits(at_once, model):
    """FLOPs of matrix products in a step's program, by the number of arms."""
    c = lora_case.settings(loss__retain=0.5, train__layers=(2, 4), loss__layers=(2, 4))
    case = tuning_case.case(model, c)
    batch = tuning_case.batch(model, B=4, R=4)
    one = dot_flops(
        jax.make_jaxpr(steps.make_step(case.decoder, case.train))(
            case.state, case.task, batch, jnp.asarray(True)
        ).jaxpr
    )
    G, found = 2, []
    for arms in (1, 2, 4):
        stacked = jax.tree.map(
            lambda a, shape=(G, arms): jnp.broadcast_to(a, (*shape, *jnp.shape(a))),
            (case.state, case.task.replace(frozen={})),
        )
        rows = jax.tree.map(lambda a: np.stack([a] * G), batch)
        step = fleet.make_step(case.decoder, case.train, at_once)
        active = jnp.ones((G, arms), bool)
        args = *stacked, case.task.frozen, rows, jnp.asarray(True), active
        found.append(dot_flops(jax.make_jaxpr(step)(*args).jaxpr) / G)
    own = (found[2] - found[1]) / 2  # of one more arm
    assert found[0] == pytest.approx(one, rel=1e-6)
    assert found[1] - found[0] == pytest.approx(own, rel=1e-6)
    tokens, positions = 8 * tuning_case.T, batch.keep.at_BxL.size
    below = 2 * cost.layer_flops(model.arch, tokens, tuning_case.T)
    base = 2.0 * positions * model.arch.D * model.arch.V
    evaluations = 1 + len(case.task.weight_J)  # in a step that measures: the sum, each loss alone
    assert one - own >= evaluations * below + base


def dot_flops(jaxpr):
    """Of matrix products: a loop's as often as it goes round, of a cond the larger branch."""
    total = 0.0
    for eqn in jaxpr.eqns:
        inner = [dot_flops(sub) for sub in _subjaxprs(eqn.params)]
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            size = np.prod([eqn.invars[0].aval.shape[axis] for axis in contracted])
            total += 2.0 * float(size) * eqn.outvars[0].aval.size
        elif eqn.primitive.name == "cond":
            total += max(inner)
        else:
            total += eqn.params.get("length", 1) * sum(inner)
    return total


def _subjaxprs(params):
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if hasattr(each, "eqns") or hasattr(each, "jaxpr"):
                yield getattr(each, "jaxpr", each)


# ------------------------------------------------------------------ the study


def test_a_study_together_leaves_the_same_folders(model, behavior, tmp_path):
    found = {}
    for together in (False, True):
        c = settings(model, behavior, train__steps=2)
        c.study.arms, c.study.signs = ("base", "dual", "token"), (1,)
        c.study.together = together
        study.run(c, tmp_path / str(together))
        found[together] = tmp_path / str(together)
    names = [
        sorted(str(p.relative_to(f)) for p in f.rglob("*") if _lasting(p.relative_to(f)))
        for f in found.values()
    ]
    assert names[0] == names[1]
    assert any("results/tuned.parquet" in name for name in names[0])
    assert_same_runs(found[True], [found[False] / "dual+_s0", found[False] / "token+_s0"])


def _lasting(path):
    """Orbax's and TensorBoard's files have names of their own."""
    return "events" not in path.name and not {"trained", "rest", "meta"} & set(path.parts)


def test_whole_weights_cannot_be_trained_together(model, behavior):
    with pytest.raises(ValueError, match=r"train.lora.rank: got 0, expected more than 0 with"):
        tiny_behavior.settings(model.name, behavior, study__together=True)
