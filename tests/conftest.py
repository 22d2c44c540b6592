"""Set before jax is imported: tests compile a lot and compute little."""

import os

import pytest

# The test extra brings a TPU compiler, which would look for a TPU in every process.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAG = "--xla_backend_optimization_level"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=0".strip()


@pytest.fixture(autouse=True, scope="module")
def programs_kept_by_a_module():
    """Those that `tiny_behavior.keep_programs` keeps are not kept for the modules after it."""
    yield
    from tests.support import tiny_behavior  # imports jax

    tiny_behavior.keep_no_programs()
