"""A module of this folder in a process that forces eight devices on the CPU."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def run(module: str, *args: Any, quick: bool = True) -> subprocess.CompletedProcess[str]:
    """`python -m tests.support.MODULE ARGS`, which has to succeed; `quick`: compiled plainly."""
    # Compiling is most of the time there.
    plainly = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} if quick else {}
    flags = {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", f"tests.support.{module}", *map(str, args)],
        env={**os.environ, **flags, **plainly},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done
