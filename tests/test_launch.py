"""The shell scripts: shellcheck, and what --dry-run says they would do."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(
    str(p.relative_to(ROOT)) for at in ("launch", "benchmarks") for p in (ROOT / at).glob("*.sh")
)
TRAIN = ("reptune_jax.train", "--config=configs/a b.py", "--workdir=runs/x")


def bash(*args, **env):
    return subprocess.run(
        ["bash", *args], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True
    )


def dry(script, *args, **env):
    done = bash(f"launch/{script}", "--dry-run", *args, **env)
    assert done.returncode == 0, done.stderr
    return [line.strip() for line in done.stdout.splitlines()]


def test_shellcheck_finds_nothing():
    found = Path(sys.executable).with_name("shellcheck")
    program = str(found) if found.exists() else shutil.which("shellcheck")
    assert program, "shellcheck is missing: pip install -e '.[test]'"
    files = [*SCRIPTS, ".ci/run"]
    done = subprocess.run([program, "-x", *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_parses_and_the_readme_knows_it(script):
    assert bash("-n", script).returncode == 0
    assert Path(script).name in (ROOT / Path(script).parent / "README.md").read_text()


def test_what_is_imported_is_compiled_once_whatever_the_image_says(tmp_path):
    """Else every start of every program compiles it anew: seconds."""
    pip, installed = tmp_path / ".venv/bin/pip", (ROOT / "pyproject.toml").read_bytes()
    pip.parent.mkdir(parents=True)
    pip.write_text("#!/bin/sh\nexit 1\n")
    pip.chmod(0o755)
    pip.with_name("python").symlink_to(sys.executable)
    (tmp_path / "pyproject.toml").write_bytes(installed)
    stamp = tmp_path / ".venv/.installed-base"
    stamp.write_text(hashlib.sha256(installed).hexdigest())
    script = shutil.copytree(ROOT / "launch", tmp_path / "launch") / "setup.sh"
    command = f"source {script}; setup_env && python -c 'import sys; print(sys.flags)'"
    done = bash("-c", command, PYTHONDONTWRITEBYTECODE="1")
    assert "dont_write_bytecode=0" in done.stdout, done.stdout + done.stderr


def test_a_tpu_is_created_set_up_used_and_deleted():
    env = {"TPU_NAME": "t", "TPU_ZONE": "z", "TPU_SPOT": "1", "TPU_SHARE": "10.0.0.2:/share"}
    found = dry("tpu.sh", "keep", *TRAIN, **env)
    kinds = [line.split()[4] for line in found if line.startswith("gcloud")]
    assert kinds == ["create", "ssh", "scp", "ssh", "ssh", "ssh", "ssh", "delete"]
    create, warm_up, *rest, delete = [line for line in found if line.startswith("gcloud")]
    assert "--spot" in create and "--worker=0" in warm_up and "--quiet" in delete
    assert all(f"--zone={env['TPU_ZONE']}" in line for line in (create, warm_up, *rest, delete))
    assert any("10.0.0.2:/share" in line for line in rest)
    assert "reptune_jax.train" in rest[-1] and "--worker=all" in rest[-1]


def test_an_unknown_action_and_a_missing_setting_are_named():
    done = bash("launch/tpu.sh", "destroy")
    assert done.returncode == 1 and "got 'destroy', expected create, setup" in done.stderr
    done = bash("launch/tpu.sh", "--dry-run", "save")
    assert done.returncode != 0 and "TPU_BUCKET" in done.stderr


@pytest.mark.parametrize("script", ["gpu.sh", "slurm.sh"])
def test_a_program_runs_on_all_gpus_with_its_own_flags_last(script):
    command = dry(script, *TRAIN)[-1]
    assert "python -m reptune_jax.train --config.mesh.data=1 --config.mesh.fsdp=-1" in command
    assert command.endswith("--config=configs/a\\ b.py --workdir=runs/x")
    assert bash(f"launch/{script}", "--dry-run").returncode != 0


def test_a_card_is_tested_and_measured_by_one_command_each():
    tests = dry("test_gpu.sh", "-x")
    assert tests[:2] == ["setup_env cuda", "setup_env test"]
    assert "pytest -q tests/model" in tests[2] and tests[2].endswith("-x")
    assert tests[3] == "python -m benchmarks.precision"
    done = bash("benchmarks/gpu.sh", "--dry-run", "figures", SHAPE="llama-2-7b")
    assert done.returncode == 0, done.stderr
    parts = [line.split()[2] for line in done.stdout.splitlines() if line.startswith("python")]
    assert {"benchmarks.precision", "benchmarks.side_by_side", "benchmarks.decode"} < set(parts)
    assert "mkdir -p figures" in done.stdout and "--shape=llama-2-7b" in done.stdout
