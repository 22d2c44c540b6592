"""One process or many: how they find each other, agree, write once, and stop together.

With one process every function here is a plain call, and none of them needs `start`.
"""

import socket
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

_TEXT = 1024  # bytes of a message that processes exchange
_asked = 0  # how often `stop_asked` was called
_stopping = False


def start(
    coordinator: str = "", processes: int = 0, process_id: int = -1, trains: bool = False
) -> None:
    """Joins the processes of a job; must come before anything that touches a device.

    TPU pods, Slurm and MPI are detected. Elsewhere all three arguments are needed, or none: then
    this is the only process, which still gets a coordinator where it `trains`, since that is what
    notices a SIGTERM.

    Raises:
      ValueError: some of the arguments, but not all.
    """
    given = bool(coordinator), processes > 0, process_id >= 0
    if any(given) and not all(given):
        raise ValueError(
            f"--coordinator, --processes, --process_id: got {coordinator!r}, {processes}, "
            f"{process_id}, expected all three or none. Example: --coordinator=10.0.0.2:1234 "
            "--processes=2 --process_id=0."
        )
    # Where it is on, SIGTERM no longer ends the program but waits to be asked for.
    jax.config.update("jax_enable_preemption_service", trains)
    if all(given):
        jax.distributed.initialize(coordinator, processes, process_id)
        return
    try:
        jax.distributed.initialize()
    except ValueError:  # no cluster
        if trains:
            jax.config.update("jax_check_proxy_envs", False)  # nothing leaves this machine
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                port = s.getsockname()[1]  # a free one
            jax.distributed.initialize(f"127.0.0.1:{port}", 1, 0)


def is_first() -> bool:
    """Whether this is the process that writes files and talks to the terminal."""
    return jax.process_index() == 0


def once(write: Callable[[], object]) -> None:
    """The first process writes, and no other goes on before it has.

    Raises:
      ValueError: on every process, where writing failed on the first.
    """
    error: Exception | None = None
    if is_first():
        try:
            write()
        except Exception as e:
            error = e
    told = "" if error is None else f"process 0: {error}"
    if jax.process_count() > 1:
        told = _decode(multihost_utils.broadcast_one_to_all(_encode(told)))
    if error is not None:
        raise error
    if told:
        raise ValueError(told)


def exists(path: Path) -> bool:
    """Whether the first process sees it: all take the same way, even while one is writing."""
    return agree(path.exists())


def agree(value: bool) -> bool:
    """The first process's value."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.int32(value)))


def everywhere(value: bool) -> bool:
    """Whether it is true on all processes."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.process_allgather(np.int32(value)).all())


def same(**values: str) -> None:
    """Checks that all processes have the same values.

    Raises:
      ValueError: naming what differs, with both values.
    """
    if jax.process_count() == 1:
        return
    for name, mine in values.items():
        found = [_decode(row) for row in multihost_utils.process_allgather(_encode(mine))]
        for process, theirs in enumerate(found):
            if theirs != found[0]:
                raise ValueError(
                    f"{name}: got {found[0]!r} on process 0 and {theirs!r} on process {process}, "
                    "expected the same. Give every process the same flags and files."
                )


class Stopped(Exception):
    """A SIGTERM was heeded: what was done is saved, and the same command goes on from there."""


def heed_stop(what: str) -> None:
    """Between two parts of a program: ends it if a SIGTERM came meanwhile.

    Raises:
      Stopped: one came.
    """
    if stop_asked():
        raise Stopped(f"stopped {what} by SIGTERM. The same command goes on from here.")


def stop_asked() -> bool:
    """Whether a SIGTERM came to any process. All must ask equally often; all hear it at once."""
    global _asked, _stopping
    _asked += 1  # jax names one call number at which all stop, so the numbers may not skip
    try:
        _stopping = _stopping or multihost_utils.reached_preemption_sync_point(_asked)
    except RuntimeError:  # not started, or without the service
        return False
    return _stopping


def _encode(text: str) -> np.ndarray:
    return np.frombuffer(text.encode()[:_TEXT].ljust(_TEXT, b"\0"), np.uint8)


def _decode(data: np.ndarray) -> str:
    return np.asarray(data, np.uint8).tobytes().rstrip(b"\0").decode(errors="replace")
