#!/usr/bin/env bash
# A TPU VM, one host or a slice of many, from creation to deletion:
#   launch/tpu.sh [--dry-run] create | setup | run MODULE FLAGS… | keep MODULE FLAGS… | save | down
# `run` starts the program on all hosts; `keep` also creates the machine again after a preemption and
# starts the same command, which resumes. Settings are environment variables: TPU_NAME, TPU_ZONE,
# TPU_TYPE (v5litepod-16, v6e-8, …), TPU_VERSION, TPU_SPOT=1, TPU_SHARE (host:/path of an NFS export, needed
# where there are several hosts), TPU_BUCKET (gs://…, for `save`).
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

name="${TPU_NAME:-reptune}" zone="${TPU_ZONE:-us-central1-a}" type="${TPU_TYPE:-v5litepod-8}"
version="${TPU_VERSION:-v2-alpha-tpuv5-lite}"
tpu=(gcloud compute tpus tpu-vm)

on() { # on WORKER COMMAND: in the repository on that host (0, or all)
  run "${tpu[@]}" ssh "$name" --zone="$zone" --worker="$1" --command="$2"
}

create() {
  run "${tpu[@]}" create "$name" --zone="$zone" --accelerator-type="$type" --version="$version" \
    ${TPU_SPOT:+--spot}
}

setup() {
  local archive
  archive="$(mktemp --suffix=.tgz)"
  run git archive --format=tgz --output="$archive" HEAD
  on 0 true # the first connection makes and spreads the ssh key; all at once would race for it
  run "${tpu[@]}" scp "$archive" "$name:reptune.tgz" --zone="$zone" --worker=all
  on all "mkdir -p reptune_jax && tar -xzf reptune.tgz -C reptune_jax"
  if [[ -n "${TPU_SHARE:-}" ]]; then
    on all "sudo apt-get -qq install -y nfs-common && mkdir -p reptune_jax/runs &&
      (mountpoint -q reptune_jax/runs || sudo mount $TPU_SHARE reptune_jax/runs)"
  fi
  on all "cd reptune_jax && source launch/setup.sh && setup_env tpu"
  rm -f "$archive"
}

start() { # start MODULE FLAGS…
  local command
  command="$(printf '%q ' .venv/bin/python -m "$@")"
  on all "cd reptune_jax && REPTUNE_GRACE=25 $command" # a spot machine has 30 s
}

state() {
  "${tpu[@]}" describe "$name" --zone="$zone" --format='value(state)' 2>/dev/null || echo ABSENT
}

keep() {
  if [[ -n "$DRY_RUN" ]]; then
    echo "# until it ends on a machine that is still READY a minute later:"
    create
    setup
    start "$@"
    down
    return
  fi
  while true; do
    if [[ "$(state)" != READY ]]; then
      down || true # a preempted machine must be deleted before its name is free
      # Each in a shell of its own, where a step that fails ends it.
      if ! { bash "$0" create && bash "$0" setup; }; then
        sleep 60
        continue
      fi
    fi
    # A preempted program has saved and exits with 143; its machine is gone a minute later.
    local ended=0
    start "$@" || ended=$?
    sleep 60
    if [[ "$(state)" == READY ]]; then
      ((ended == 0)) && return
      echo "tpu: the program failed on a machine that is well; not trying again." >&2
      return 1
    fi
  done
}

save() {
  on 0 "cd reptune_jax && gcloud storage rsync --recursive runs ${TPU_BUCKET:?gs://… to save to}/runs"
}

down() {
  run "${tpu[@]}" delete "$name" --zone="$zone" --quiet
}

take_dry_run "$@"
set -- "${ARGS[@]}"
case "${1:-}" in
create | setup | save | down) "$1" ;;
run) shift && start "$@" ;;
keep) shift && keep "$@" ;;
*)
  echo "tpu: got '${1:-}', expected create, setup, run, keep, save or down." >&2
  exit 1
  ;;
esac
