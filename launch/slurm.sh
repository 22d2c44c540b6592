#!/usr/bin/env bash
# A program on the GPUs of several nodes, one process a node:
#   sbatch --nodes=4 --gpus-per-node=8 launch/slurm.sh MODULE FLAGS…
# Before the time limit, and when the job is preempted, Slurm sends SIGTERM: the program saves, and the
# job goes back into the queue until it is finished. .venv and --workdir must be on a shared file system:
# run `source launch/setup.sh && setup_env cuda` once beforehand. `bash launch/slurm.sh --dry-run …` prints.
#SBATCH --job-name=reptune
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@180
#SBATCH --output=slurm-%j.log
set -euo pipefail

# Slurm runs a copy of this file; the repository is where it was submitted.
cd "${SLURM_SUBMIT_DIR:-$PWD}"
# shellcheck source-path=SCRIPTDIR source=setup.sh
source launch/setup.sh

take_dry_run "$@"
set -- "${ARGS[@]}"
module="${1:?a module, e.g. reptune_jax.train}"
shift

export JAX_PLATFORMS=cuda XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-.92}"
export REPTUNE_GRACE="${REPTUNE_GRACE:-170}" # seconds for the save, of the 180 above
log=".slurm-${SLURM_JOB_ID:-dry}.last"
code=0
run srun --kill-on-bad-exit=1 .venv/bin/python -m "$module" \
  --config.mesh.data=1 --config.mesh.fsdp=-1 "$@" | tee "$log" || code=$?
if grep -q "stopped by SIGTERM" "$log"; then # it exits with 143
  run scontrol requeue "$SLURM_JOB_ID" && code=0
fi
rm -f "$log"
exit "$code"
