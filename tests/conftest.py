"""Set before jax is imported: tests compile a lot and compute little."""

import copy
import gc
import importlib.util
import logging
import mmap
import os
import signal
import sys
import tempfile
import threading
from pathlib import Path

import pytest

# The test extra brings a TPU compiler, which would look for a TPU in every process.
os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _is_known(flag: str) -> bool:
    """Whether this XLA has it: one that it does not know ends the process."""
    library = Path(importlib.util.find_spec("jaxlib").origin).with_name("libjax_common.so")
    if not library.exists():
        return False
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as found:
        return found.find(flag.encode()) >= 0


_flags = {"xla_backend_optimization_level": "0"}
if _is_known("xla_cpu_use_fusion_emitters"):  # with them compiling takes two to three times as long
    _flags["xla_cpu_use_fusion_emitters"] = "false"
_given = os.environ.get("XLA_FLAGS", "")
_added = [f"--{flag}={value}" for flag, value in _flags.items() if flag not in _given]
os.environ["XLA_FLAGS"] = " ".join([_given, *_added]).strip()

# Where in the source an operation stands is not read here, and takes a while to write down.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

# A program that was compiled once serves every test, of this process and of all others.
if "REPTUNE_TEST_PROGRAMS" not in os.environ:
    _programs = tempfile.TemporaryDirectory(prefix="programs")
    os.environ["REPTUNE_TEST_PROGRAMS"] = os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"

# Whoever starts the tests in the background, or with nohup, has them ignore these; and so would the
# programs that tests start.
for _signal in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_signal) is signal.SIG_IGN:
        signal.signal(_signal, signal.SIG_DFL)

# Linux lets a process have 65,530 mappings of memory and every compiled program takes some; one
# more, and the process dies without a word.
_MAPPINGS = 20_000


def pytest_collection_finish():
    """What is imported stays: the collector need not go through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def programs_of_a_module():
    """Those in memory are dropped before they are too many."""
    yield
    import jax

    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > _MAPPINGS:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def programs_do_not_end_pytest(monkeypatch):
    """They see to it that their process ends, quietly, which here is that of all tests."""
    monkeypatch.setattr("reptune_jax.ending.no_later_than", lambda seconds, status: None)
    hooks = (threading, "excepthook"), (sys, "excepthook"), (sys, "unraisablehook")
    logs = ((logging.getLogger(name), "filters") for name in ("absl", "asyncio"))
    for where, name in (*hooks, *logs):
        monkeypatch.setattr(where, name, copy.copy(getattr(where, name)))  # put back at the end
