# shellcheck shell=bash
# Sourced by the scripts beside it. `setup_env [extra]` moves to the repository root, makes .venv where
# there is none, installs the package in it (editable, with that extra: test, cuda or tpu) and puts it on
# PATH. PYTHON picks the interpreter. What was installed for this same pyproject.toml is left alone.

setup_env() {
  local extra="${1:-}" python="${PYTHON:-python3}" stamp hash
  cd "$(dirname "${BASH_SOURCE[0]}")/.." || return 1
  if [[ ! -x .venv/bin/pip ]]; then
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      echo "setup: $python is missing or older than 3.11. Install Python >= 3.11 or set PYTHON." >&2
      return 1
    fi
    "$python" -m venv .venv || return 1
  fi
  export VIRTUAL_ENV="$PWD/.venv" PATH="$PWD/.venv/bin:$PATH"
  # Images of containers often set it: every start would compile all that it imports, for seconds.
  unset PYTHONDONTWRITEBYTECODE

  stamp=".venv/.installed-${extra:-base}"
  # sha256sum is not on every system; Python is.
  hash="$(python -c 'import hashlib; print(hashlib.sha256(open("pyproject.toml", "rb").read()).hexdigest())')" ||
    return 1
  if [[ -f "$stamp" && "$(<"$stamp")" == "$hash" ]]; then
    return 0
  fi
  echo "setup: installing reptune_jax${extra:+[$extra]} into .venv"
  # Most of what is installed is never imported; what is, Python compiles then, once.
  python -m pip install --quiet --disable-pip-version-check --no-compile -e ".${extra:+[$extra]}" || return 1
  echo "$hash" >"$stamp"
}

# `take_dry_run "$@"` sets DRY_RUN where the first argument is --dry-run, and ARGS to the others; then
# `run COMMAND…` prints what it would run.
# shellcheck disable=SC2034 # ARGS is for the scripts that source this one
take_dry_run() {
  DRY_RUN="" ARGS=("$@")
  if [[ "${1:-}" == --dry-run ]]; then
    DRY_RUN=1 ARGS=("${@:2}")
  fi
}

run() {
  if [[ -z "$DRY_RUN" ]]; then
    "$@"
    return
  fi
  printf '%q ' "$@"
  echo
}
