"""Runs of one study in lockstep, in one program, over one copy of the frozen weights.

Runs that see the same rows, as the arms of one sign and seed do, form a group. Groups with as many
arms and rows of the same shapes form a fleet: states and tasks lie [G, A], groups and arms. Within
a group rows are not copied, so that all that does not depend on an adapter (the layers below the
tuned ones, the base's logits of retention) is computed once for its arms.

Each run keeps a folder of its own, as if it were trained alone. So a fleet resumes from the runs'
own checkpoints: where a kill left some a checkpoint further than others, those wait.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from reptune_jax import mesh as meshes
from reptune_jax import program
from reptune_jax.data.batches import Batch
from reptune_jax.lm import Model
from reptune_jax.model.transformer import Decoder
from reptune_jax.tuning import cost, hardware, loop
from reptune_jax.tuning import step as steps
from reptune_jax.tuning.run import Job, Run

Groups = tuple[tuple[Job, ...], ...]  # [G][A]
_OWN = ("base_BxNxT", "below_cosine_BxMxT")  # leaves of rows that depend on a run's vector


def tune(jobs: Sequence[Job], model: Model) -> None:
    """Trains LoRA runs that differ in arm, sign and seed, each into its own folder.

    Raises:
      ValueError: whole weights are to be trained, or the model lies on several devices.
    """
    if model.mesh is not None:
        raise ValueError(
            f"study.together: got a mesh of {model.mesh.size} devices, expected one device. "
            "Set --config.study.together=False, or leave this process one device."
        )
    fleets = arrange(jobs)
    for groups in fleets:
        names = ", ".join(job.folder.name for group in groups for job in group)
        program.say(f"together, {len(groups)} x {len(groups[0])} runs: {names}")
        _tune(groups, model)


def arrange(jobs: Iterable[Job]) -> list[Groups]:
    """Groups of jobs with the same rows in the same order; then fleets of groups of one shape."""
    groups: dict[Hashable, list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.corpus.digest(), job.c.seed), []).append(job)
    fleets: dict[Hashable, list[tuple[Job, ...]]] = {}
    for group in groups.values():
        fleets.setdefault((len(group), _shapes(group[0])), []).append(tuple(group))
    return [tuple(fleet) for fleet in fleets.values()]


def _shapes(job: Job) -> Hashable:
    """Of training rows, but for their number, and of validation rows."""
    corpus = job.corpus
    train = [a.shape[1:] for a in jax.tree.leaves((corpus.train, corpus.keep))]
    return (*train, *(a.shape for a in jax.tree.leaves((corpus.val, corpus.keep_val))))


def _tune(groups: Groups, model: Model) -> None:
    first = groups[0][0]
    decoder, frozen, runs, states = loop.make_decoder(first, model), None, [], []
    with contextlib.ExitStack() as stack:
        for job in (job for group in groups for job in group):
            job, task, state = loop.start(job, model, decoder, frozen)
            frozen = task.frozen
            run, state = stack.enter_context(loop.opened(job, decoder, task, state, None))
            runs.append(run)
            states.append(state)
        fleet = Fleet(runs, states, decoder, (len(groups), len(groups[0])))
        fleet.begin()
        loop.drive(fleet, runs[0].train, min(fleet.at))


class Fleet:
    """What `loop.drive` drives: runs, group by group, and their states stacked [G, A]."""

    def __init__(
        self,
        runs: list[Run],
        states: list[steps.State],
        decoder: Decoder,
        shape: tuple[int, int],
    ):
        self.runs, self.decoder, self.shape = runs, decoder, shape
        self.train, self.frozen = runs[0].train, runs[0].task.frozen
        self.at = [int(state.step) for state in states]
        self.left = set(range(len(runs)))  # runs that are not finished
        self.active: list[int] = []  # those that took the last step
        self.state = _stack(states, shape)
        self.task = _stack([dataclasses.replace(run.task, frozen={}) for run in runs], shape)
        self.evaluate = make_evaluate(decoder, _at_once())

    def begin(self) -> None:
        """Measures the untuned model for the runs that begin; compiles."""
        fresh = [m for m in sorted(self.left) if self.runs[m].saved.latest() is None]
        if fresh:
            for m, found in zip(fresh, self._validate(fresh), strict=True):
                run = self.runs[m]
                run.log.settings(run.saved.workdir.name, run.c.to_dict(), found)
        self._settle(self.left)
        first, arch = min(self.at), self.decoder.arch
        trained, one = self._pick(0).trained, self.runs[0].batch(first)
        program.say(f"{len(self.runs)} times: {cost.describe(arch, self.train, trained, one)}")
        began, measure = time.monotonic(), jnp.asarray(True)
        step, batch = make_step(self.decoder, self.train, _at_once()), self._batch(first)
        args = self.state, self.task, self.frozen, batch, measure, self._mask([])
        self.compiled = step.lower(*args).compile()
        seconds = time.monotonic() - began
        program.say(f"compiled in {seconds:.1f} s; {cost.memory(self.compiled)}")
        program.say(hardware.about_peak(jax.devices()[0].device_kind, self.train.peak_tflops))
        for run in self.runs:
            run.count_flops(arch, trained, one)
            run.log.begin()

    def going(self) -> bool:
        return bool(self.left)

    def step(self, i: int, measure: bool) -> tuple[list[int], dict[str, jax.Array]]:
        """Of the runs that are at i; the others are left as they are."""
        active = self.active = [m for m in sorted(self.left) if self.at[m] == i]
        self.state, metrics = self.compiled(
            self.state,
            self.task,
            self.frozen,
            self._batch(i),
            jnp.asarray(measure),
            self._mask(active),
        )
        for m in active:
            self.at[m] = i + 1
        return active, metrics

    def report(
        self, at: int, metrics: tuple[list[int], dict[str, jax.Array]], measured: bool, log: bool
    ) -> None:
        active, stacked = metrics[0], meshes.fetch(metrics[1])
        values = [self.runs[m].write(at, self._of(m, stacked), measured, log) for m in active]
        if log and values:
            loss = sum(v["loss"] for v in values) / len(values)
            rate = sum(v.get("examples_per_s", 0.0) for v in values)
            self.runs[active[0]].log.progress(at, {"loss": loss, "examples_per_s": rate})

    def validate(self, at: int) -> None:
        with self._aside():
            self._validate(self.active)
            self._settle(self.active)

    def save(self, at: int) -> None:
        with self._aside():
            for m in self.active:
                self.runs[m].save(self._pick(m))

    def save_due(self, at: int, logged: bool) -> bool:
        return self.runs[min(self.left)].save_due(at, logged)

    def profile(self, i: int) -> None:
        self.runs[0].profile(i)

    def wait(self) -> None:
        for run in self.runs:
            run.saved.wait()

    def _validate(self, chosen: Iterable[int]) -> list[dict[str, float]]:
        found = [
            meshes.fetch(self.evaluate(self.state.trained, self.task, self.frozen, batch))
            for batch in self._joined(run.val_batches() for run in self.runs)
        ]
        values = []
        for m in chosen:
            run = self.runs[m]
            values.append(run.judge(self.at[m], [self._of(m, part) for part in found]))
            run.save(self._pick(m), values[-1]["val/loss"])
        return values

    def _settle(self, chosen: Iterable[int]) -> None:
        """Runs at their last step, or out of patience, are finished, and not trained further."""
        for m in sorted(chosen):
            if self.at[m] == self.train.steps or self.runs[m].enough:
                self.runs[m].finish(self.at[m])
                self.left.discard(m)

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """Around what is no training step."""
        with contextlib.ExitStack() as stack:
            for run in self.runs:
                stack.enter_context(run.log.aside())
            yield

    def _batch(self, i: int) -> Batch:
        return next(self._joined([run.batch(i)] for run in self.runs))

    def _joined(self, of_runs: Iterable[Iterable[Batch]]) -> Iterator[Batch]:
        """[G, …], the rows of each group's first arm; [G, A, …] where arms have their own."""

        def join(path: tuple[Any, ...], *leaves: np.ndarray) -> np.ndarray:
            if _is_own(path):
                return np.stack(leaves).reshape(*self.shape, *leaves[0].shape)
            return np.stack(leaves[:: self.shape[1]])

        for batches in zip(*of_runs, strict=True):
            yield jax.device_put(jax.tree_util.tree_map_with_path(join, *batches))

    def _mask(self, active: Sequence[int]) -> jax.Array:
        return jnp.asarray(np.isin(np.arange(len(self.runs)), active).reshape(self.shape))

    def _pick(self, m: int) -> steps.State:
        return _take(self.state, *divmod(m, self.shape[1]))

    def _of(self, m: int, stacked: Any) -> Any:
        """A run's part of what was fetched."""
        return jax.tree.map(lambda a: a[divmod(m, self.shape[1])], stacked)


