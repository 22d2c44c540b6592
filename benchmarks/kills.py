"""Kills and signals in real programs: what is lost, how long they take to end, what they say.

    python -m benchmarks.kills FOLDER [--kills=20] [--seed=0]

A tiny study is run undisturbed, then again and again with `kill -9` at random moments, saves
included, then every program with every signal. Each process is a fork of this one, which has
imported everything and touched no device. Prints Markdown tables; exits with 1 if anything is lost.
"""

import argparse
import json
import os
import pickle
import random
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pyarrow.parquet as pq
from safetensors import safe_open

from reptune_jax import program as shared
from reptune_jax import tuned_run
from reptune_jax.data import neutral
from reptune_jax.tuning.run import Run
from tests.support import processes, tiny_behavior

CHANGES: dict[str, Any] = {
    "train__steps": 30,
    "train__eval_every": 10,
    "train__save_every": 1,
    "train__batch": 2,
    "study__arms": ("base", "steer", "dual"),
    "study__signs": (1,),
    "study__seeds": (0,),
    "dial__arms": ("dual",),
    "dial__scales": (1.0, 2.0),
}
STEP = 0.1  # seconds that a step takes at least: most of a study is training
ON_TIME = 10.0
LEFT = ("*.tmp", ".*.tmp", ".lock", ".*.lock", ".*.partial", "*orbax-checkpoint-tmp*", "*.broken*")


def started(work: Callable[[], object], log: Path) -> int:
    """`work` in a process of its own that ends as a program does; its number."""
    pid = os.fork()
    if pid:
        return pid
    for signum in (signal.SIGINT, signal.SIGHUP):  # jobs in the background and nohup ignore them
        signal.signal(signum, signal.SIG_DFL)
    with log.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    work()
    sys.exit(0)


def program(name: str, *flags: str) -> Callable[[], object]:
    """A program as `python -m` runs it."""

    def work() -> object:
        sys.argv = [name, *flags]
        return runpy.run_module(f"reptune_jax.{name}", run_name="__main__", alter_sys=True)

    return work


def ended(pid: int, seconds: float, log: Path | None = None) -> int | None:
    """Its exit status, negative for a signal; None if it goes on, or its log tells of a step."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not (log and "] step " in log.read_text()):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return None


def killed(pid: int) -> None:
    """At once."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def finish(work: Callable[[], object], log: Path) -> None:
    """Undisturbed, to its end."""
    status = ended(started(work, log), 3600)
    assert status == 0, f"ended with {status}:\n{log.read_text()}"


# ---------------------------------------------------------------- what must be the same


