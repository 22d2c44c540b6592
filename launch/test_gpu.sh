#!/usr/bin/env bash
# The tests of what a device computes, on this machine's GPU: `launch/test_gpu.sh [--dry-run] [pytest arguments]`.
# Parity with transformers and torch, attention, losses, gradients, vectors; then each kernel and type against
# float64, cuDNN's windows at their edge among them. One process: tests share the card's memory.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

take_dry_run "$@"
run setup_env cuda
run setup_env test
# The CPU is there as well, for what is computed on the host; the GPU comes first.
export JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_PREALLOCATE=false
run python -m pytest -q tests/model tests/tuning tests/vectors tests/hub "${ARGS[@]}"
run python -m benchmarks.precision
