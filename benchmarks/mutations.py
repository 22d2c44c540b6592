"""Would the tests notice? Small wrong changes of the code, one at a time, each against its tests.

    python -m benchmarks.mutations [--only WORD] [--check] [--results FILE] [--limit SECONDS]

`mutations.toml` is the table: a file, the tests that should notice, and changes of its text. Each
change is made in a scratch copy of the tree, never here. Results are kept, so that a run that was
stopped goes on, and a change runs again only where its file or its tests are other ones by then.

killed: a test failed. survived: none did. equivalent: nothing can tell, for the reason given.
Ends with 1 if one survived, with 2 before anything ran if a text of the table is not found exactly
once or the tests do not pass as they are.
"""

import argparse
import hashlib
import importlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_suffix(".toml")
# Imported once; every test process is a fork that has them already. Nothing of ours: the fork
# imports that from the scratch copy.
HEAVY = ("pytest", "jax.numpy", "flax.linen", "optax", "orbax.checkpoint", "ml_collections")
HEAVY += ("scipy.stats", "pandas", "datasets", "torch", "transformers")
HEAVY += ("transformers.models.llama.modeling_llama",)
_CLOCK = itertools.count(10**9)
KINDS = ("killed", "too slow", "survived", "equivalent", "broken")


class Change(NamedTuple):
    """One entry of the table."""

    path: str
    name: str
    old: str
    new: str
    tests: tuple[str, ...]
    equivalent: str  # why nothing can tell


def read_table() -> list[Change]:
    """All changes, in the order of the file."""
    files = tomllib.loads(TABLE.read_text(encoding="utf-8"))["file"]
    return [
        Change(
            file["path"],
            one["name"],
            one["old"],
            one["new"],
            tuple(one.get("tests", file["tests"])),
            one.get("equivalent", ""),
        )
        for file in files
        for one in file["change"]
    ]


def problems(changes: list[Change]) -> Iterator[str]:
    """What of the table no longer fits the tree."""
    for one in changes:
        times = (ROOT / one.path).read_text(encoding="utf-8").count(one.old)
        if times != 1 or one.old == one.new:
            yield f"{one.path}: {one.name}: text is found {times} times, expected once: {one.old!r}"
        yield from (
            f"{one.path}: no {test}"
            for test in one.tests
            if not (ROOT / test.partition("::")[0]).exists()
        )


def key(one: Change, text: str) -> str:
    """A result counts as long as the changed file and the tests are these."""
    tests = [
        (p.relative_to(ROOT).as_posix(), p.read_text(encoding="utf-8"))
        for test in one.tests
        for at in [ROOT / test.partition("::")[0]]
        for p in (sorted(at.rglob("*.py")) if at.is_dir() else [at])
    ]
    return hashlib.sha256(json.dumps([text, one.tests, tests]).encode()).hexdigest()[:16]