def files(folder: Path) -> dict[str, Any]:
    """What a study holds, without times and without what the report draws."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".parquet":
            found[name] = repr(pq.read_table(path).to_pylist())  # NaN is itself, as text
        elif path.name == "metrics.jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [
                {k: v for k, v in row.items() if k not in processes.TIMES} for row in rows
            ]
        elif path.suffix == ".safetensors":  # whose header names its keys in any order
            with safe_open(path, "np") as file:
                tensors = {key: file.get_tensor(key).tobytes() for key in file.keys()}  # noqa: SIM118
                found[name] = file.metadata(), tensors
        elif path.name in ("targets.jsonl", "done.json"):
            found[name] = path.read_bytes()
        elif path.name == "index.html":
            found[name] = True
    for run in folder.glob("*/checkpoints"):
        tuned = tuned_run.load(run.parent)
        found[run.parent.name] = tuned.step, {k: v.tobytes() for k, v in tuned.trained.items()}
    return found


def read(folder: Path) -> dict[str, Any]:
    """`files`, of a process of its own: this one must not touch a device."""
    to = folder.parent / "read.pickle"
    finish(lambda: to.write_bytes(pickle.dumps(files(folder))), folder.parent / "read.log")
    return pickle.loads(to.read_bytes())


def lost(folder: Path, whole: dict[str, Any]) -> list[str]:
    """What differs from the undisturbed one, and what was left half made."""
    now = read(folder)
    wrong = [name for name in whole.keys() | now.keys() if whole.get(name) != now.get(name)]
    return wrong + [str(p) for pattern in LEFT for p in folder.parent.rglob(pattern)]


def place(log: Path, workdir: Path) -> str:
    """What a study was doing, from the last line that says what began, and what it left."""
    if any(workdir.glob("*/checkpoints/*.orbax-checkpoint-tmp")):
        return "a save"
    begun = [line for line in log.read_text().splitlines() if "==>" in line or "step " in line]
    last = begun[-1] if begun else "starting"
    return "a training step" if "step " in last else last.partition("==> ")[2] or last


# ---------------------------------------------------------------- the two tables


def kills(study: processes.Study, n: int, rng: random.Random, whole: dict[str, Any]) -> list[str]:
    """Kills studies; returns what was lost."""
    wrong: list[str] = []
    at: dict[str, int] = {}
    done = began = 0
    while done < n:
        began += 1
        workdir, log = study.folder / f"killed{began}" / "study", study.folder / "killed.log"
        work = program("study", f"--config={study.config}", f"--workdir={workdir}")
        while True:
            log.write_text("")
            pid, status = started(work, log), None
            steps = rng.random() < 0.6  # then it is killed while it trains, where that is not done
            if done < n and steps:
                status = ended(pid, 600, log)
            if status is None:
                wait = rng.uniform(0.0, 3.0 if steps else 14.0) if done < n else 3600
                status = ended(pid, wait)
            if status is not None:
                assert status == 0, f"ended with {status}:\n{log.read_text()}"
                break
            killed(pid)
            where = place(log, workdir)
            done, at[where] = done + 1, at.get(where, 0) + 1
            print(f"kill {done}: {where}", file=sys.stderr, flush=True)
        wrong += lost(workdir, whole)
    print(f"\n{n} times `kill -9`, {began} studies, all resumed to their end; lost: ", end="")
    print(", ".join(wrong) or "nothing", "\n\n| killed in | times |\n|---|---|")
    for where, times in sorted(at.items()):
        print(f"| {where} | {times} |")
    return wrong


def signals(study: processes.Study, rng: random.Random, whole: dict[str, Any]) -> Iterator[str]:
    """Signals to every program; yields what was wrong."""
    print("\n| program | SIGTERM | SIGINT | SIGHUP | lost |\n|---|---|---|---|---|")
    for name, work, compare in programs(study, whole):
        cells, log = [], study.folder / "signal.log"
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            for longest in (6.0, 3.0, 1.0):  # it may be faster than that
                pid = started(work, log)
                status = ended(pid, rng.uniform(0.5, longest))
                if status is None:
                    break
            else:
                yield f"{name}: ended by itself, with {status}"
                continue
            began = time.monotonic()
            os.kill(pid, signum)
            status = ended(pid, 60)
            if status is None:
                killed(pid)
            took, said = time.monotonic() - began, log.read_text()
            if status == -signum:  # it came before the program heeds signals, while Python imports
                status = 128 + signum  # what a shell is told then
            cells.append(f"{status}, {took:.1f} s")
            lines = [line for line in said.splitlines() if "stopped by" in line]
            if status not in (0, 128 + signum) or took > ON_TIME:
                yield f"{name}: {signum.name}: {cells[-1]}"
            if "Traceback" in said or len(lines) > 1:
                yield f"{name}: {signum.name} said:\n{said}"
        finish(work, log)
        wrong = compare()
        yield from (f"{name}: {one}" for one in wrong)
        print(f"| {name} | {' | '.join(cells)} | {len(wrong) or 'nothing'} |", flush=True)


def programs(
    study: processes.Study, whole: dict[str, Any]
) -> Iterator[tuple[str, Callable[[], object], Callable[[], list[str]]]]:
    """(name, how to run it, what is lost afterwards): in the order that they need one another."""
    workdir = study.folder / "signalled" / "study"
    flags = f"--config={study.config}", f"--workdir={workdir}"

    def same() -> list[str]:
        now = read(workdir)
        wrong = [name for name, value in now.items() if value != whole.get(name)]
        return wrong + [str(p) for pattern in LEFT for p in workdir.parent.rglob(pattern)]

    before = "extract", "train", "evals.tuned", "evals.baseline", "evals.steering", "evals.dial"
    for name in (*before, "study"):
        yield name, program(name, *flags), same
    yield "report", program("report", f"--workdir={workdir}"), same
    out = study.folder / "converted" / "orbax"
    convert = program("convert", f"--from={study.model}", f"--to={out}", "--format=orbax")

    def convert_anew() -> object:
        shutil.rmtree(out, ignore_errors=True)  # one that had ended before its signal
        return convert()

    yield "convert", convert_anew, lambda: [str(p) for p in out.parent.iterdir() if p != out]
    yield "chat", program("chat", f"--workdir={workdir}", "--prompt=Hi", "--prompt=Ho"), list
    shape = f"--model-config={study.model / 'config.json'}"
    yield "plan", program("plan", flags[0], "--topology=cpu:2", shape), list


def slowly() -> None:
    """Steps take their time, neutral texts are short, and every compiled program is kept."""
    batch, start = Run.batch, shared.start

    def start_and_keep() -> None:
        start()
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

    shared.start = start_and_keep

    def late(self: Any, step: int) -> Any:
        time.sleep(STEP)
        return batch(self, step)

    Run.batch = late  # type: ignore[method-assign]
    neutral.load_neutral = tiny_behavior.neutral  # type: ignore[assignment]


def main() -> None:
    """The undisturbed study, then both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.folder.mkdir(parents=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str((given.folder / "programs").absolute())
    slowly()
    log = given.folder / "made.log"
    finish(lambda: processes.Study(given.folder.absolute(), **CHANGES), log)
    study = processes.Study.__new__(processes.Study)
    study.folder = given.folder.absolute()
    study.model, study.config = study.folder / "model", study.folder / "mine.py"
    workdir, began = study.folder / "undisturbed" / "study", time.monotonic()
    finish(program("study", f"--config={study.config}", f"--workdir={workdir}"), log)
    print(f"undisturbed: {time.monotonic() - began:.0f} s", file=sys.stderr)
    whole, rng = read(workdir), random.Random(given.seed)
    wrong = kills(study, given.kills, rng, whole) if given.kills else []
    wrong += signals(study, rng, whole)
    for one in wrong:
        print("LOST", one)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
