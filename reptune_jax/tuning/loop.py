"""The training loop: one arm, one sign, one seed, from step 0 or from where it stopped."""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from reptune_jax import distributed, ending
from reptune_jax import mesh as meshes
from reptune_jax.console import say
from reptune_jax.cost import collectives, flops, hardware
from reptune_jax.lm import Model
from reptune_jax.model import attention
from reptune_jax.model.transformer import Decoder
from reptune_jax.tuned_run import Progress
from reptune_jax.tuning import partition, remat
from reptune_jax.tuning import step as steps
from reptune_jax.tuning.base_cache import with_base_values, with_rows_below
from reptune_jax.tuning.checkpoint import Checkpoints
from reptune_jax.tuning.objective import Objective, make_objective
from reptune_jax.tuning.packing import packed
from reptune_jax.tuning.run import Job, Run, every
from reptune_jax.watch.log import Log


def tune(job: Job, model: Model) -> None:
    """Trains into the job's folder; resumes from its newest checkpoint.

    Raises:
      ending.Ended: at a signal, when the step it came in is saved.
    """
    objective = make_objective(job.c, job.vector, {}, job.also, model.stop_ids)
    corpus = with_base_values(job.c, job.corpus, model, objective.probe)
    with partition.lent(model.params, job.c.train.layers) as params:
        _tune(job._replace(corpus=corpus), model, params, objective)


def _tune(job: Job, model: Model, params: dict[str, Any], objective: Objective) -> None:
    """With `params`, the model's in segments, of which nothing may be held when this is over."""
    mesh, train = model.mesh, FrozenConfigDict(job.c.train)
    cuts = partition.segments(model.arch.N, train.layers)
    kernel = model.kernel("right") if train.flash else attention.XLA
    decoder = Decoder(model.arch, cuts, model.dtype, kernel=kernel, rows=meshes.rows_of(mesh))
    trained, frozen = partition.begin(model.arch, params, train, job.c.seed)
    objective = dataclasses.replace(objective, frozen=frozen)
    corpus = with_rows_below(job.c, job.corpus, model, decoder, objective)
    corpus = packed(job.c, corpus, model.arch, kernel, mesh)
    objective = objective.placed(mesh)
    state = steps.init_state(trained, train, mesh)
    del trained  # on a mesh the state has a copy

    with contextlib.ExitStack() as stack:
        saved = stack.enter_context(contextlib.closing(Checkpoints(job.folder, train.keep)))
        state, done = saved.restore(state, job.meta) or (state, Progress())
        log = Log(job.folder, train.steps, saved.latest(), done.seconds)
        stack.callback(log.close)
        run = Run(job, corpus, objective, steps.make_evaluate(decoder), log, saved, done, mesh)
        if saved.latest() is None:  # what every later step must beat
            log.settings(job.folder.name, job.c.to_dict(), run.validate(state))
        batch = run.batch(int(state.step))
        say(f"tokens: {corpus.real_share(train.retain_batch):.0%} are real, the others padding")
        run.flops = flops.batch_flops(model.arch, train.layers, state.trained, batch)["total"]
        args = state, objective, batch, run.put(True)
        step = compiled(decoder, args, train, mesh)
        del args, batch  # else the first state is held while its successors are trained
        # From here on a signal waits for the save of its step.
        with ending.deferred(), stack.pop_all():
            log.begin()

            pending = None
            for i in range(int(state.step), train.steps):
                if run.enough:
                    break
                run.profile(i)
                last = i + 1 == train.steps
                measure = last or every(i, train.measure_every)
                state, metrics = step(state, objective, run.batch(i), run.put(measure))
                if pending:  # one step late: the device is already busy with the next one
                    run.report(*pending)
                timed = not (pending and pending[-1])  # else no step lies between the two reports
                pending = i + 1, metrics, measure, measure or last or every(i, train.log_every)
                stop = distributed.stop_asked()
                validate = last or every(i + 1, train.eval_every)
                save = validate or stop or run.save_due(i + 1, pending[-1])
                if save or not run.late:  # what a checkpoint follows is checked, and in the log
                    run.report(*pending, timed=timed)
                    pending = None
                if save:
                    run.validate(state) if validate else run.save(state)
                if stop:
                    run.profile(train.steps)
                    saved.wait()
                    raise ending.Ended(f"step {i + 1} of {train.steps} is saved.")
            run.profile(train.steps)
            run.finish(int(state.step))


def compiled(
    decoder: Decoder, args: tuple[Any, ...], train: FrozenConfigDict, mesh: Mesh | None
) -> Callable[..., Any]:
    """The step compiled for `args` = (state, objective, batch, measure).

    So a step that does not fit is known in the first minute, and so is what it will send around.
    """
    state, _, batch, _ = args
    say(flops.describe(decoder.arch, train, state.trained, batch))
    began = time.monotonic()

    def with_remat(choice: str) -> Any:
        step = steps.make_step(decoder.clone(remat=choice), train, mesh)
        return step.lower(*args).compile()

    program = remat.fitting(train.remat, jax.default_backend(), with_remat)
    say(f"compiled in {time.monotonic() - began:.1f} s; {flops.memory(program)}")
    found = collectives.traffic(program.as_text(), mesh) if mesh is not None else {}
    for line in collectives.lines(found):
        say(line)
    say(hardware.about_peak(jax.devices()[0].device_kind, train.peak_tflops))
    return program
