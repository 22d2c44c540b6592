"""One writer for a folder: who is refused, who takes over, what is left."""

import contextlib
import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from reptune_jax import lock, train
from reptune_jax.evals import baseline, results, steering, tuned
from reptune_jax.folder import RunName, Study, _Folder
from reptune_jax.hub.export import all_or_nothing
from tests.support import tiny_behavior


def write(path, **changes):
    """A lock file as another program leaves it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**lock.about(), **changes}))
    return path


def test_a_block_holds_it_and_leaves_nothing(tmp_path):
    study = Study(tmp_path / "new" / "study")
    with study.writing():
        path = study.path / ".lock"
        found = json.loads(path.read_text())
        assert found["pid"] == os.getpid() and found["host"] and found["command"]
        with study.writing():  # of the same program: held already
            pass
        assert path.exists()
    assert not (tmp_path / "new").exists()  # nothing came of it


def test_what_a_first_start_wrote_stays(tmp_path):
    study = Study(tmp_path / "study")
    with study.writing():
        study.targets.write_text("")
    assert [p.name for p in study.path.iterdir()] == ["targets.jsonl"]


def test_a_live_program_of_this_machine_refuses_by_host_process_and_command(tmp_path):
    """Locked as the kernel does it, by another open file, as by another process."""
    path = write(tmp_path / ".lock", pid=os.getppid(), began=lock._began(os.getppid()))
    with path.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = path.read_bytes()
        with pytest.raises(ValueError) as e, Study(tmp_path).writing():
            pass
    said = str(e.value)
    assert f"pid {os.getppid()} on {lock.about()['host']} (" in said and "writes there" in said
    assert "Let it end, stop it, or use another folder" in said
    assert path.read_bytes() == before


def test_a_live_program_refuses_where_the_file_system_has_no_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_flock", lambda file: None)
    write(tmp_path / ".lock", pid=os.getppid(), began=lock._began(os.getppid()))
    refused = pytest.raises(ValueError, match=rf"pid {os.getppid()} on .* writes there")
    with refused, Study(tmp_path).writing():
        pass


@pytest.mark.parametrize(
    "changes",
    [{"pid": 2**22 + 1}, {"pid": os.getppid(), "began": "of an earlier process"}],
    ids=["dead", "its number is another's"],
)
def test_a_dead_program_of_this_machine_is_taken_over_and_said(changes, tmp_path, capsys):
    write(tmp_path / ".lock", **changes)
    with Study(tmp_path).writing():
        assert json.loads((tmp_path / ".lock").read_text()) == lock.about()
    (line,) = capsys.readouterr().out.splitlines()
    assert f"taken over from pid {changes['pid']} on " in line
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("age,free", [(30, False), (119, False), (125, True)])
def test_one_of_another_host_is_dead_after_two_minutes_without_a_sign(age, free, tmp_path, capsys):
    path = write(tmp_path / ".lock", host="node7", machine="another boot")
    now = path.stat().st_mtime
    os.utime(path, (now - age, now - age))
    if free:
        with Study(tmp_path).writing():
            assert "taken over from pid" in capsys.readouterr().out
    else:
        said = rf"on node7 .*sign of life is {age} s old; after 120"
        with pytest.raises(ValueError, match=said), Study(tmp_path).writing():
            pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}', "\xff\xfe"])
def test_a_lock_that_says_nothing_and_that_nobody_holds_is_free(text, tmp_path):
    (tmp_path / ".lock").write_bytes(text.encode("latin1"))
    with Study(tmp_path).writing():
        assert json.loads((tmp_path / ".lock").read_text()) == lock.about()


def test_of_two_that_start_at_once_without_locks_one_is_refused(tmp_path, monkeypatch):
    """The other one writes while this one makes sure."""
    monkeypatch.setattr(lock, "_flock", lambda file: None)
    other = {**lock.about(), "host": "node7", "pid": 7, "machine": "another boot"}
    monkeypatch.setattr(lock.time, "sleep", lambda s: write(tmp_path / ".lock", **other))
    with pytest.raises(ValueError, match="pid 7 on node7"), Study(tmp_path).writing():
        pass
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == 7


def test_a_program_that_another_one_took_for_dead_ends(tmp_path, monkeypatch):
    path, ended, beats = tmp_path / ".lock", [], []

    def sleep(seconds):
        beats.append(seconds)
        if len(beats) == 2:
            write(path, host="node7", pid=7)
        if len(beats) == 3:
            raise InterruptedError

    monkeypatch.setattr(lock, "_files", {path: 0})
    monkeypatch.setattr(lock.time, "sleep", sleep)
    monkeypatch.setattr(lock.ending, "end", ended.append)
    write(path)
    os.utime(path, (1, 1))
    with pytest.raises(InterruptedError):
        lock._beat()
    assert beats == [lock.BEAT] * 3 and len(ended) == 1 and "pid 7 on node7" in ended[0]


def test_a_full_disk_is_named_and_leaves_no_lock_that_says_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(lock.os, "pwrite", full)
    with pytest.raises(OSError, match="No space left") as e, Study(tmp_path / "new").writing():
        pass
    assert e.value.filename == str(tmp_path / "new" / ".lock")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("program", [baseline, steering, tuned, train])
def test_what_another_one_finished_while_this_one_waited_for_the_lock_stands(
    program, tmp_path, monkeypatch, capsys
):
    """It ended between the start and the lock: there is no model here that could be measured."""
    c = tiny_behavior.settings(tmp_path / "none", tiny_behavior.write(tmp_path))
    study = Study(tmp_path / "study")
    run = study.run(RunName.of(c))
    made = {baseline: study.baseline, steering: study.steering, tuned: run.results, train: run.done}

    stood = []

    @contextlib.contextmanager
    def writing(folder):
        made[program].parent.mkdir(parents=True)
        if made[program].suffix == ".parquet":
            results.write_parquet(made[program], [])
        else:
            made[program].write_text("made by another")
        stood.append(made[program].read_bytes())
        yield

    monkeypatch.setattr(_Folder, "writing", writing)
    program.run(c, study.path)
    assert [made[program].read_bytes()] == stood
    assert ": already " in capsys.readouterr().out


def test_two_real_processes(tmp_path):
    """One holds the folder of an export while another asks for it; then it is killed."""
    code = (
        "import sys, time; from reptune_jax.hub.export import all_or_nothing\n"
        "with all_or_nothing(sys.argv[1]) as part: print('in', flush=True); time.sleep(60)"
    )
    out, root = tmp_path / "out", Path(__file__).parents[1]
    command = [sys.executable, "-c", code, str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root, text=True) as one:
        assert one.stdout is not None and one.stdout.readline() == "in\n"
        said = rf"pid {one.pid} on .* writes there"
        with pytest.raises(ValueError, match=said), all_or_nothing(out):
            pass
        assert (tmp_path / ".out.partial").is_dir()  # still the other's
        one.kill()
    with all_or_nothing(out) as part:
        (part / "a").write_text("a")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
