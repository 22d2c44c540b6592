"""One writer for a folder: a lock file in it that says who writes.

The file is locked as the kernel does it (flock) where the file system can, which ends with its
process and on most network file systems holds for all hosts. What it says serves where it cannot:
a dead process of this machine holds nothing, and one of another machine is taken for dead when it
has not touched the file for two minutes. Whoever finds that the file is no longer his own ends.
"""

import contextlib
import errno
import fcntl
import functools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reptune_jax import distributed, ending
from reptune_jax.console import note, say

BEAT, DEAD = 15.0, 120.0  # seconds: between two signs of life; without one
_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
_files: dict[Path, int] = {}  # what this process holds, and as which descriptor
_paths: set[Path] = set()  # the same, known to all processes of a job
_beating = threading.Lock()


@contextlib.contextmanager
def held(path: Path, for_all: bool = False) -> Iterator[None]:
    """Holds the lock `path` for the block; within another block of this program it is held already.

    `for_all`: all processes of a job come here, and the first one holds it for them.

    Raises:
      ValueError: another program holds it; says which, where, and what to do.
    """
    path = path.absolute()
    if path in _paths:
        yield
        return
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        distributed.once(lambda: _take(path)) if for_all else _take(path)
        _paths.add(path)
        with ending.temporary(path) if path in _files else contextlib.nullcontext():
            yield
    finally:
        _paths.discard(path)
        if (file := _files.pop(path, None)) is not None:
            os.close(file)
        for folder in made:  # nothing came of it
            with contextlib.suppress(OSError):
                folder.rmdir()


def _take(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(20):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            locked = _flock(file)
            if not _same(file, path):
                os.close(file)  # its holder has just removed it
                continue
            owner = _read(file)
            if locked is False or (owner and not _gone(owner, path)):
                raise ValueError(_refusal(path, owner or {}))
            _write(file, path, owner, locked is None)
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(file)
            raise
        _files[path] = file
        if _beating.acquire(blocking=False):
            threading.Thread(target=_beat, name="lock", daemon=True).start()
        return
    raise ValueError(f"{path}: is made and removed all the time. Let other programs end first.")


def _write(file: int, path: Path, owner: dict[str, Any], unsure: bool) -> None:
    me = about()
    if owner:
        say(f"{path.parent}: taken over from {_who(owner)}, which is gone")
    with ending.of_file(path):
        try:
            os.ftruncate(file, 0)
            os.pwrite(file, (json.dumps(me) + "\n").encode(), 0)
        except OSError:  # such as a full disk: it would say nothing
            path.unlink(missing_ok=True)
            raise
    if unsure:
        note(
            f"{path.parent}: this file system has no locks; two programs that are started within "
            "a second of one another may not see one another."
        )
        time.sleep(1.0)
        if (found := _owner_at(path)) != me:
            raise ValueError(_refusal(path, found))


@functools.cache
def about() -> dict[str, Any]:
    """Who this process is."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "machine": machine(),
        "began": _began(os.getpid()),
        "command": " ".join(words)[:200],
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def machine() -> str:
    """Where process numbers mean the same: a boot of a host, and a space of process numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return socket.gethostname()


def _began(pid: int) -> str:
    """When a process began, as its system counts; "" where there is none of that number."""
    if Path("/proc/self/stat").exists():
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        except (OSError, IndexError):
            return ""
    found = subprocess.run(["ps", "-o", "lstart=", "-p", f"{pid}"], capture_output=True, text=True)
    return found.stdout.strip()


def _flock(file: int) -> bool | None:
    """Whether the lock is ours now; None where the file system has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in _UNSUPPORTED:
            return None
        if e.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _gone(owner: dict[str, Any], path: Path) -> bool:
    if owner.get("machine") == machine():
        began = _began(owner["pid"])
        return not began or began != owner.get("began")
    return _age(path) > DEAD


def _age(path: Path) -> float:
    """Seconds since the last sign of life, by the clock of the file system."""
    with ending.temporary(path.with_name(f"{path.name}.{os.getpid()}.tmp")) as probe:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime


def _refusal(path: Path, owner: dict[str, Any]) -> str:
    text = f"{path.parent}: {_who(owner)} writes there"
    if owner and owner.get("machine") != machine():
        age = max(_age(path), 0.0)
        text += f" (its last sign of life is {age:.0f} s old; after {DEAD:.0f} s it is taken over)"
    return f"{text}, expected no other program. Let it end, stop it, or use another folder."


def _who(owner: dict[str, Any]) -> str:
    if not owner:
        return "another program"
    return f"pid {owner.get('pid')} on {owner.get('host')} ({owner.get('command')})"


def _same(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _read(file: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(file, 4096, 0) or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("pid"), int) else {}


def _owner_at(path: Path) -> dict[str, Any]:
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return {}
    try:
        return _read(file)
    finally:
        os.close(file)


def _beat() -> None:
    """Signs of life; ends the program where another one has taken its place meanwhile."""
    while True:
        time.sleep(BEAT)
        for path in [*_files]:
            try:
                owner = _owner_at(path)
                if owner == about():
                    os.utime(path)
            except OSError:
                continue  # a file system that is away for a while
            if path in _files and owner and owner != about():
                ending.end(
                    f"error: {path.parent}: {_who(owner)} has taken over, since this one gave no "
                    f"sign of life for {DEAD:.0f} s. The same command goes on from what was saved."
                )
