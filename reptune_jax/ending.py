"""How a program ends before its end: by a signal, within a stated time, leaving nothing half made.

SIGTERM, SIGINT and SIGHUP are one: the first makes the program stop at the next safe point, the
second ends it at once. Files are written whole or not at all, so any point is safe but within the
training loop, which saves first (`deferred`). A thread watches the time, since no Python runs in
the main thread while it is in native code (a compilation, a long step).
"""

import contextlib
import ctypes
import errno
import os
import select
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
GRACE = 10.0  # seconds from the signal to the end; REPTUNE_GRACE
_REACTION = 3.0  # of them, for what need not be saved
_MARGIN = 1.0  # of them, for the end itself
_TWIN = 1.0  # seconds within which a signal is the first one again: `timeout` and others send two

FULL = (errno.ENOSPC, errno.EDQUOT)
_QUOTED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO, errno.ESTALE)

speaks = True  # whether this is the process that talks to the terminal, of several
on_first: list[Callable[[int], object]] = []  # what else is to be done at the first signal
_arrival: tuple[int, float] | None = None  # the first signal and its time
_deferred = 0
_raised = False
_lost = False  # raised where nothing gets out of: a finalizer, a callback of the garbage collector
_said = threading.Lock()  # taken once: a program says only once why it ends
_temporary: set[Path] = set()  # what is removed where a program ends, whoever ends it


class Ended(KeyboardInterrupt):
    """A signal is heeded. A KeyboardInterrupt, so that libraries clean up and let it through."""


def asked() -> int | None:
    """The signal that came first, if any came."""
    return _arrival and _arrival[0]


def grace() -> float:
    """Seconds from the first signal to the end.

    Raises:
      ValueError: REPTUNE_GRACE is no such number.
    """
    given = os.environ.get("REPTUNE_GRACE", "")
    try:
        found = float(given or GRACE)
    except ValueError:
        found = -1.0
    if not 2 <= found <= 86400:
        raise ValueError(
            f"REPTUNE_GRACE: got {given!r}, expected seconds, 2 or more. Leave it unset for "
            f"{GRACE:g}."
        )
    return found


@contextlib.contextmanager
def heeded() -> Iterator[None]:
    """While the block runs, signals end it by `Ended`, or the process where that takes too long.

    One that the process was told to ignore (nohup, a job in the background) stays ignored.
    """
    global _arrival, _raised, _lost, _said
    seconds = grace()
    _arrival, _raised, _lost, _said = None, False, False, threading.Lock()
    handlers = {s: signal.getsignal(s) for s in SIGNALS}
    ours = [s for s, handler in handlers.items() if handler is not signal.SIG_IGN]
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    before = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    watch = threading.Thread(target=_watch, args=(reads, seconds), name="signals", daemon=True)
    watch.start()
    for s in ours:
        signal.signal(s, _handle)
    unraisable = sys.unraisablehook
    sys.unraisablehook = lambda args: _swallowed(args, unraisable)
    try:
        yield
    finally:
        sys.unraisablehook = unraisable
        for s in ours:
            signal.signal(s, handlers[s] or signal.SIG_DFL)
        signal.set_wakeup_fd(before)
        os.close(writes)  # ends the watch
        watch.join(_REACTION)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """While the block runs, a signal raises nothing: it asks `asked`, and saves what it did.

    Raises:
      Ended: at the end of the block, where one came too late to be asked for.
    """
    global _deferred
    _deferred += 1
    try:
        yield
    finally:
        _deferred -= 1
    if asked():
        raise Ended


