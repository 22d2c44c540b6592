"""The host's side of a run: its rows, what its numbers say, its log and its checkpoints."""

import hashlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

from reptune_jax import distributed
from reptune_jax import mesh as meshes
from reptune_jax.data.batches import Batch, Keep, Rows, choose_rows
from reptune_jax.tuning import checkpoint, hardware
from reptune_jax.tuning import step as steps
from reptune_jax.tuning.checkpoint import Progress
from reptune_jax.tuning.log import Log
from reptune_jax.vectors.steering_vector import SteeringVector


class Corpus(NamedTuple):
    """All rows of a run: training, validation, retention for each."""

    train: Rows
    val: Rows
    keep: Keep | None
    keep_val: Keep | None

    def digest(self) -> str:
        """Identifies what is trained on: hosts with other data must not train together."""
        found = hashlib.sha256()
        for leaf in (*jax.tree.leaves(self.train), *jax.tree.leaves(self.val)):
            found.update(leaf.tobytes())
        return found.hexdigest()[:16]


class Job(NamedTuple):
    """What a run is given, besides the model."""

    c: ConfigDict  # armed
    folder: Path
    vector: SteeringVector
    corpus: Corpus
    meta: dict[str, Any]


class Run:
    """A run but for its state, which is on the devices."""

    def __init__(
        self,
        job: Job,
        train: FrozenConfigDict,
        task: steps.Task,
        log: Log,
        saved: checkpoint.Checkpoints,
        done: Progress,
        mesh: Mesh | None,
    ):
        self.c, self.corpus, self.meta = job.c, job.corpus, job.meta
        self.train, self.task, self.log, self.saved, self.mesh = train, task, log, saved, mesh
        self.best, self.waited = done.best, done.waited
        self.saved_at, self.tracing = time.monotonic(), False
        self.flops, self.chip = 0.0, hardware.chip_of(jax.devices()[0].device_kind)

    @property
    def enough(self) -> bool:
        """Whether patience is over."""
        return bool(self.train.patience) and self.waited >= self.train.patience

    def finish(self, at: int) -> None:
        """A run is finished when its last checkpoint is on disk."""
        self.saved.wait()
        checkpoint.mark_finished(self.saved.workdir, {"steps": at, "best": self.best})

    def save_due(self, at: int, logged: bool) -> bool:
        """Whether to save between evaluations."""
        if every(at, self.train.save_every):
            return True
        if not (self.train.save_minutes and logged):  # asking the others costs a broadcast
            return False
        due = time.monotonic() - self.saved_at > 60 * self.train.save_minutes
        return distributed.agree(due)

    def put(self, batch: Batch) -> Batch:
        """Rows to the devices."""
        return meshes.put_batch(batch, self.mesh)

    def batch(self, step: int) -> Batch:
        """A step's rows."""
        rows = choose_rows(len(self.corpus.train.tokens_BxT), self.train.batch, self.c.seed, step)
        behavior = jax.tree.map(lambda a: a[rows], self.corpus.train)
        keep = None
        if self.corpus.keep is not None:
            kept = choose_rows(
                len(self.corpus.keep.tokens_BxT), self.train.retain_batch, self.c.seed, step
            )
            keep = jax.tree.map(lambda a: a[kept], self.corpus.keep)
        return Batch(behavior, keep)

    def judge(self, at: int, found: list[Any]) -> float:
        """The validation loss of what `evaluate` gave for each of `val_batches`; logs it."""
        total_3, count_3, cosine_N = (np.sum(part, axis=0) for part in zip(*found, strict=True))
        mean_3 = total_3 / np.maximum(count_3, 1e-6)
        loss = float(np.sum(meshes.fetch(self.task.weight_3) * mean_3))
        values = {f"val/{k}_loss": float(v) for k, v in zip(steps.LOSSES, mean_3, strict=True)}
        cosine = cosine_N[slice(*self.c.loss.layers)].mean() / max(count_3[1], 1)
        values |= {"val/loss": loss, "val/cosine": float(cosine)}
        self.log.write(at, values)
        self._check_finite("validation", at, values)
        improved = self.best is None or loss < self.best
        self.waited = 0 if improved else self.waited + 1
        self.best = loss if improved else self.best
        return loss

    def save(self, state: steps.State, val_loss: float | None = None) -> None:
        """A checkpoint."""
        now = Progress(val_loss, self.best, self.waited, self.log.spent())
        self.saved.save(state, self.meta, now)
        self.saved_at = time.monotonic()

    def val_batches(self) -> Iterator[Batch]:
        """Whole batches; rows beyond the last whole one are padded with weightless copies."""
        val, B, R = self.corpus.val, self.train.batch, self.train.retain_batch
        n, keep = len(val.tokens_BxT), self.corpus.keep_val
        for start in range(0, n, B):
            rows = np.arange(start, start + B)
            behavior = jax.tree.map(lambda a, r=rows: a[r % n], val)
            real_B = rows < n
            behavior = behavior.replace(
                weight_BxLxC=behavior.weight_BxLxC * real_B[:, None, None],
                cosine_BxT=behavior.cosine_BxT * real_B[:, None],
            )
            kept = None
            if keep is not None:
                at = np.arange(start // B * R, start // B * R + R)
                kept = jax.tree.map(lambda a, r=at: a[r % len(keep.tokens_BxT)], keep)
            yield Batch(behavior, kept)

    def write(
        self, step: int, metrics: dict[str, np.ndarray], measured: bool, log: bool
    ) -> dict[str, float]:
        """Checks every step, logs those that are due; the numbers by name."""
        values = _flatten(metrics, self.c.loss.layers, measured)
        if log:
            keep, T = self.corpus.keep, self.corpus.train.tokens_BxT.shape[1]
            rows = self.train.batch + (self.train.retain_batch if keep is not None else 0)
            rates = self.log.rates(step, examples=self.train.batch, tokens=rows * T)
            if rates and self.chip:  # model FLOPs: what remat computes again does not count
                peak = self.chip.tflops * 1e12 * jax.device_count()
                rates["mfu"] = self.flops * rates["examples_per_s"] / self.train.batch / peak
            values |= rates
            self.log.write(step, values)
        self._check_finite("training", step, values)
        return values

    def _check_finite(self, phase: str, step: int, values: dict[str, float]) -> None:
        bad = [f"{k} is {v}" for k, v in values.items() if not math.isfinite(v)]
        if bad:
            self.saved.wait()
            raise ValueError(
                f"{self.saved.workdir.name}: {phase}, step {step}: {', '.join(bad)}, expected "
                f"finite numbers. The last good checkpoint is of step {self.saved.latest()}. Lower "
                "train.lr or train.clip, in another --workdir."
            )

    def profile(self, step: int) -> None:
        """Traces steps [first, stop) of `train.profile` for TensorBoard's profiler or Perfetto."""
        first, stop = self.train.profile
        due = first <= step < stop
        if due and not self.tracing:
            jax.profiler.start_trace(str(self.saved.workdir / "profile"))
        if self.tracing and not due:
            jax.profiler.stop_trace()
        self.tracing = due


def every(i: int, n: int) -> bool:
    """Whether i is a multiple of n; 0 is never."""
    return n > 0 and i % n == 0


def _flatten(
    metrics: dict[str, np.ndarray], layers: tuple[int, int], measured: bool
) -> dict[str, float]:
    """Scalars under the names that TensorBoard and metrics.jsonl share."""
    cosine_N = metrics["cosine_N"]
    out = {k: float(metrics[k]) for k in ("loss", "grad_norm", "lr")}
    out |= {f"{k}_loss": float(v) for k, v in zip(steps.LOSSES, metrics["mean_3"], strict=True)}
    out["cosine/mean"] = float(cosine_N[slice(*layers)].mean())
    out |= {f"cosine/layer_{n:02d}": float(v) for n, v in enumerate(cosine_N)}
    if measured:
        norms = zip(steps.LOSSES, metrics["norm_3"], strict=True)
        out |= {f"grad_norm/{k}": float(v) for k, v in norms}
        out["grad_norm/conflict"] = float(metrics["conflict"])
    return out
