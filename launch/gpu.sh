#!/usr/bin/env bash
# A program on all GPUs of this machine, weights sharded over them:
#   launch/gpu.sh [--dry-run] MODULE FLAGS…        e.g. reptune_jax.train --config=… --workdir=…
# CUDA_VISIBLE_DEVICES picks GPUs. A flag given here wins over those below.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

take_dry_run "$@"
set -- "${ARGS[@]}"
module="${1:?a module, e.g. reptune_jax.train}"
shift

run setup_env cuda
export JAX_PLATFORMS=cuda XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-.92}"
# One process drives all GPUs of a machine; on one GPU this is the same as no sharding.
run exec python -m "$module" --config.mesh.data=1 --config.mesh.fsdp=-1 "$@"
