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
from reptune_jax.data.batches import Batch, Keep, Rows, choose_of_each, choose_rows
from reptune_jax.model.arch import Arch
from reptune_jax.tuning import checkpoint, cost, hardware
from reptune_jax.tuning import step as steps
from reptune_jax.tuning.checkpoint import Progress
from reptune_jax.tuning.log import Log
from reptune_jax.tuning.partition import Flat
from reptune_jax.tuning.task import Vectors
from reptune_jax.vectors.steering_vector import SteeringVector


class Corpus(NamedTuple):
    """All rows of a run: training, validation, retention for each.

    Training rows of the run's behaviors lie one after another, `sizes` of each; a step takes
    `batches` of each.
    """

    train: Rows
    val: Rows
    keep: Keep | None
    keep_val: Keep | None
    sizes: tuple[int, ...]
    batches: tuple[int, ...]

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
    others: Vectors | None = None  # of its further behaviors


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
        self.flops = 0.0  # of a step
        self.peak = hardware.peak_of(jax.devices()[0].device_kind, train.peak_tflops)

    @property
    def enough(self) -> bool:
        """Whether patience is over."""
        return bool(self.train.patience) and self.waited >= self.train.patience

    def finish(self, at: int) -> None:
        """A run is finished when its last checkpoint is on disk."""
        self.saved.wait()
        self.log.finished()
        checkpoint.mark_finished(self.saved.workdir, {"steps": at, "best": self.best})

    def count_flops(self, arch: Arch, trained: Flat, batch: Batch) -> None:
        """For the MFU."""
        self.flops = cost.batch_flops(arch, tuple(self.train.layers), trained, batch)["total"]

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
        rows = choose_of_each(self.corpus.sizes, self.corpus.batches, self.c.seed, step)
        behavior = jax.tree.map(lambda a: a[rows], self.corpus.train)
        keep = None
        if self.corpus.keep is not None:
            kept = choose_rows(
                len(self.corpus.keep.tokens_BxT), self.train.retain_batch, self.c.seed, step
            )
            keep = jax.tree.map(lambda a: a[kept], self.corpus.keep)
        return Batch(behavior, keep)

    def judge(self, at: int, found: list[Any]) -> dict[str, float]:
        """The numbers of what `evaluate` gave for each of `val_batches`; logs them."""
        whole, cosine_KxN, spread = jax.tree.map(
            lambda *each: np.sum(each, axis=0, dtype=np.float64), *found
        )
        mean_J = whole.total / np.maximum(whole.n, 1e-6)
        # By the weights that are not annealed: else the checkpoints of a run would not compare.
        loss = float(np.sum(meshes.fetch(self.task.weight_J) * mean_J))
        values = {f"val/{k}_loss": v for k, v in self._by_loss(mean_J).items()}
        cosine = cosine_KxN[0, slice(*self.c.loss.layers)].mean() / max(whole.n[1], 1)
        was = math.inf if self.best is None else self.best
        improved, best = loss < was, min(loss, was)
        values |= {"val/loss": loss, "val/best": best, "val/cosine": float(cosine)}
        self.log.write(at, values)
        self._check_finite("validation", at, values)
        self.log.cosines(at, spread, self._shown())
        self.waited, self.best = 0 if improved else self.waited + 1, best
        return values

    def _shown(self) -> list[int]:
        """Layers that are trained or whose cosine counts: those with a histogram."""
        return sorted({*range(*self.train.layers), *range(*self.c.loss.layers)})

    def save(self, state: steps.State, val_loss: float | None = None) -> None:
        """A checkpoint."""
        now = Progress(val_loss, self.best, self.waited, self.log.spent())
        self.saved.save(state, self.meta, now)
        self.saved_at = time.monotonic()

    def val_batches(self) -> Iterator[Batch]:
        """Whole batches; rows beyond the last whole one are padded with weightless copies."""
        val, B, R = self.corpus.val, sum(self.corpus.batches), self.train.retain_batch
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
        values = self._flatten(metrics, measured)
        if log:
            keep, T = self.corpus.keep, self.corpus.train.tokens_BxT.shape[1]
            examples = sum(self.corpus.batches)
            rows = examples + (self.train.retain_batch if keep is not None else 0)
            rates = self.log.rates(step, examples=examples, tokens=rows * T)
            if rates and self.peak:  # model FLOPs: what remat computes again does not count
                per_s = self.flops * rates["examples_per_s"] / examples
                rates["mfu"] = per_s / (self.peak * 1e12 * jax.device_count())
            values |= rates
            self.log.write(step, values)
        self._check_finite("training", step, values)
        return values

    def _by_loss(self, value_J: np.ndarray) -> dict[str, float]:
        """By name: the first three, so that arms compare, and what else has a weight."""
        names = steps.loss_names(self.c.loss.also)
        shown = names[:3] + tuple(
            name for name, w in zip(names[3:], self.task.weight_J[3:], strict=True) if w
        )
        return {name: float(v) for name, v in zip(names, value_J, strict=True) if name in shown}

    def _flatten(self, metrics: dict[str, np.ndarray], measured: bool) -> dict[str, float]:
        """Scalars under the names that TensorBoard and metrics.jsonl share."""
        cosine_KxN = metrics["cosine_KxN"]
        out = {k: float(metrics[k]) for k in ("loss", "grad_norm", "lr")}
        out |= {f"{k}_loss": v for k, v in self._by_loss(metrics["mean_J"]).items()}
        out["cosine/mean"] = float(cosine_KxN[0, slice(*self.c.loss.layers)].mean())
        out |= {f"cosine/layer_{n:02d}": float(v) for n, v in enumerate(cosine_KxN[0])}
        for (name, one), cosine_N in zip(self.c.loss.also.items(), cosine_KxN[1:], strict=True):
            out[f"{name}/cosine"] = float(cosine_N[slice(*one.layers)].mean())
        if measured:
            out |= {f"grad_norm/{k}": v for k, v in self._by_loss(metrics["norm_J"]).items()}
            out["grad_norm/conflict"] = float(metrics["conflict"])
        return out

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
