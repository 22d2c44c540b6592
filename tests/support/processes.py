"""Real processes for tests: a tiny study with its vector and targets, and how to start one."""

import os
import queue
import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

from reptune_jax import lm
from reptune_jax.folder import Study as Folder
from reptune_jax.vectors import extraction
from tests.support import tiny, tiny_behavior

ROOT = Path(__file__).parents[2]
TIMES = ("examples_per_s", "tokens_per_s")


class Study:
    """A config file, and work folders that begin with the same vector and targets."""

    def __init__(self, folder: Path, **changes):
        self.folder = folder
        self.model = tiny.make_llama(folder / "model")
        self.behavior = tiny_behavior.write(folder)
        self.c = tiny_behavior.settings(self.model, self.behavior, **changes)
        self.config = folder / "mine.py"
        self.config.write_text(
            "from tests.support import tiny_behavior\n\n\n"
            "def get_config():\n"
            f"    changes = {changes!r}\n"
            f"    return tiny_behavior.settings({str(self.model)!r}, {str(self.behavior)!r}, "
            "**changes)\n"
        )
        made = Folder(folder / "made")
        extraction.run(self.c, made, lambda: lm.load(str(self.model), "float32"))

    def workdir(self, name: str) -> Path:
        shutil.copytree(self.folder / "made", self.folder / name)
        return self.folder / name

    def start(
        self,
        name: str,
        workdir: Path,
        *flags: str,
        sleep: float = 0.0,
        devices: int = 1,
        cwd: Path = ROOT,
    ):
        command = [sys.executable, "-m", "tests.support.run_program", name, str(sleep)]
        command += [f"--config={self.config}", f"--workdir={workdir}", *flags]
        return Running(command, devices, cwd)

    def pair(self, name, workdir, *flags, sleep=0.0, each=((), ()), cwds=(ROOT, ROOT)):
        """The same program on two processes of two devices each; flags and folders of `each`."""
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            where = f"--coordinator=127.0.0.1:{s.getsockname()[1]}"
        return [
            self.start(
                name, workdir, where, "--processes=2", f"--process_id={i}", *flags, *each[i],
                sleep=sleep, devices=2, cwd=cwds[i],
            )
            for i in (0, 1)
        ]  # fmt: skip


class Running:
    """A process whose output is read as it comes."""

    def __init__(self, command: list[str], devices: int, cwd: Path):
        ours = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
        env = {**os.environ, "PYTHONPATH": str(ROOT), **ours}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, cwd=cwd, env=env, stdout=pipe, stderr=pipe, text=True
        )
        self.lines: list[str] = []
        self.err: list[str] = []
        self._new: queue.Queue = queue.Queue()
        self._threads = [
            threading.Thread(target=self._read, args=a, daemon=True)
            for a in ((self.process.stdout, self.lines), (self.process.stderr, self.err))
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, pipe, lines) -> None:
        for line in pipe:
            lines.append(line)
            self._new.put(line)
        self._new.put(None)

    def until(self, text: str, timeout: float = 240) -> str:
        """The first line that holds `text`."""
        ended = 0
        while ended < 2:
            line = self._new.get(timeout=timeout)
            ended += line is None
            if line is not None and text in line:
                return line
        raise AssertionError(f"ended without {text!r}:\n{self.out}\n{''.join(self.err)}")

    def end(self, timeout: float = 240) -> int:
        code = self.process.wait(timeout)
        for thread in self._threads:
            thread.join(timeout)
        return code

    @property
    def out(self) -> str:
        # Gloo writes its line in pieces, which mix with those of another: what is ours has a time.
        return "".join(line for line in self.lines if re.match(r"\[\d\d:\d\d:\d\d\] ", line))

    def check(self, code: int = 0) -> str:
        """Ended as it should and without alarming anyone."""
        found, err = self.end(), "".join(self.err)
        assert found == code, self.out + err
        for word in ("Traceback", "Error", "ERROR", "FATAL"):
            assert word not in err, err
        return self.out
