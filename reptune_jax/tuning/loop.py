"""The training loop: one arm, one sign, one seed, from step 0 or from where it stopped."""

import contextlib
import dataclasses
import functools
import hashlib
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from reptune_jax import distributed, program
from reptune_jax import mesh as meshes
from reptune_jax.data.batches import Batch, Keep, Rows, choose_of_each, choose_rows
from reptune_jax.lm import Model
from reptune_jax.model import attention
from reptune_jax.model.transformer import Decoder
from reptune_jax.tuning import adapters, ahead, checkpoint, cost, hardware, partition, untuned
from reptune_jax.tuning import step as steps
from reptune_jax.tuning.checkpoint import Progress
from reptune_jax.tuning.log import Log
from reptune_jax.tuning.task import Vectors, make_task, needs_anchors
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


def tune(
    c: ConfigDict,
    folder: Path,
    model: Model,
    vector: SteeringVector,
    corpus: Corpus,
    meta: dict,
    others: Vectors | None = None,
) -> None:
    """Trains into `folder`; resumes from its newest checkpoint; returns at once when it is done."""
    train = FrozenConfigDict(c.train)
    trained, frozen = adapters.begin(model.arch, model.params, train, c.seed)
    cuts, mesh = partition.segments(model.arch.N, train.layers), model.mesh
    kernel = model.kernel("right") if train.flash else attention.XLA
    rows = meshes.rows_of(mesh)
    decoder = Decoder(model.arch, cuts, model.dtype, train.remat, kernel, rows)
    task = make_task(c, vector, frozen, others)
    corpus = precomputed(c, model, decoder, task, corpus)
    if mesh is not None:  # what is not laid out yet; the frozen weights are
        small = meshes.replicate(dataclasses.replace(task, frozen={}), mesh)
        task = dataclasses.replace(small, frozen=frozen)
    state = steps.init_state(trained, train, mesh)
    with contextlib.closing(checkpoint.Checkpoints(folder, train.keep)) as saved:
        state, done = saved.restore(state, meta) or (state, Progress())
        since, writes = saved.latest(), distributed.is_first()
        with Log(folder, train.steps, since, writes, done.seconds) as log:
            loop = _Loop(c, train, decoder, task, corpus, mesh, log, saved, meta)
            loop.run(state, done)


def precomputed(
    c: ConfigDict, model: Model, decoder: Decoder, task: steps.Task, corpus: Corpus
) -> Corpus:
    """With what the untuned model computes at these rows, where steps use it."""
    B = c.eval.batch
    if needs_anchors(c):
        anchor = functools.partial(untuned.add_cosines, model=model, probe=task.probe, batch=B)
        corpus = corpus._replace(train=anchor(corpus.train), val=anchor(corpus.val))
    gib = untuned.below_gib(model, c.train.layers[0], corpus[:4])
    if not 0 < gib <= c.train.cache_gib:
        return corpus
    began = time.monotonic()
    sides = {
        name: untuned.add_below(side, model, decoder, task.frozen, task.probe, B)
        for name, side in zip(corpus._fields[:4], corpus[:4], strict=True)
        if side is not None
    }
    program.say(
        f"layers below {c.train.layers[0]}: computed once for all rows, {gib:.2f} GiB, "
        f"in {time.monotonic() - began:.1f} s"
    )
    return corpus._replace(**sides)


