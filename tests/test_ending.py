"""Signals and half-made files: who is told what, and what stays."""

import errno
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from reptune_jax import ending, program

ROOT = Path(__file__).parents[1]
# A shell lets jobs in its background ignore it, pytest too.
signal.signal(signal.SIGINT, signal.default_int_handler)
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}


def send(signum: int = signal.SIGTERM) -> None:
    """To this process, whose next instructions hear of it."""
    os.kill(os.getpid(), signum)
    time.sleep(0.1)


@pytest.mark.parametrize("signum", CODES)
def test_each_signal_ends_a_program_with_its_code_one_line_and_nothing_half_made(
    signum, tmp_path, capsys
):
    before = signal.getsignal(signum)

    def run():
        with ending.whole(tmp_path / "a.txt") as scratch:
            scratch.write_text("half")
            send(signum)

    with pytest.raises(SystemExit) as ended:
        program.call(run)
    assert ended.value.code == CODES[signum]
    out, err = capsys.readouterr()
    assert f"stopped by {signum.name}: nothing is left half made." in out
    assert len(out.splitlines()) == 1 and not err
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signum) is before


def test_what_saves_first_is_asked_and_raises_nothing_until_it_has(capsys):
    def run():
        with ending.deferred():
            assert ending.asked() is None
            send()
            assert ending.asked() == signal.SIGTERM
            raise ending.Ended("step 3 of 9 is saved.")

    with pytest.raises(SystemExit) as ended:
        program.call(run)
    assert ended.value.code == 143
    assert "stopped by SIGTERM: step 3 of 9 is saved. The same" in capsys.readouterr().out


def test_one_that_is_heeded_where_nothing_raised_gets_out_is_heeded_behind_it(capsys):
    """In a finalizer, as in a callback of the garbage collector, of which jax has one."""

    class Odd:
        def __del__(self):
            send()

    went_on = []

    def run():
        one = Odd()
        del one
        until = time.monotonic() + 2  # after 3 s the process is ended
        while time.monotonic() < until:
            time.sleep(0.01)
        went_on.append(True)

    with pytest.raises(SystemExit) as ended:
        program.call(run)
    out, err = capsys.readouterr()
    assert not went_on and ended.value.code == 143 and "stopped by SIGTERM" in out and not err


def test_one_that_came_too_late_to_be_asked_for_is_heeded_behind_the_block():
    with pytest.raises(ending.Ended), ending.heeded():
        with ending.deferred():
            send()
        pytest.fail("went on")


def test_what_a_process_was_told_to_ignore_it_ignores():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        program.call(lambda: send(signal.SIGHUP))
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("given", ["soon", "0", "-3", "nan"])
def test_a_grace_that_is_none_is_refused(given, monkeypatch, capsys):
    monkeypatch.setenv("REPTUNE_GRACE", given)
    with pytest.raises(SystemExit) as ended:
        program.call(lambda: None)
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith(f"error: REPTUNE_GRACE: got {given!r}")


_DEAF = """
import hashlib, signal, sys, types
sys.modules["reptune_jax"] = package = types.ModuleType("reptune_jax")
package.__path__ = ["reptune_jax"]  # without what it imports
from pathlib import Path
from reptune_jax import ending
signal.signal(signal.SIGINT, signal.SIG_DFL)
deferred = sys.argv[1] == "deferred"
with ending.heeded(), ending.temporary(Path(sys.argv[2])) as half:
    half.mkdir()
    (half / "part").write_text("x")
    ending._deferred = deferred
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # no Python runs in this thread
"""


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
def test_native_code_is_not_waited_for_and_a_second_signal_ends_at_once(twice, tmp_path):
    """As a save that takes too long, and as somebody who does not want to wait for it."""
    half = tmp_path / "half"
    how = "deferred" if twice else "at once"  # else it is ended after 3 s
    env = {**os.environ, "REPTUNE_GRACE": "20" if twice else "2"}
    command = [sys.executable, "-c", _DEAF, how, str(half)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env=env, text=True) as one:
        assert one.stdout is not None and one.stdout.readline() == "ready\n"
        time.sleep(0.5)  # it is printed before the native code begins
        began = time.monotonic()
        one.send_signal(signal.SIGINT)
        one.send_signal(signal.SIGINT)  # `timeout` and others send two at a time: they are one
        if twice:
            time.sleep(1.5)
            assert one.poll() is None
            one.send_signal(signal.SIGTERM)
        said = one.stdout.read()
        code = one.wait(30)
    assert time.monotonic() - began < 10
    assert len(said.splitlines()) == 1
    if twice:
        assert code == 143 and "ended at once by a second SIGTERM." in said
    else:
        assert code == 130 and "stopped by SIGINT: nothing is left half made." in said
    assert not half.exists()


def test_a_file_is_the_old_one_or_the_whole_new_one(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with ending.whole(path) as scratch:
        scratch.write_text("old")
    with pytest.raises(KeyError), ending.whole(path) as scratch:
        scratch.write_text("ne")
        raise KeyError
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    "number,advice", [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EIO, False)]
)
def test_a_fault_of_the_machine_is_one_line_with_its_file(number, advice, tmp_path, capsys):
    def run():
        with ending.whole(tmp_path / "x.parquet"):
            raise OSError(number, os.strerror(number))

    with pytest.raises(SystemExit) as ended:
        program.call(run)
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1
    assert line.startswith(f"error: {tmp_path / 'x.parquet'}: {os.strerror(number)}.")
    assert ("Free some space" in line) == advice


def test_what_fails_beside_a_program_that_said_why_it_ends_is_not_shown_else_it_is(capsys):
    """A thread, a callback of native code, what is collected, and what Orbax and asyncio log."""
    heard = []

    def fails():
        1 / 0  # noqa: B018

    def beside():
        one = threading.Thread(target=fails)
        one.start()
        one.join()
        try:
            fails()
        except ZeroDivisionError as e:
            sys.excepthook(type(e), e, e.__traceback__)
            sys.unraisablehook(types.SimpleNamespace(exc_value=e))
            logging.getLogger("absl").exception("thread failed")
        logging.getLogger("asyncio").error("never retrieved")
        logging.getLogger("asyncio").warning("slow")

    def failing():
        beside()
        raise OSError(errno.EIO, "Input/output error", "disk")

    threading.excepthook = lambda args: heard.append(args.exc_type)
    sys.excepthook = lambda kind, e, trace: heard.append(kind)
    sys.unraisablehook = lambda args: heard.append(type(args.exc_value))
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    try:
        program.call(beside)
        logs = ["thread failed", "never retrieved"]
        assert heard == ["slow", *[ZeroDivisionError] * 3, *logs]
        heard.clear()
        capsys.readouterr()
        with pytest.raises(SystemExit):
            program.call(failing)
        beside()  # as the interpreter does, at its end
        assert heard == ["slow", "slow"]
        assert capsys.readouterr().err.splitlines()[-1] == "error: disk: Input/output error."
    finally:
        logging.getLogger().removeHandler(handler)


def test_the_machines_number_of_another_librarys_error_is_found_in_its_words():
    e = ValueError('RESOURCE_EXHAUSTED: Error writing "/x": No space left on device [os_error=28]')
    assert ending.number_of(e) == errno.ENOSPC and ending.number_of(ValueError("no")) is None