@contextlib.contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """A file or folder that is gone when the block ends, however the program ends."""
    _temporary.add(path)
    try:
        yield path
    finally:
        _remove(path)
        _temporary.discard(path)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields the path to write to: a reader of `path` sees the old file or the whole new one.

    Raises:
      OSError: what writing raises, with the file's name.
    """
    with temporary(path.with_name(f"{path.name}.tmp")) as scratch, of_file(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield scratch
        os.replace(scratch, path)


@contextlib.contextmanager
def of_file(path: Path) -> Iterator[None]:
    """Errors of writing know their file: those of a file that is open do not."""
    try:
        yield
    except OSError as e:
        if e.filename is None:
            e.strerror = e.strerror or (os.strerror(e.errno) if e.errno else str(e))
            e.filename = str(path)
        raise


def number_of(e: BaseException) -> int | None:
    """The machine's number of an error; of another library's, by the words it quotes."""
    if isinstance(e, OSError) and e.errno:
        return e.errno
    return next((n for n in (*FULL, *_QUOTED) if os.strerror(n) in str(e)), None)


def say_why(message: str) -> None:
    """The one line of a program that a signal ends."""
    if _said.acquire(blocking=False) and speaks:
        print(f"[{time.strftime('%H:%M:%S')}] {message}", flush=True)


def code() -> int:
    """What the shell is told of a signal: 143 for SIGTERM, 130 for SIGINT, 129 for SIGHUP."""
    return 128 + (asked() or 0)


def stopped_by(what: str = "") -> str:
    """The line that says so."""
    name = signal.Signals(asked() or signal.SIGINT).name
    done = what or "nothing is left half made."
    return f"stopped by {name}: {done} The same command goes on from there."


def leave(status: int) -> None:
    """Ends the process now: no thread is waited for, nothing half made stays."""
    clean()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def end(message: str) -> None:
    """Ends the process now, as an error, from any thread."""
    print(message, file=sys.stderr)
    leave(1)


def clean() -> None:
    """Removes what is half made, of blocks that a signal left too early to do so."""
    for _ in range(3):  # a thread may be writing into a folder that is being removed
        for path in [*_temporary]:
            _remove(path)


def no_later_than(seconds: float, status: int) -> None:
    """Ends the process that long after its main thread has ended.

    The interpreter waits for every thread, and those of a save that failed may wait for minutes.
    """

    def wait() -> None:
        threading.main_thread().join()
        time.sleep(seconds)
        leave(status)

    threading.Thread(target=wait, name="end", daemon=True).start()


def _handle(signum: int, frame: FrameType | None) -> None:
    global _raised
    _arrived(signum)
    if not _deferred and not _raised:
        _raised = True
        raise Ended


def _swallowed(args: Any, otherwise: Callable[[Any], object]) -> None:
    global _lost
    if isinstance(args.exc_value, Ended):
        _lost = True
    else:
        otherwise(args)


def _arrived(signum: int) -> None:
    global _arrival
    if _arrival is None:
        _arrival = signum, time.monotonic()
        for act in on_first:
            act(signum)


def _watch(reads: int, seconds: float) -> None:
    """Reads what Python's own handler writes at once, whatever the main thread is doing."""
    global _lost
    while True:
        ready, _, _ = select.select([reads], [], [], 0.1 if _arrival else None)
        found = os.read(reads, 64) if ready else b""
        if ready and not found:
            os.close(reads)
            return
        for signum in (byte for byte in found if byte in SIGNALS):
            if _arrival and time.monotonic() - _arrival[1] > _TWIN:
                say_why(f"ended at once by a second {signal.Signals(signum).name}.")
                leave(128 + signum)
            _arrived(signum)
        if _lost and not _deferred:
            _lost, main = False, threading.main_thread().ident
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(main or 0), ctypes.py_object(Ended)
            )
        if _arrival:
            limit = seconds - _MARGIN if _deferred else min(_REACTION, seconds - _MARGIN)
            if time.monotonic() - _arrival[1] > limit:
                late = f"not saved within {seconds:g} s (REPTUNE_GRACE); what was saved is kept."
                say_why(stopped_by(late if _deferred else ""))
                leave(code())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _is_program() -> bool:
    """Whether Python was started for a program of this package, which is being imported."""
    name = sys.argv[0] if sys.argv else ""
    of_ours = any(arg.partition(".")[0] == __package__ for arg in sys.orig_argv)
    return Path(name).name == "reptune" or (name == "-m" and of_ours)


if _is_program() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the rest is imported: no traceback
