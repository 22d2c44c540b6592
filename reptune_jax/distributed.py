"""One process or many: how they find each other, agree, write once, and stop together.

With one process every function here is a plain call, and none of them needs `start`.
"""

import atexit
import contextlib
import ctypes
import os
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src.distributed import global_state
from jax.experimental import multihost_utils

from reptune_jax import ending

_SIGNAL = "reptune_jax/signal"  # which came to any of the processes
_TEXT = 1024  # bytes of a message that processes exchange
_asked = 0  # how often `stop_asked` was called
_stopping = False


def start(coordinator: str = "", processes: int = 0, process_id: int = -1) -> None:
    """Joins the processes of a job; must come before anything that touches a device.

    TPU pods, Slurm and MPI are detected. Elsewhere all three arguments are needed, or none: then
    this is the only process.

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
    jax.config.update("jax_enable_preemption_service", True)
    try:
        jax.distributed.initialize(*((coordinator, processes, process_id) if all(given) else ()))
    except ValueError:  # no cluster
        if all(given):
            raise
        jax.config.update("jax_enable_preemption_service", False)
        return
    ending.speaks = is_first()
    _share_signals(global_state.client)


def _share_signals(client: Any) -> None:
    """A signal to one process is heard by all: by jax's, which agree on a step, and by ours.

    jax put its handler of SIGTERM in the place of Python's. Python's is put back, which is how a
    thread of ours hears of it, and calls jax's.
    """
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    jaxs = ctypes.CFUNCTYPE(None, ctypes.c_int)(libc.signal(signal.SIGTERM, None))
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    over = threading.Event()

    def tell(signum: int) -> None:
        jaxs(signal.SIGTERM)
        told = _SIGNAL, str(signum), True  # the last: it may be there already
        threading.Thread(target=client.key_value_set, args=told, daemon=True).start()

    def hear() -> None:
        while not (over.wait(0.5) or ending.asked()):
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # nobody has one
                os.kill(os.getpid(), int(client.key_value_try_get(_SIGNAL)))

    def stop() -> None:  # a thread in native code must not outlive the interpreter
        over.set()
        hears.join(5)

    ending.on_first.append(tell)
    hears = threading.Thread(target=hear, name="hears", daemon=True)
    hears.start()
    atexit.register(stop)


def is_first() -> bool:
    """Whether this is the process that writes files and talks to the terminal."""
    return jax.process_index() == 0


def is_shared() -> bool:
    """Whether there are several processes; touches no device."""
    return global_state.num_processes > 1


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


def of_first(compute: Callable[[], Sequence[float]], n: int) -> np.ndarray:
    """The first process computes n numbers, and all have them, as float32.

    Raises:
      ValueError: as `once`.
    """
    found_I = np.zeros(n, np.float32)

    def write() -> None:
        found_I[:] = compute()

    once(write)
    if jax.process_count() == 1:
        return found_I
    return np.asarray(multihost_utils.broadcast_one_to_all(found_I))


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


def stop_asked() -> bool:
    """Whether a signal came to any process. All must ask equally often; all hear it at once."""
    global _asked, _stopping
    if jax.process_count() == 1:
        return ending.asked() is not None
    _asked += 1  # jax names one call number at which all stop, so the numbers may not skip
    _stopping = _stopping or multihost_utils.reached_preemption_sync_point(_asked)
    return _stopping


def _encode(text: str) -> np.ndarray:
    return np.frombuffer(text.encode()[:_TEXT].ljust(_TEXT, b"\0"), np.uint8)


def _decode(data: np.ndarray) -> str:
    return np.asarray(data, np.uint8).tobytes().rstrip(b"\0").decode(errors="replace")
