"""A run but for its steps: its batches, what its numbers say, its log and its checkpoints."""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from reptune_jax import distributed, folder
from reptune_jax import mesh as meshes
from reptune_jax.console import say
from reptune_jax.cost import hardware
from reptune_jax.data import behavior as behaviors
from reptune_jax.data.batches import Batch
from reptune_jax.tuned_run import Progress
from reptune_jax.tuning import step as steps
from reptune_jax.tuning.checkpoint import Checkpoints
from reptune_jax.tuning.corpus import Corpus
from reptune_jax.tuning.objective import Objective, loss_names
from reptune_jax.vectors.steering_vector import SteeringVector
from reptune_jax.watch.log import Log
from reptune_jax.watch.log import read as logged

_ONE_VERDICT = 0.01  # nats


class Job(NamedTuple):
    """What a run is given, besides the model."""

    c: ConfigDict  # armed
    folder: Path
    vector: SteeringVector
    corpus: Corpus
    meta: dict[str, Any]
    also: Mapping[str, SteeringVector] = {}  # of its further behaviors


class Run:
    """The host's side of a run; its state is on the devices."""

    def __init__(
        self,
        job: Job,
        corpus: Corpus,
        objective: Objective,
        evaluate: Callable[..., Any],
        log: Log,
        saved: Checkpoints,
        done: Progress,
        mesh: Mesh | None,
    ):
        self.c, self.meta, self.train = job.c, job.meta, job.c.train
        self.folder = folder.Run(job.folder)
        self.corpus, self.objective, self.evaluate = corpus, objective, evaluate
        self.log, self.saved, self.mesh = log, saved, mesh
        self.best, self.waited = done.best, done.waited
        self.claims = behaviors.load(job.c.behavior).kind == "claim"
        self.saved_at, self.tracing = time.monotonic(), False
        # A CPU has done a step when it was asked for it: to report it late is to time two.
        self.late = jax.default_backend() != "cpu"
        self.flops = 0.0  # of a step, for the MFU
        self.peak = hardware.peak_of(jax.devices()[0].device_kind, self.train.peak_tflops)

    @property
    def enough(self) -> bool:
        """Whether patience is over."""
        return bool(self.train.patience) and self.waited >= self.train.patience

    def batch(self, step: int) -> Batch:
        """A step's examples, on the devices."""
        batch = self.corpus.batch(self.c.seed, step, self.train.retain_batch)
        return meshes.put_batch(batch, self.mesh)

    def put(self, flag: bool) -> jax.Array:
        return meshes.replicate(np.asarray(flag), self.mesh)

    def report(
        self,
        step: int,
        metrics: dict[str, jax.Array],
        measured: bool,
        log: bool,
        timed: bool = True,
    ) -> None:
        """Checks a step's numbers, and logs them if that is due; how fast it was if `timed`."""
        values = self._flatten(meshes.fetch(metrics), measured)
        if log:
            examples, tokens = self.corpus.step_size(self.train.retain_batch)
            rates = self.log.rates(step, examples, tokens)
            rates = rates if timed else {}
            if rates and self.peak:  # model FLOPs: what remat computes again does not count
                per_s = self.flops * rates["examples_per_s"] / examples
                rates["mfu"] = per_s / (self.peak * 1e12 * jax.device_count())
            values |= rates
            self.log.write(step, values)
        self._check_finite("training", step, values)
        if log:
            self.log.progress(step, values)

    def validate(self, state: steps.State) -> dict[str, float]:
        """Measures all validation examples, logs and saves; the numbers by name."""
        with self.log.aside():
            found = [
                meshes.fetch(
                    self.evaluate(state.trained, self.objective, meshes.put_batch(batch, self.mesh))
                )
                for batch in self.corpus.val_batches(self.train.retain_batch)
            ]
            values = self._judge(int(state.step), found)
            self._save(state, values["val/loss"])
        return values

    def save(self, state: steps.State) -> None:
        """A checkpoint between evaluations."""
        with self.log.aside():
            self._save(state)

    def save_due(self, at: int, logged: bool) -> bool:
        """Whether to save between evaluations."""
        if every(at, self.train.save_every):
            return True
        if not (self.train.save_minutes and logged):  # asking the others costs a broadcast
            return False
        due = time.monotonic() - self.saved_at > 60 * self.train.save_minutes
        return distributed.agree(due)

    def profile(self, step: int) -> None:
        """Traces steps [first, stop) of `train.profile` for TensorBoard's profiler or Perfetto."""
        first, stop = self.train.profile
        due = first <= step < stop
        if due and not self.tracing:
            jax.profiler.start_trace(str(self.folder.profile))
        if self.tracing and not due:
            jax.profiler.stop_trace()
        self.tracing = due

    def finish(self, at: int) -> None:
        """A run is finished when its last checkpoint is on disk."""
        self.saved.wait()
        self.log.finished()
        self.folder.finish({"steps": at, "best": self.best})

    def _save(self, state: steps.State, val_loss: float | None = None) -> None:
        now = Progress(val_loss, self.best, self.waited, self.log.spent())
        self.saved.save(state, self.meta, now)
        self.saved_at = time.monotonic()

    def _judge(self, at: int, found: list[Any]) -> dict[str, float]:
        """The numbers of what `evaluate` gave for each batch; logs them."""
        whole, cosine_KxN, spread = jax.tree.map(
            lambda *each: np.sum(each, axis=0, dtype=np.float64), *found
        )
        mean_J = whole.total / np.maximum(whole.n, 1e-6)
        # By the weights that are not annealed: else the checkpoints of a run would not compare.
        loss = float(np.sum(meshes.fetch(self.objective.weight_J) * mean_J))
        values = {f"val/{k}_loss": v for k, v in self._by_loss(mean_J).items()}
        cosine = cosine_KxN[0, slice(*self.c.loss.layers)].mean() / max(whole.n[1], 1)
        was = math.inf if self.best is None else self.best
        improved, best = loss < was, min(loss, was)
        values |= {"val/loss": loss, "val/best": best, "val/cosine": float(cosine)}
        self.log.write(at, values)
        self._check_finite("validation", at, values)
        self._warn(at, values["val/token_loss"])
        with_histogram = {*range(*self.train.layers), *range(*self.c.loss.layers)}
        self.log.cosines(at, spread, sorted(with_histogram))
        self.waited, self.best = 0 if improved else self.waited + 1, best
        return values

    def _warn(self, at: int, token_loss: float) -> None:
        """Says while a run goes on that it unlearns: worse than untuned, or one verdict for all."""
        if at == 0 or not self.objective.weight_J[0] or self.c.loss.targets == "neutral":
            return
        first = next(logged(self.folder.metrics), {}) if self.folder.metrics.exists() else {}
        untuned = first.get("val/token_loss", math.inf)
        found = ""
        if self.claims and abs(token_loss - math.log(2)) < _ONE_VERDICT:
            found = "is that of one verdict for all claims (ln 2)"
        elif token_loss > untuned:
            found = "is worse than before training"
        if found:
            say(
                f"step {at}: validation {found}: token loss {token_loss:.3g}, untuned "
                f"{untuned:.3g}. Lower train.lr, or the cosine's weight, in another --workdir."
            )

    def _by_loss(self, value_J: np.ndarray) -> dict[str, float]:
        """By name: the first three, so that arms compare, and what else has a weight."""
        names = loss_names(self.c.loss.also)
        shown = names[:3] + tuple(
            name for name, w in zip(names[3:], self.objective.weight_J[3:], strict=True) if w
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
                f"{self.folder.path.name}: {phase}, step {step}: {', '.join(bad)}, expected finite "
                f"numbers. The last good checkpoint is of step {self.saved.latest()}. Lower "
                "train.lr or train.clip, in another --workdir."
            )


def every(i: int, n: int) -> bool:
    """Whether i is a multiple of n; 0 is never."""
    return n > 0 and i % n == 0
