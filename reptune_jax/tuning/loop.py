"""The training loop: one arm, one sign, one seed, from step 0 or from where it stopped.

`drive` is the loop itself. What it drives is one run, `_Alone`, or a whole `fleet`.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from reptune_jax import distributed, program
from reptune_jax import mesh as meshes
from reptune_jax.lm import Model
from reptune_jax.model import attention
from reptune_jax.model.transformer import Decoder
from reptune_jax.tuning import adapters, ahead, checkpoint, partition, untuned
from reptune_jax.tuning import step as steps
from reptune_jax.tuning.checkpoint import Progress
from reptune_jax.tuning.log import Log
from reptune_jax.tuning.run import Job, Run, every
from reptune_jax.tuning.task import make_task, needs_anchors


def tune(job: Job, model: Model) -> None:
    """Trains into the job's folder; resumes from its newest checkpoint."""
    decoder = make_decoder(job, model)
    job, task, state = start(job, model, decoder)
    with opened(job, decoder, task, state, model.mesh) as (run, state):
        alone = _Alone(run, decoder, state)
        alone.begin()
        drive(alone, run.train, alone.at)
        run.finish(alone.at)


def make_decoder(job: Job, model: Model) -> Decoder:
    """The model cut below and above the trained layers."""
    train = job.c.train
    cuts = partition.segments(model.arch.N, train.layers)
    kernel = model.kernel("right") if train.flash else attention.XLA
    rows = meshes.rows_of(model.mesh)
    return Decoder(model.arch, cuts, model.dtype, train.remat, kernel, rows)


def start(
    job: Job, model: Model, decoder: Decoder, frozen: dict[str, Any] | None = None
) -> tuple[Job, steps.Task, steps.State]:
    """(the job with all that is computed once for its rows, its task, its state at step 0).

    `frozen`: as another run with adapters has it, to share one copy.
    """
    c, mesh = job.c, model.mesh
    trained, frozen = adapters.begin(model.arch, model.params, c.train, c.seed, frozen)
    task = make_task(c, job.vector, frozen, job.others)
    job = precomputed(job, model, decoder, task)
    if mesh is not None:  # what is not laid out yet; the frozen weights are
        small = meshes.replicate(dataclasses.replace(task, frozen={}), mesh)
        task = dataclasses.replace(small, frozen=frozen)
    return job, task, steps.init_state(trained, FrozenConfigDict(c.train), mesh)


def precomputed(job: Job, model: Model, decoder: Decoder, task: steps.Task) -> Job:
    """With what the untuned model computes at the job's rows, where steps use it."""
    c, corpus, B = job.c, job.corpus, job.c.eval.batch
    if needs_anchors(c):
        anchor = functools.partial(untuned.add_cosines, model=model, probe=task.probe, batch=B)
        corpus = corpus._replace(train=anchor(corpus.train), val=anchor(corpus.val))
    gib = untuned.below_gib(model, c.train.layers[0], corpus[:4])
    if not 0 < gib <= c.train.cache_gib:
        return job._replace(corpus=corpus)
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
    return job._replace(corpus=corpus._replace(**sides))


@contextlib.contextmanager
def opened(
    job: Job, decoder: Decoder, task: steps.Task, state: steps.State, mesh: Mesh | None
) -> Iterator[tuple[Run, steps.State]]:
    """The run with its folder open, and its state there: the newest checkpoint's, or this one."""
    train = FrozenConfigDict(job.c.train)
    with contextlib.closing(checkpoint.Checkpoints(job.folder, train.keep)) as saved:
        state, done = saved.restore(state, job.meta) or (state, Progress())
        since, writes = saved.latest(), distributed.is_first()
        with Log(job.folder, train.steps, since, writes, done.seconds) as log:
            yield Run(job, train, task, log, saved, done, mesh), state


