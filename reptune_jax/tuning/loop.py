"""The training loop: one arm, one sign, one seed, from step 0 or from where it stopped.

`drive` is the loop itself. What it drives is one run, `_Alone`, or a whole `fleet`.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

from reptune_jax import distributed, program
from reptune_jax import mesh as meshes
from reptune_jax.lm import Model
from reptune_jax.model import attention
from reptune_jax.model.transformer import Decoder
from reptune_jax.tuning import adapters, checkpoint, cost, partition
from reptune_jax.tuning import step as steps
from reptune_jax.tuning.checkpoint import Progress
from reptune_jax.tuning.log import Log
from reptune_jax.tuning.losses import CosineLoss
from reptune_jax.tuning.run import Job, Run, every
from reptune_jax.vectors.steering_vector import SteeringVector


def make_task(c: ConfigDict, vector: SteeringVector, frozen: dict[str, Any]) -> steps.Task:
    """The armed config as data: directions, cosine loss, weights."""
    first, stop = c.loss.layers
    N = len(vector.directions_NxD)
    if not 0 <= first < stop <= N:
        raise ValueError(f"loss.layers: got ({first}, {stop}), expected 0 <= first < stop <= {N}.")
    layer_N = np.zeros(N, np.float32)
    layer_N[first:stop] = 1
    into = float(c.loss.mode == "in")
    cosine = CosineLoss(
        jnp.float32(c.sign), jnp.float32(into), jnp.float32(1 - into), jnp.asarray(layer_N)
    )
    weight_3 = jnp.array([c.loss.token, c.loss.cosine, c.loss.retain], jnp.float32)
    scale = jnp.float32(adapters.scale(c.train.lora))
    return steps.Task(frozen, vector.probe(c.loss.center), cosine, weight_3, scale)


def tune(job: Job, model: Model) -> None:
    """Trains into the job's folder; resumes from its newest checkpoint."""
    decoder = make_decoder(job, model)
    task, state = start(job, model)
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
    job: Job, model: Model, frozen: dict[str, Any] | None = None
) -> tuple[steps.Task, steps.State]:
    """(task, state at step 0). `frozen`: as another run with adapters has it, to share one copy."""
    c, mesh = job.c, model.mesh
    trained, frozen = adapters.begin(model.arch, model.params, c.train, c.seed, frozen)
    task = make_task(c, job.vector, frozen)
    if mesh is not None:  # what is not laid out yet; the frozen weights are
        small = meshes.replicate(dataclasses.replace(task, frozen={}), mesh)
        task = dataclasses.replace(small, frozen=frozen)
    return task, steps.init_state(trained, FrozenConfigDict(c.train), mesh)


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
        """Compiles before step 0, so that a step that does not fit is known in the first minute."""
        run = self.run
        if run.saved.latest() is None:
            self.validate(0)  # the untuned model: what every later step must beat
        batch, began = run.put(run.batch(self.at)), time.monotonic()
        step = steps.make_step(self.decoder, run.train, run.mesh)
        self.compiled = step.lower(self.state, run.task, batch, self._put(True)).compile()
        seconds = time.monotonic() - began
        arch, trained = self.decoder.arch, self.state.trained
        run.flops = cost.batch_flops(arch, tuple(run.train.layers), trained, batch)["total"]
        program.say(f"{cost.describe(arch, run.train, trained, batch)}")
        program.say(f"compiled in {seconds:.1f} s; {cost.memory(self.compiled)}")
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
        run = self.run
        found = [
            meshes.fetch(self.evaluate(self.state.trained, run.task, run.put(batch)))
            for batch in run.val_batches()
        ]
        run.save(self.state, run.judge(at, found))

    def save(self, at: int) -> None:
        self.run.save(self.state)

    def save_due(self, at: int, logged: bool) -> bool:
        return self.run.save_due(at, logged)

    def profile(self, i: int) -> None:
        self.run.profile(i)

    def wait(self) -> None:
        self.run.saved.wait()

    def _put(self, flag: bool) -> jax.Array:
        return meshes.replicate(np.asarray(flag), self.run.mesh)
