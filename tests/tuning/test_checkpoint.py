"""Checkpoints: what is kept, what damage is noticed, and that no kill loses a finished step."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from reptune_jax import train, tuned_run
from reptune_jax.hub import digest
from reptune_jax.tuning import step as steps
from reptune_jax.tuning.checkpoint import Checkpoints, Progress
from tests.support import processes, tuning_case

META = {"config": {"train": {"lr": 1e-3, "save_every": 0}}, "model_sha": "m", "vector": "v"}
KILLS = int(os.environ.get("REPTUNE_KILLS", "2"))


def state(step, dtype=jnp.float32, D=32):
    rng = np.random.default_rng(step)
    shapes = {"attn/v/kernel": (2, D, 2, 16), "mlp/up/kernel": (2, D, 48)}
    trained = {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in shapes.items()}
    made = steps.init_state(trained, FrozenConfigDict(tuning_case.settings().train))
    moments = jax.tree.map(lambda a: a if a.ndim == 0 else a + rng.normal(size=a.shape), made.opt)
    moments = jax.tree.map(lambda a, b: a.astype(b.dtype), moments, made.opt)
    return made.replace(step=jnp.int32(step), opt=moments)


def save_all(folder, keep=3, losses=((2, 0.5), (4, 0.3), (6, 0.4))):
    saved = Checkpoints(folder, keep)
    for step, loss in losses:
        saved.save(state(step), META, Progress(loss, loss, 0, 10.0 * step))
        saved.wait()
    saved.close()
    return folder


def restore(folder, meta=META, like=None):
    saved = Checkpoints(folder, 3)
    try:
        return saved.restore(like or state(0), meta)
    finally:
        saved.close()


def folders(path):
    return {p.name for p in (path / "checkpoints").iterdir()}


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return save_all(tmp_path_factory.mktemp("three"))


@pytest.fixture
def copy(three, tmp_path):
    shutil.copytree(three, tmp_path / "copy")
    return tmp_path / "copy"


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_the_newest_state_comes_back_with_its_progress(three):
    found, progress = restore(three)
    assert_equal(found, state(6))
    assert progress == Progress(0.4, 0.4, 0, 60.0)


def test_the_newest_and_the_best_are_kept_and_unmeasured_steps_are_not_best(tmp_path):
    losses = ((2, 0.5), (3, None), (4, 0.3), (5, None), (6, 0.4), (7, None))
    save_all(tmp_path, 1, losses)
    assert folders(tmp_path) == {"4", "7"}
    assert tuned_run.load(tmp_path).step == 4


def largest(folder):
    """The file that holds the numbers, where there is one."""
    files = [p for p in folder.rglob("*") if p.is_file()]
    return max(files, key=lambda p: (p.parent.name == "d", p.stat().st_size))


def flip(path, at=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 0x10
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "flipped weights": (lambda f: flip(largest(f / "trained")), "trained/"),
    "flipped moments": (lambda f: flip(largest(f / "rest")), "rest/opt/"),
    "flipped names": (lambda f: flip(f / "rest" / "_METADATA"), "rest: "),
    "truncated": (lambda f: truncate(largest(f / "trained")), "kernel: cannot be read"),
    "missing file": (lambda f: largest(f / "trained").unlink(), "kernel: cannot be read"),
    "missing item": (lambda f: shutil.rmtree(f / "rest"), "cannot be read"),
    "empty": (lambda f: [shutil.rmtree(f), f.mkdir()], "the folder is empty"),
    "flipped meta": (lambda f: flip(largest(f / "meta")), "meta"),
    "missing meta": (lambda f: shutil.rmtree(f / "meta"), "meta cannot be read"),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's own
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_set_aside_and_the_step_before_it_used(kind, copy, capsys):
    damage, named = DAMAGE[kind]
    damage(copy / "checkpoints" / "6")
    found, progress = restore(copy)
    assert_equal(found, state(4))
    assert progress.best == 0.3
    said = capsys.readouterr().out
    assert "checkpoints: step 6: " in said and named in said and "6.broken" in said
    assert folders(copy) == {"2", "4", "6.broken"}
    if kind.startswith("flipped w"):
        assert "kernel is not what was saved" in said
    saved = Checkpoints(copy, 3)  # and the run goes on
    saved.save(state(6), META, Progress())
    saved.close()
    assert_equal(restore(copy)[0], state(6))


def test_step_folders_with_exchanged_names_are_named_and_not_used(copy, capsys):
    """Each is sound in itself."""
    four, six = (copy / "checkpoints" / name for name in ("4", "6"))
    four.rename(copy / "x")
    six.rename(four)
    (copy / "x").rename(six)
    with pytest.raises(ValueError, match="step 4: the folder holds step 6, under this name"):
        tuned_run.load(copy)
    found, _ = restore(copy)
    assert_equal(found, state(2))
    said = capsys.readouterr().out
    assert "step 6: the folder holds step 4, under this name. Set aside as 6.broken" in said
    assert folders(copy) == {"2", "4.broken", "6.broken"}


def test_a_number_in_the_meta_that_was_changed_is_noticed(copy, capsys):
    """Sound JSON, another loss: only the seal can tell."""
    meta = largest(copy / "checkpoints" / "6" / "meta")
    text = meta.read_text()
    assert text.count("0.4") == 2  # val_loss and best
    meta.write_text(text.replace("0.4", "0.1"))
    found, progress = restore(copy)
    assert_equal(found, state(4))
    assert progress.best == 0.3
    assert "step 6: meta is not what was saved" in capsys.readouterr().out


def test_with_every_step_damaged_a_run_begins_anew(copy, capsys):
    for step in "246":
        flip(largest(copy / "checkpoints" / step / "trained"))
    assert restore(copy) is None
    assert capsys.readouterr().out.count("Set aside") == 3


def test_an_evaluation_does_not_measure_damaged_weights(copy):
    flip(largest(copy / "checkpoints" / "4" / "trained"))
    with pytest.raises(ValueError, match=r"step 4: trained/.*kernel is not what was saved"):
        tuned_run.load(copy)
    assert folders(copy) == {"2", "4", "6"}


def test_another_run_is_named_and_left_alone(three):
    with pytest.raises(
        ValueError, match="step 6 belongs to another run:\n  vector: 'v' there, 'w'"
    ):
        restore(three, META | {"vector": "w"})
    with pytest.raises(ValueError, match=r"model_sha: 'm' there, 'n' now"):
        restore(three, META | {"model_sha": "n"})
    train_, whole = FrozenConfigDict(tuning_case.settings().train), state(0).trained
    for trained, message in (
        (whole | {"mlp/down/bias": jnp.zeros(3)}, r"down/bias: got None, expected float32\[3\]"),
        ({"mlp/up/kernel": whole["mlp/up/kernel"]}, r"v/kernel: got float32.*, expected None"),
    ):
        with pytest.raises(ValueError, match=message):
            restore(three, like=steps.init_state(trained, train_))
    other = {"train": {"lr": 5e-3, "save_every": 7}}
    with pytest.raises(ValueError, match=r"train.lr: 0.001 there, 0.005 now\n"):
        restore(three, META | {"config": other})
    with pytest.raises(ValueError, match=r"attn/v/kernel: got float32\[2, 32, 2, 16\], expected"):
        restore(three, like=state(0, D=64))
    with pytest.raises(ValueError, match=r"kernel: got float32.*, expected bfloat16"):
        restore(three, like=state(0, jnp.bfloat16))
    assert folders(three) == {"2", "4", "6"}


def test_a_step_that_is_there_is_not_silently_skipped(copy):
    saved = Checkpoints(copy, 3)
    with pytest.raises(ValueError, match=r"step 6 was not saved, because .* holds step 6"):
        saved.save(state(6), META, Progress())
    saved.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's own
def test_a_full_disk_is_one_line_and_earlier_steps_are_intact(copy):
    saved, (soft, hard) = Checkpoints(copy, 3), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
        with pytest.raises(OSError, match=r"a save into .* failed .*Intact: steps 2, 4, 6") as e:
            saved.save(state(8), META, Progress())
            saved.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(str(e.value).splitlines()) == 1
    assert_equal(restore(copy)[0], state(6))


def test_a_save_that_fails_at_once_does_not_count_the_one_before_it_as_lost(copy, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "meta")

    saved = Checkpoints(copy, 3)
    saved.save(state(8), META, Progress())  # under way, and none of what follows is its fault
    monkeypatch.setattr(saved._manager, "save", full)
    with pytest.raises(OSError, match=r"Intact: steps 4, 6, 8\. Free some space"):
        saved.save(state(9), META, Progress())
    saved.close()


def test_a_digest_sees_one_bit_and_two_exchanged_words():
    a = np.arange(1, 25, dtype=np.float32).reshape(2, 3, 4)
    b, c = a.copy(), a.copy()
    b.view(np.uint32)[1, 2, 3] ^= 1
    c[0, 0, 0], c[1, 1, 1] = a[1, 1, 1], a[0, 0, 0]
    found = {digest.digests({"x": x})["x"] for x in (a, b, c, a.reshape(6, 4))}
    assert len(found) == 3  # the last is the first: positions count in memory order
    assert digest.digests({"x": jnp.asarray(a)}) == digest.digests({"x": a})
    assert digest.digests({"x": a, "y": b})["y"] == digest.digests({"y": b})["y"]
    assert digest.digests({"x": jnp.asarray(a, jnp.bfloat16)})["x"] not in found


def test_exchanged_numbers_are_not_what_was_saved():
    """Their plain sum, half of a digest, is the same."""
    a = np.arange(1, 9, dtype=np.float32)
    meta = {"leaves": {"x": f"float32[8] {digest.digests({'x': a})['x']}"}}
    tuned_run.check_digests(3, meta, {"x": a.copy()})
    with pytest.raises(tuned_run.Broken, match="step 3: x is not what was saved"):
        tuned_run.check_digests(3, meta, {"x": a[::-1].copy()})


def test_the_best_of_equals_is_the_earliest_and_steps_are_in_order_of_numbers(tmp_path):
    def meta(loss):
        return {"progress": list(Progress(loss, loss))}

    assert tuned_run.best_step({9: meta(0.3), 4: meta(0.3), 2: meta(0.5), 12: meta(None)}) == 4
    for name in ("9", "100", "10", "10.broken"):
        (tmp_path / name).mkdir()
    assert [f.name for f in tuned_run.step_folders(tmp_path)] == ["9", "10", "100"]


# ---------------------------------------------------------------- real processes, real signals


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """And a run of it that nothing disturbed."""
    folder = tmp_path_factory.mktemp("study")
    study = processes.Study(folder, train__steps=60, train__eval_every=20, train__batch=4)
    whole = train.run(study.c, study.workdir("whole"))
    return study, whole


def read_log(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k not in processes.TIMES} for line in lines
    ]


def assert_same_run(a, b):
    assert read_log(a) == read_log(b)
    x, y = tuned_run.load(a), tuned_run.load(b)
    assert x.step == y.step
    assert_equal(x.trained, y.trained)
    assert (a / "done.json").read_text() == (b / "done.json").read_text()


def test_sigterm_saves_and_the_same_command_goes_on_to_the_same_bits(study):
    study, whole = study
    workdir = study.workdir("sigterm")
    first = study.start("train", workdir, sleep=0.1)
    first.until("step 3/60")
    began = time.monotonic()
    first.process.send_signal(signal.SIGTERM)
    said = first.check(128 + signal.SIGTERM)
    assert time.monotonic() - began < 20
    assert "stopped by SIGTERM: step " in said
    step = int(said.split("stopped by SIGTERM: step ")[1].split()[0])
    assert 3 <= step < 60 and str(step) in folders(workdir / whole.name)
    again = study.start("train", workdir).check()
    assert f"step {step + 1}/60" in again and f"step {step}/60" not in again
    assert_same_run(workdir / whole.name, whole)


def test_kill_9_never_loses_a_finished_step(study):
    study, whole = study
    workdir, rng = study.workdir("kill"), random.Random(0)
    run = workdir / whole.name
    finished = -1
    for _ in range(KILLS):
        one = study.start("train", workdir, "--config.train.save_every=1", sleep=0.02)
        line = one.until("/60 ")
        assert int(line.split("step ")[1].split("/")[0]) > finished  # nothing is done again
        time.sleep(rng.uniform(0, 0.8))
        there = [int(n) for n in folders(run) if n.isdigit()]
        one.process.kill()
        one.end()
        finished = max(there)
        if (run / "done.json").exists():
            break
    study.start("train", workdir).check()
    assert not [n for n in folders(run) if "tmp" in n or "broken" in n]
    assert_same_run(run, whole)