class Driven(Protocol):
    """What `drive` trains. `at` counts the steps that are done."""

    def going(self) -> bool:
        """Whether anything is left to train."""

    def step(self, i: int, measure: bool) -> Any:
        """Takes step i; returns its metrics without waiting for them."""

    def report(self, at: int, metrics: Any, measured: bool, log: bool) -> None:
        """Checks a step's metrics, and logs them if that is due."""

    def validate(self, at: int) -> None:
        """Measures on validation rows and saves."""

    def save(self, at: int) -> None:
        """Saves without measuring."""

    def save_due(self, at: int, logged: bool) -> bool:
        """Whether to save between evaluations."""

    def profile(self, i: int) -> None:
        """Traces steps that are to be traced."""

    def wait(self) -> None:
        """Returns when all that was saved is on disk."""


def drive(it: Driven, train: FrozenConfigDict, first: int) -> None:
    """From step `first` to the last.

    Raises:
      program.Stopped: at a SIGTERM, when the step it came in is saved.
    """
    pending = None
    for i in range(first, train.steps):
        if not it.going():
            break
        it.profile(i)
        last = i + 1 == train.steps
        measure = last or every(i, train.measure_every)
        metrics = it.step(i, measure)
        if pending:  # one step late: the device is already busy with the next one
            it.report(*pending)
        log = measure or last or every(i, train.log_every)
        pending = (i + 1, metrics, measure, log)
        stop = distributed.stop_asked()
        validate = last or every(i + 1, train.eval_every)
        if validate or stop or it.save_due(i + 1, log):
            it.report(*pending)  # what a checkpoint follows is checked, and in the log
            pending = None
            it.validate(i + 1) if validate else it.save(i + 1)
        if stop:
            it.profile(train.steps)
            it.wait()
            raise program.Stopped(
                f"stopped by SIGTERM: step {i + 1} of {train.steps} is saved. "
                "The same command goes on from there."
            )
    it.profile(train.steps)


class _Alone:
    """One run in a program of its own."""

    def __init__(self, run: Run, decoder: Decoder, state: steps.State):
        self.run, self.decoder, self.state, self.at = run, decoder, state, int(state.step)
        self.evaluate = steps.make_evaluate(decoder)

    def begin(self) -> None:
        """Measures the untuned model; compiles, so that what does not fit is known at once."""
        run = self.run
        if run.saved.latest() is None:
            found = self._validate()  # what every later step must beat
            run.log.settings(run.saved.workdir.name, run.c.to_dict(), found)
        batch, arch = run.put(run.batch(self.at)), self.decoder.arch
        run.count_flops(arch, self.state.trained, batch)
        step = steps.make_step(self.decoder, run.train, run.mesh)
        args = self.state, run.task, batch, self._put(True)
        self.compiled = ahead.compile_step(step, args, arch, run.train, run.mesh)
        run.log.begin()

    def going(self) -> bool:
        return not self.run.enough

    def step(self, i: int, measure: bool) -> dict[str, jax.Array]:
        batch = self.run.put(self.run.batch(i))
        self.state, metrics = self.compiled(self.state, self.run.task, batch, self._put(measure))
        self.at = i + 1
        return metrics

    def report(self, at: int, metrics: dict[str, jax.Array], measured: bool, log: bool) -> None:
        values = self.run.write(at, meshes.fetch(metrics), measured, log)
        if log:
            self.run.log.progress(at, values)

    def validate(self, at: int) -> None:
        with self.run.log.aside():
            self._validate()

    def save(self, at: int) -> None:
        with self.run.log.aside():
            self.run.save(self.state)

    def save_due(self, at: int, logged: bool) -> bool:
        return self.run.save_due(at, logged)

    def profile(self, i: int) -> None:
        self.run.profile(i)

    def wait(self) -> None:
        self.run.saved.wait()

    def _put(self, flag: bool) -> jax.Array:
        return meshes.replicate(np.asarray(flag), self.run.mesh)

    def _validate(self) -> dict[str, float]:
        run = self.run
        found = [
            meshes.fetch(self.evaluate(self.state.trained, run.task, run.put(batch)))
            for batch in run.val_batches()
        ]
        values = run.judge(self.at, found)
        run.save(self.state, values["val/loss"])
        return values
