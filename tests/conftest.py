"""Set before jax is imported: tests compile a lot and compute little."""

import copy
import logging
import os
import signal
import sys
import threading
from pathlib import Path

import pytest

# The test extra brings a TPU compiler, which would look for a TPU in every process.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAG = "--xla_backend_optimization_level"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=0".strip()

# Whoever starts the tests in the background, or with nohup, has them ignore these; and so would the
# programs that tests start.
for _signal in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_signal) is signal.SIG_IGN:
        signal.signal(_signal, signal.SIG_DFL)

# Linux lets a process have 65,530 mappings of memory and every compiled program takes some; one
# more, and the process dies without a word.
_MAPPINGS = 20_000


@pytest.fixture(autouse=True, scope="module")
def programs_kept_by_a_module():
    """Those that `tiny_behavior.keep_programs` keeps are not kept for the modules after it."""
    yield
    import jax

    from tests.support import tiny_behavior

    tiny_behavior.keep_no_programs()
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
