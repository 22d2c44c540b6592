"""Program: a recipe is found, not guessed. Short runs, chosen on validation within a KL budget.

    python -m reptune_jax.recipe --config=sentiment --workdir=runs/recipe

Successive halving over `search.lr` x `search.cosine` x `search.modules` x `search.layers`: every
combination is trained for the first of `search.steps`, the best share of them anew for the next,
and so on. Each trial is a study folder in `<workdir>/trials`; run again, what is done is skipped.
The chosen config is written to `<workdir>/recipe.py`, for --config.
"""

import itertools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from reptune_jax import distributed, program, roles, train
from reptune_jax.config import TUNED_ARMS
from reptune_jax.console import say
from reptune_jax.evals import arms
from reptune_jax.evals.arms import Condition
from reptune_jax.evals.bench import Bench, prepare
from reptune_jax.evals.results import Row
from reptune_jax.evals.sweep import sweep
from reptune_jax.folder import Study, write_whole

_REPEATS = 0.2  # of 4-token runs, beyond the untuned model's: no longer text


class Trial(NamedTuple):
    """One combination."""

    lr: float
    cosine: float
    modules: str  # with + between patterns
    layers: tuple[int, int]

    def __str__(self) -> str:
        first, stop = self.layers
        return f"lr {self.lr:g}, cosine {self.cosine:g}, {self.modules}, layers {first}-{stop}"

    def name(self, steps: int) -> str:
        """Of its folder."""
        return re.sub(r"[^\w.+-]+", "_", f"{self} {steps} steps")

    def of(self, c: ConfigDict, steps: int) -> ConfigDict:
        """The config with this recipe in it."""
        out = c.copy_and_resolve_references()
        out.train.lr, out.loss.cosine, out.train.steps = self.lr, self.cosine, steps
        out.train.modules = tuple(self.modules.split("+"))
        if self.layers != tuple(c.train.layers):
            out.train.layers = out.loss.layers = self.layers
            out.steer.layers = (sum(self.layers) // 2, self.layers[1] - 1)
        out.train.warmup = min(c.train.warmup, steps // 4)
        out.train.eval_every = min(c.train.eval_every, steps)
        return out


class Outcome(NamedTuple):
    """What a trial did on validation."""

    gain: float  # of the primary measure against untuned, in the direction of the sign
    kl: float  # nats/token on neutral prose
    repeats: float  # share of 4-token runs, beyond the untuned model's

    def problem(self, max_kl: float) -> str:
        """Why it cannot be chosen; "" if it can."""
        if not all(map(math.isfinite, self)):
            return "not finite"
        if self.repeats > _REPEATS:
            return "repeats itself"
        if self.kl > max_kl:
            return "over the KL budget"
        return "" if self.gain > 0 else "not moved as asked"


def run(c: ConfigDict, workdir: Path) -> Path:
    """Searches; returns the file of the chosen config.

    Raises:
      ValueError: an arm that is not tuned, several behaviors or rates, or nothing to be chosen.
    """
    if c.arm not in TUNED_ARMS or c.loss.also or c.train.lr_by_path:
        raise ValueError(
            f"arm: got {c.arm!r} with {len(c.loss.also)} further behaviors and "
            f"{len(c.train.lr_by_path)} rates of train.lr_by_path, expected a tuned arm, one "
            "behavior and one rate. Search for each behavior by itself."
        )
    study, given = Study(workdir), spans(c.search.layers)
    with study.writing():
        bench = prepare(c, study)
        trials = combinations(c, given, bench.base.arch.N)
        found: dict[Trial, Outcome] = {}
        untuned = sweep(bench, [Condition(bench.base, "base")])[1]
        for steps in c.search.steps:
            say(f"==> {len(trials)} trials of {steps} steps")
            found = {trial: tried(bench, study, trial, steps, untuned) for trial in trials}
            trials = ranked(found, c.search.max_kl)
            for line in table(found, trials, c.search.max_kl):
                say(line)
            last, trials = trials[0], trials[: max(1, round(c.search.keep * len(trials)))]
        if problem := found[last].problem(c.search.max_kl):
            raise ValueError(
                f"search: the best of {len(found)} trials, {last}, is {problem}, expected one that "
                f"moves validation within {c.search.max_kl:g} nats/token. Widen search.lr or "
                "search.cosine, add steps, or raise search.max_kl."
            )
        why = f"Chosen on validation by `reptune recipe`. {last}: {about(found[last])}."
        chosen = roles.as_file(last.of(c, c.search.steps[-1]), why)
        distributed.once(lambda: write_whole(study.recipe, chosen))
    say(f"chosen: {last}. Use it with --config={study.recipe}")
    return study.recipe


def spans(layers: Sequence[str]) -> list[tuple[int, int]]:
    """`search.layers` as pairs of (first, stop).

    Raises:
      ValueError: something else.
    """
    found = [re.fullmatch(r"(\d+)-(\d+)", text) for text in layers]
    pairs = [(int(m[1]), int(m[2])) for m in found if m]
    if len(pairs) < len(layers) or any(first >= stop for first, stop in pairs):
        raise ValueError(
            f"search.layers: got {', '.join(layers)}, expected first-stop with first < stop, or "
            "nothing. Example: --config.search.layers=10-20,15-20"
        )
    return pairs


def combinations(c: ConfigDict, given: list[tuple[int, int]], N: int) -> list[Trial]:
    """All of them; without layers given the config's, and the middle third of the model's N."""
    own, third = tuple(c.train.layers), (N // 3, max(N // 3 + 1, 2 * N // 3))
    layers = given or [pair for pair in dict.fromkeys((own, third)) if pair[1] <= N]
    each = itertools.product(c.search.lr, c.search.cosine, c.search.modules, layers)
    return [Trial(*one) for one in each]


def tried(bench: Bench, study: Study, trial: Trial, steps: int, untuned: list[Row]) -> Outcome:
    """Trains and measures a trial, or reads what it did."""
    c, own = trial.of(bench.c, steps), study.trial(trial.name(steps))
    own.check(c)  # what is there may be of another loss
    if distributed.exists(own.outcome):
        return Outcome(**json.loads(own.outcome.read_text()))
    say(f"trial: {trial}, {steps} steps")
    distributed.once(lambda: study.share(own))  # no trial's recipe touches them
    folder = train.run(c, own.path, bench.base)
    own_bench = Bench(c, bench.base, bench.vector, bench.named)
    (cell,), rows = sweep(own_bench, [arms.tuned(bench.base, folder)])
    gain = cell.effect - c.sign * bench.effect(untuned)
    found = Outcome(gain, cell.kl, _repeats(rows) - _repeats(untuned))
    distributed.once(lambda: write_whole(own.outcome, json.dumps(found._asdict()) + "\n"))
    return found


def _repeats(rows: list[Row]) -> float:
    return float(np.mean([row.value for row in rows if row.metric == "rep4"] or [0.0]))


def ranked(found: dict[Trial, Outcome], max_kl: float) -> list[Trial]:
    """What can be chosen by gain, then the others by what they cost."""

    def rank(trial: Trial) -> tuple[bool, float]:
        one = found[trial]
        problem = one.problem(max_kl)
        by = one.gain if not problem else -one.kl
        return bool(problem), -by if math.isfinite(by) else math.inf

    return sorted(found, key=rank)


def table(found: dict[Trial, Outcome], trials: Sequence[Trial], max_kl: float) -> list[str]:
    """A line for each trial, the best first."""
    width = max(len(str(trial)) for trial in trials)
    return [
        f"{trial!s:<{width}}  {about(found[trial])}  {found[trial].problem(max_kl)}".rstrip()
        for trial in trials
    ]


def about(one: Outcome) -> str:
    """In a line."""
    return f"gain {one.gain:+.3f}  KL {one.kl:.4f}  repeats {one.repeats:+.2f}"


if __name__ == "__main__":
    program.main(run, __doc__)