class _Loop:
    """The pieces of a run, so that the loop below reads as one screen."""

    def __init__(self, c, train, decoder, task, corpus, mesh, log, saved, meta):
        self.c, self.train, self.decoder, self.task = c, train, decoder, task
        self.corpus, self.mesh, self.log, self.saved, self.meta = corpus, mesh, log, saved, meta
        self.step = steps.make_step(decoder, train, mesh)
        self.evaluate = steps.make_evaluate(decoder)
        self.saved_at, self.tracing = time.monotonic(), False

    def run(self, state: steps.State, done: Progress) -> None:
        self.best, self.waited = done.best, done.waited
        first, pending = int(state.step), None
        if self.saved.latest() is None:
            found = self._validate(state)  # the untuned model: what every later step must beat
            self.log.settings(self.saved.workdir.name, self.c.to_dict(), found)
        step = self._compile(state, self._batch(first))
        self.log.begin()
        for i in range(first, self.train.steps):
            if self.train.patience and self.waited >= self.train.patience:
                break
            self._profile(i)
            last = i + 1 == self.train.steps
            measure = last or _every(i, self.train.measure_every)
            state, metrics = step(state, self.task, self._batch(i), self._put(measure))
            if pending:  # one step late: the device is already busy with the next one
                self._write(*pending)
            log = measure or last or _every(i, self.train.log_every)
            pending = (i + 1, metrics, measure, log)
            stop = distributed.stop_asked()
            validate = last or _every(i + 1, self.train.eval_every)
            if validate or stop or self._save_due(i + 1, log):
                self._write(*pending)  # what a checkpoint follows is checked, and in the log
                pending = None
                with self.log.aside():
                    self._validate(state) if validate else self._save(state)
            if stop:
                self._stop(i + 1)
        self._profile(self.train.steps)
        self.saved.wait()  # a run is finished when its last checkpoint is on disk
        self.log.finished()
        about = {"steps": int(state.step), "best": self.best}
        checkpoint.mark_finished(self.saved.workdir, about)

    def _stop(self, step: int) -> None:
        self._profile(self.train.steps)
        self.saved.wait()
        raise program.Stopped(
            f"stopped by SIGTERM: step {step} of {self.train.steps} is saved. "
            "The same command goes on from there."
        )

    def _save_due(self, step: int, logged: bool) -> bool:
        if _every(step, self.train.save_every):
            return True
        if not (self.train.save_minutes and logged):  # asking the others costs a broadcast
            return False
        due = time.monotonic() - self.saved_at > 60 * self.train.save_minutes
        return distributed.agree(due)

    def _put(self, flag: bool) -> jax.Array:
        return meshes.replicate(np.asarray(flag), self.mesh)

    def _compile(self, state: steps.State, batch: Batch) -> Any:
        arch, layers = self.decoder.arch, tuple(self.train.layers)
        self.flops = cost.batch_flops(arch, layers, state.trained, batch)["total"]
        self.peak = hardware.peak_of(jax.devices()[0].device_kind, self.train.peak_tflops)
        args = state, self.task, batch, self._put(True)
        return ahead.compile_step(self.step, args, arch, self.train, self.mesh)

    def _batch(self, step: int) -> Batch:
        rows = choose_of_each(self.corpus.sizes, self.corpus.batches, self.c.seed, step)
        behavior = jax.tree.map(lambda a: a[rows], self.corpus.train)
        keep = None
        if self.corpus.keep is not None:
            kept = choose_rows(
                len(self.corpus.keep.tokens_BxT), self.train.retain_batch, self.c.seed, step
            )
            keep = jax.tree.map(lambda a: a[kept], self.corpus.keep)
        return meshes.put_batch(Batch(behavior, keep), self.mesh)

    def _validate(self, state: steps.State) -> dict[str, float]:
        """Validation losses over all rows; saves a checkpoint under their weighted sum."""
        parts = [
            meshes.fetch(self.evaluate(state.trained, self.task, batch))
            for batch in self._val_batches()
        ]
        whole, cosine_KxN, spread = jax.tree.map(
            lambda *each: np.sum(each, axis=0, dtype=np.float64), *parts
        )
        mean_J = whole.total / np.maximum(whole.n, 1e-6)
        # By the weights that are not annealed: else the checkpoints of a run would not compare.
        loss = float(np.sum(meshes.fetch(self.task.weight_J) * mean_J))
        values = {f"val/{k}_loss": v for k, v in self._by_loss(mean_J).items()}
        cosine = cosine_KxN[0, slice(*self.c.loss.layers)].mean() / max(whole.n[1], 1)
        was = math.inf if self.best is None else self.best
        improved, best = loss < was, min(loss, was)
        values |= {"val/loss": loss, "val/best": best, "val/cosine": float(cosine)}
        self.log.write(int(state.step), values)
        self._check_finite("validation", int(state.step), values)
        self.log.cosines(int(state.step), spread, self._shown())
        self.waited, self.best = 0 if improved else self.waited + 1, best
        self._save(state, loss)
        return values

    def _shown(self) -> list[int]:
        """Layers that are trained or whose cosine counts: those with a histogram."""
        return sorted({*range(*self.train.layers), *range(*self.c.loss.layers)})

    def _save(self, state: steps.State, val_loss: float | None = None) -> None:
        now = Progress(val_loss, self.best, self.waited, self.log.spent())
        self.saved.save(state, self.meta, now)
        self.saved_at = time.monotonic()

    def _val_batches(self):
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
            yield meshes.put_batch(Batch(behavior, kept), self.mesh)

    def _write(self, step: int, metrics: dict[str, jax.Array], measured: bool, log: bool) -> None:
        """Checks every step, logs those that are due."""
        values = self._flatten(meshes.fetch(metrics), measured)
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
            self.log.progress(step, values)
        self._check_finite("training", step, values)

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
                f"{phase}, step {step}: {', '.join(bad)}, expected finite numbers. The last good "
                f"checkpoint is of step {self.saved.latest()}. Lower train.lr or train.clip, in "
                "another --workdir."
            )

    def _profile(self, step: int) -> None:
        """Traces steps [first, stop) of `train.profile` for TensorBoard's profiler or Perfetto."""
        first, stop = self.train.profile
        due = first <= step < stop
        if due and not self.tracing:
            jax.profiler.start_trace(str(self.saved.workdir / "profile"))
        if self.tracing and not due:
            jax.profiler.stop_trace()
        self.tracing = due


def _every(i: int, n: int) -> bool:
    return n > 0 and i % n == 0
