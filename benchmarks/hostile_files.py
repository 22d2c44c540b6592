"""Malformed files of every format, read by processes with limits on time and memory.

    python -m benchmarks.hostile_files [--per-format 40] [--only gguf] [--seed 0] [--show]

Every file is drawn by hypothesis, the same for a seed. It has to be refused in one line, or rightly
accepted; nothing may pass without a word that is known to be wrong, take more than 10 s, or need
more than 1 GiB over the idle process that reads it. Prints the counts; exit code 1 on any fault.
"""

import argparse
import collections
import gc
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

SECONDS, GIB = 10, 1 << 30
_ALLOWED = 8 * GIB  # of address space, of which little is ever touched
_GOOD = ("refused", "accepted")
_BAD = ("silent", "traceback", "several lines", "too slow", "too large", "died")


class Result(NamedTuple):
    """What came of one file."""

    what: str
    outcome: str
    said: str
    seconds: float
    over: int  # bytes at the peak, over the idle process


class Reader:
    """A process that reads one file after another; a new one where it has died."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._start()

    def read(self, number: int, case: Any) -> Result:
        """One file, in at most SECONDS."""
        from tests.support import hostile_files

        folder = hostile_files.lay(case, self.root / "whole", self.root / f"case{number}")
        began = time.monotonic()
        self.pipe.send((case, folder))
        try:
            if self.pipe.poll(SECONDS):
                outcome, said, over = self.pipe.recv()
            else:
                outcome, said, over = "too slow", "", 0
        except EOFError:
            self.process.join()
            outcome, said, over = "died", f"exit code {self.process.exitcode}", 0
        spent = time.monotonic() - began
        if outcome in ("too slow", "died"):
            self.end()
            self._start()
        if over > GIB and outcome in _GOOD:
            outcome = "too large"
        shutil.rmtree(folder, ignore_errors=True)
        return Result(case.what, outcome, said.replace(str(folder), "…"), spent, over)

    def end(self) -> None:
        """The process is gone after it."""
        self.process.kill()
        self.process.join()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(self.root, theirs))
        self.process.start()
        theirs.close()
        self.pipe.recv()


def main() -> int:
    """Tries all, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--per-format", type=int, default=40)
    parser.add_argument("--only", default="", help="a part of a format's name")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="every file and what was said of it")
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0"
    results: dict[str, list[Result]] = collections.defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        cases = _cases(root, options)
        reader = Reader(root)
        for number, case in enumerate(cases):
            results[case.format].append(found := reader.read(number, case))
            if options.show or found.outcome not in _GOOD:
                cost = f"{found.seconds:4.1f} s {found.over / GIB:5.2f} GiB"
                print(
                    f"{case.format:9} {found.outcome:9} {cost}  {found.what!r}: {found.said}",
                    flush=True,
                )
        reader.end()
    print(table(results))
    return int(any(r.outcome not in _GOOD for found in results.values() for r in found))


def _cases(root: Path, options: argparse.Namespace) -> list[Any]:
    from tests.support import damage, hostile_files

    maker = multiprocessing.get_context("spawn").Process(target=_make, args=(root / "whole",))
    maker.start()  # which imports torch, and the readers need not
    maker.join()
    cases = []
    for name, format in hostile_files.FORMATS.items():
        if options.only in name:
            strategy = format.cases(root / "whole" / format.whole)
            cases += [damage.Case(name, "the whole file", {}, False)]
            cases += damage.drawn(strategy, options.per_format, options.seed)
    return cases


def _make(folder: Path) -> None:
    from tests.support import hostile_files

    hostile_files.make_whole(folder)


def _serve(root: Path, pipe: Any) -> None:
    """Reads what it is told to, in a process that has read whole files of every kind before."""
    from tests.support import damage, hostile_files

    for name, format in hostile_files.FORMATS.items():
        whole = damage.Case(name, "the whole file", {}, False)
        found = hostile_files.outcome(whole, root / "whole" / format.whole, root / "whole")
        assert found[0] == "accepted", (name, found)
    limit = _status("VmSize") + _ALLOWED
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    pipe.send("ready")
    while True:
        case, folder = pipe.recv()
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now
        idle = _status("VmRSS")
        found = hostile_files.outcome(case, folder, root / "whole")
        pipe.send((*found, _status("VmHWM") - idle))


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def table(results: dict[str, list[Result]]) -> str:
    """Markdown: a row a format, and one of all."""
    head = ["format", "files", *_GOOD, *_BAD, "slowest, s", "peak over idle, GiB"]
    rows = [head, ["---"] * len(head)]
    for name, found in [*results.items(), ("all", [r for f in results.values() for r in f])]:
        counts = collections.Counter(r.outcome for r in found)
        most = f"{max(r.seconds for r in found):.1f}", f"{max(r.over for r in found) / GIB:.2f}"
        rows.append([name, str(len(found)), *(str(counts[k]) for k in (*_GOOD, *_BAD)), *most])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