# ------------------------------------------------------------------ programs


@functools.lru_cache
def make_step(decoder: Decoder, train: FrozenConfigDict, at_once: bool) -> jax.stages.Wrapped:
    """`step(state, task, frozen, batch, measure, active) -> (state, metrics)`, the state donated.

    Leaves of state, task and active lie [G, A, …], those of batch [G, …]; a run that is not active
    keeps its state.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, task, frozen, batch, measure, active_GxA):
        # What some run weighs is measured in all: a condition that differs between runs would make
        # jax copy all that it reads, the frozen weights too, for each of them.
        due_J = (task.weight_J != 0).any((0, 1))

        def one(state, task, active, batch):
            task = dataclasses.replace(task, frozen=frozen)
            new, metrics = steps.update(decoder, train, None, state, task, batch, measure, due_J)
            return jax.tree.map(lambda n, old: jnp.where(active, n, old), new, state), metrics

        return _each_run(one, at_once)(state, task, active_GxA, batch)

    return step


@functools.lru_cache
def make_evaluate(decoder: Decoder, at_once: bool) -> jax.stages.Wrapped:
    """`evaluate(trained, task, frozen, batch)`: what `steps.make_evaluate` gives, [G, A, …]."""
    alone = steps.make_evaluate(decoder)

    @jax.jit
    def evaluate(trained, task, frozen, batch):
        def one(trained, task, batch):
            return alone(trained, dataclasses.replace(task, frozen=frozen), batch)

        return _each_run(one, at_once)(trained, task, batch)

    return evaluate


def _each_run(one: Callable[..., Any], at_once: bool) -> Callable[..., Any]:
    """`one(…, batch)` of every run; a group's arms share its batch, which comes last."""

    def of_group(*args: Any) -> Any:
        of_rows = jax.tree_util.tree_map_with_path(
            lambda path, _: 0 if _is_own(path) else None, args[-1]
        )
        return jax.vmap(one, in_axes=(*(0,) * (len(args) - 1), of_rows))(*args)

    if at_once:
        return jax.vmap(of_group)
    return lambda *args: jax.lax.map(lambda each: of_group(*each), args)


def _is_own(path: tuple[Any, ...]) -> bool:
    return getattr(path[-1], "name", "") in _OWN


def _at_once() -> bool:
    """Whether groups go through the layers together: larger products are faster on accelerators.

    A CPU gains nothing from that and would need memory for all; there they go one by one.
    """
    return jax.default_backend() != "cpu"


def _stack(trees: Sequence[Any], shape: tuple[int, int]) -> Any:
    return jax.tree.map(lambda *a: jnp.stack(a).reshape(*shape, *jnp.shape(a[0])), *trees)


@jax.jit
def _take(tree: Any, g: jax.Array, a: jax.Array) -> Any:
    """One run's leaves; compiled once for all runs."""
    return jax.tree.map(lambda leaf: leaf[g, a], tree)
