#!/usr/bin/env bash
# All figures of benchmarks/README.md on this machine's GPU: `benchmarks/gpu.sh [--dry-run] [FOLDER]` writes one file
# of tables and the log of each into FOLDER (benchmarks/gpu-<day>). A part that fails does not stop the others.
# SHAPE is the model of the decode table: random weights of it must fit (llama-3-8b: 16 GB).
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=../launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/setup.sh"

take_dry_run "$@"
to="${ARGS[0]:-benchmarks/gpu-$(date +%F)}"
run setup_env cuda
run setup_env test
export JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_PREALLOCATE=false
run mkdir -p "$to"

failed=()
part() { # part NAME COMMAND...
  local name="$1"
  shift
  if [[ -n "$DRY_RUN" ]]; then
    run "$@"
  elif "$@" 2>"$to/$name.log" | tee "$to/$name.md"; then
    echo "$name: $to/$name.md"
  else
    failed+=("$name")
    echo "$name: FAILED, see $to/$name.log" >&2
  fi
}

part precision python -m benchmarks.precision
part side_by_side python -m benchmarks.side_by_side
part side_by_side_bfloat16 python -m benchmarks.side_by_side --dtype bfloat16
part throughput python -m benchmarks.throughput
part decode python -m benchmarks.decode "--shape=${SHAPE:-llama-3-8b}" --batches=1,8,32

if ((${#failed[@]})); then
  echo "gpu: failed: ${failed[*]}" >&2
  exit 1
fi
