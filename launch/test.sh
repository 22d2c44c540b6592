#!/usr/bin/env bash
# Lint, format, types and tests, from a bare clone on: `launch/test.sh [pytest arguments]`.
# Every stage runs even where one before it failed. TEST_WORKERS sets the number of test processes.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

failed=()
times=()

stage() { # stage NAME COMMAND...
  local name="$1" start=$SECONDS outcome=ok
  shift
  echo "== $name"
  if ! "$@"; then
    failed+=("$name")
    outcome=FAILED
  fi
  times+=("$name $outcome $((SECONDS - start))s")
}

stage setup setup_env test
if ((${#failed[@]})); then
  echo "test: nothing was checked, because setup failed." >&2
  exit 1
fi

# The test processes share the cores between them; more threads in each only get in each other's way.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

stage lint ruff check --quiet
stage format ruff format --check --quiet
stage types mypy
# Neighbours stay in one process, since they share what a module sets up.
stage tests python -m pytest -q -n "${TEST_WORKERS:-2}" --dist worksteal "$@"

printf '== %s\n' "${times[@]}"
if ((${#failed[@]})); then
  echo "test: failed: ${failed[*]}" >&2
  exit 1
fi
