"""Set before jax is imported: tests compile a lot and compute little."""

import os

# The test extra brings a TPU compiler, which would look for a TPU in every process.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAG = "--xla_backend_optimization_level"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=0".strip()