def copy_tree(to: Path) -> None:
    """The working tree as git sees it, uncommitted files too."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "-co", "--exclude-standard"]
    listed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def write(path: Path, text: str) -> None:
    """With a time of its own: Python takes bytecode for current by size and seconds."""
    path.write_text(text, encoding="utf-8")
    os.utime(path, (next(_CLOCK),) * 2)


class _First:
    """A pytest plugin: the first test that failed."""

    failed = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid


def in_child(tree: Path, one: Change, answer: Path) -> None:
    """A test process; never returns."""
    os.setsid()
    log = os.open(answer.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(tree)
    for name in [m for m in sys.modules if m.split(".")[0] in ("benchmarks", "reptune_jax")]:
        del sys.modules[name]
    sys.path[:] = [str(tree), *(p for p in sys.path if p and Path(p).resolve() != ROOT)]
    os.environ["PYTHONPATH"] = str(tree)
    import pytest

    first = _First()
    words = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *one.tests]
    code = int(pytest.main(words, plugins=[first]))
    ours = sys.modules.get("reptune_jax")
    if ours is not None and not str(ours.__file__).startswith(str(tree)):
        code, first.failed = 99, f"the tests imported {ours.__file__}"
    answer.write_text(json.dumps({"code": code, "by": first.failed}))
    sys.stdout.flush()
    os._exit(0)


def run_tests(tree: Path, one: Change, limit: float) -> dict[str, Any]:
    """What the tests say of the tree as it is: outcome, by which test, seconds."""
    answer, began = tree.with_name("answer.json"), time.monotonic()
    answer.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        try:
            in_child(tree, one, answer)
        finally:
            os._exit(1)
    outcome = "broken"
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        time.sleep(0.05)
        if time.monotonic() - began > limit:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            outcome = "too slow"
            break
    found = json.loads(answer.read_text()) if answer.exists() else {"code": -1, "by": ""}
    if outcome == "broken":
        outcome = {0: "survived", 1: "killed"}.get(found["code"], "broken")
    return {
        "outcome": outcome,
        "by": found["by"],
        "seconds": round(time.monotonic() - began, 1),
        "log": answer.with_suffix(".log").read_text(errors="replace")[-3000:],
    }


def examine(changes: list[Change], results: Path, limit: float) -> dict[str, dict[str, Any]]:
    """Every result by key; those that are missing are made now."""
    known: dict[str, dict[str, Any]] = {}
    if results.exists():
        known = {r["key"]: r for r in map(json.loads, results.read_text().splitlines())}
    due: dict[str, tuple[Change, str]] = {}
    texts = {one.path: (ROOT / one.path).read_text(encoding="utf-8") for one in changes}
    package = "".join(p.read_text("utf-8") for p in sorted((ROOT / "reptune_jax").rglob("*.py")))
    for one in changes:
        text = texts[one.path].replace(one.old, one.new)
        if not one.equivalent and key(one, text) not in known:
            whole = one._replace(path="", name=f"as it is: {' '.join(one.tests)}")
            if key(whole, package) not in known:
                due[key(whole, package)] = whole, package
            due[key(one, text)] = one, text
    if not due:
        return known
    for name in HEAVY:
        importlib.import_module(name)
    results.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mutations") as scratch:
        tree = Path(scratch) / "tree"
        copy_tree(tree)
        for which, (one, text) in due.items():
            if one.path:
                write(tree / one.path, text)
            found = {"key": which, **run_tests(tree, one, limit)}
            if one.path:
                write(tree / one.path, texts[one.path])
            elif found["outcome"] != "survived":
                raise SystemExit(f"{found['log']}\n{', '.join(one.tests)}: must pass as they are.")
            with results.open("a") as out:
                out.write(json.dumps(found) + "\n")
            known[which] = found
            about = f"{found['outcome']:9} {found['seconds']:6.1f} s  {one.path}: {one.name}"
            print(about, file=sys.stderr, flush=True)
    return known


def table(changes: list[Change], known: dict[str, dict[str, Any]]) -> tuple[list[str], int]:
    """The lines of the report, and how many survived (or did not run)."""
    rows, counts = [], {one.path: dict.fromkeys(KINDS, 0) for one in changes}
    for one in changes:
        text = (ROOT / one.path).read_text(encoding="utf-8").replace(one.old, one.new)
        found = known.get(key(one, text), {})
        outcome = "equivalent" if one.equivalent else found["outcome"]
        counts[one.path][outcome] += 1
        by = one.equivalent or found["by"].replace("tests/", "", 1)
        rows.append(f"| {one.path} | {one.name} | {outcome} | {by} |")
    lines = ["| file | change | result | by, or why |", "|---|---|---|---|", *rows, ""]
    lines += [f"| file | {' | '.join(KINDS)} |", "|---" * (len(KINDS) + 1) + "|"]
    counts["**all**"] = {k: sum(each[k] for each in counts.values()) for k in KINDS}
    lines += [f"| {p} | {' | '.join(str(n) for n in c.values())} |" for p, c in counts.items()]
    return lines, counts["**all**"]["survived"] + counts["**all**"]["broken"]


def main() -> None:
    """Checks the table, runs what is due, prints the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="changes whose path or name has this in it")
    parser.add_argument("--check", action="store_true", help="whether the table fits the tree")
    parser.add_argument("--results", type=Path, default=ROOT / "runs/mutations.jsonl")
    parser.add_argument("--limit", type=float, default=600, help="seconds for one change's tests")
    args = parser.parse_args()
    changes = [one for one in read_table() if args.only in f"{one.path} {one.name}"]
    if wrong := list(dict.fromkeys(problems(changes))):
        print("\n".join(wrong), file=sys.stderr)
        raise SystemExit(2)
    if args.check:
        print(f"{len(changes)} changes fit the tree")
        return
    # Read by jax when it is imported, and by the test processes. A changed program has another key
    # in the cache, so what is kept of the others is right.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(args.results.absolute().parent / "programs")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    lines, bad = table(changes, examine(changes, args.results, args.limit))
    print("\n".join(lines))
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
