#!/usr/bin/env bash
# From a bare clone to a study of a small real model: `launch/quickstart.sh [flags of the study]`, for example
# `--workdir=runs/other`. Needs Python >= 3.11 and the network. Run again, it skips what is done. PYTHON: the
# interpreter that makes .venv.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

began=$SECONDS
workdir=runs/quickstart
for flag in "$@"; do
  if [[ "$flag" == --workdir=* ]]; then
    workdir="${flag#--workdir=}"
  fi
done

step() { # step TEXT SINCE
  echo "quickstart: $1: $((SECONDS - $2)) s"
}

echo "quickstart: 1/3 Python environment in .venv (the first time some minutes)"
start=$SECONDS
setup_env
step environment "$start"

echo "quickstart: 2/3 model SmolLM2-135M-Instruct"
start=$SECONDS
model="$(PYTHON=python bash launch/fetch_smollm2.sh)"
step "model $model" "$start"

flags=(--config=configs/sentiment.py:quick "--config.model=$model" "--workdir=$workdir")
echo "quickstart: 3/3 python -m reptune_jax.study ${flags[*]} $*"
start=$SECONDS
python -m reptune_jax.study "${flags[@]}" "$@"
step study "$start"

step "all" "$began"
echo "Report:   $workdir/report/index.html"
for folder in "$workdir"/export/*/; do
  if [[ -d "$folder" ]]; then
    echo "Exported: $folder (an ordinary Hugging Face folder)"
  fi
done
echo "Chat:     .venv/bin/reptune chat --workdir=$workdir"
