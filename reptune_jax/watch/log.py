"""Metrics out: metrics.jsonl, TensorBoard events with the same numbers, one progress line."""

import contextlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from reptune_jax import distributed, ending
from reptune_jax.console import clock, say
from reptune_jax.folder import Run, write_whole
from reptune_jax.watch import cosines, heatmap
from reptune_jax.watch.events import Events, flat_settings

_SHOWN = ("loss", "token_loss", "cosine_loss", "retain_loss", "cosine/mean")
_RATES = ("examples_per_s", "mfu")


class Log:
    """Writes on process 0 only; to be closed.

    A run that resumes from step `since` loses what was logged after it, since it logs that again;
    the `spent` seconds of its earlier starts count towards what it says is left.
    """

    def __init__(
        self,
        workdir: Path,
        steps: int,
        since: int | None = None,
        spent: float = 0.0,
    ):
        self._steps, self._writes, self._spent = steps, distributed.is_first(), spent
        self._began: float | None = None
        self._last: tuple[int, float] | None = None
        self._aside = 0.0
        if self._writes:
            metrics = self._metrics = Run(workdir).metrics
            workdir.mkdir(parents=True, exist_ok=True)
            if metrics.exists():
                last = -1 if since is None else since
                kept = [json.dumps(row) + "\n" for row in read(metrics) if row["step"] <= last]
                write_whole(metrics, "".join(kept))
            self._jsonl = metrics.open("a")
            self._events = Events(workdir, since or 0)

    def close(self) -> None:
        """Writes what is left."""
        if self._writes:
            self._jsonl.close()
            self._events.close()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One line and one event of plain numbers. A jsonl has no NaN, so those become null."""
        if not self._writes:
            return
        row = {k: (v if math.isfinite(v) else None) for k, v in metrics.items()}
        with ending.of_file(self._metrics):
            self._jsonl.write(json.dumps({"step": step, **row}) + "\n")
            self._jsonl.flush()
        self._events.scalars(step, metrics)

    def cosines(self, step: int, found: cosines.Spread, layers: Iterable[int]) -> None:
        """A histogram of each of these layers, and one picture of all layers along the answer."""
        if not self._writes:
            return
        for l in layers:
            rows = cosines.buckets(found.count_NxK[l])
            self._events.histogram(step, f"val/cosines/layer_{l:02d}", rows)
        png = heatmap.draw(cosines.by_place(found), f"validation, step {step}")
        self._events.image(step, "val/cosines/map", png)

    def settings(self, run: str, config: Mapping[str, Any], metrics: Iterable[str]) -> None:
        """The run's row in TensorBoard's HPARAMS tab: its config, and the last of each metric."""
        if self._writes:
            self._events.hparams(run, flat_settings(config), metrics)

    def finished(self) -> None:
        """The run is at its end."""
        if self._writes:
            self._events.finished()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Around what is no training step: its time is no part of the rates."""
        began = time.monotonic()
        yield
        self._aside += time.monotonic() - began

    def rates(self, step: int, examples: int, tokens: int) -> dict[str, float]:
        """Examples and tokens (padding included) per second since the last call; none at first."""
        now, last = time.monotonic() - self._aside, self._last
        self._last = (step, now)
        if last is None or step == last[0]:
            return {}
        per_second = (step - last[0]) / (now - last[1])
        return {"examples_per_s": examples * per_second, "tokens_per_s": tokens * per_second}

    def progress(self, step: int, metrics: dict[str, float]) -> None:
        """step 20/40 loss 1.234 … examples_per_s 6.1, 3 min 05 s left."""
        shown = " ".join(f"{k} {v:.4g}" for k, v in metrics.items() if k in (*_SHOWN, *_RATES))
        if step < self._steps:
            shown += f", {clock((self._steps - step) * self.spent() / step)} left"
        say(f"step {step}/{self._steps} {shown}")

    def begin(self) -> None:
        """Training time counts from here: compiling is not part of it."""
        self._began = time.monotonic()

    def spent(self) -> float:
        """Seconds of training, evaluations included, over all starts of this run."""
        return self._spent + (time.monotonic() - self._began if self._began else 0.0)


def read(metrics: Path) -> Iterator[dict[str, Any]]:
    """What a run logged; without a line that is still being written, or that a crash cut short."""
    for line in metrics.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)
