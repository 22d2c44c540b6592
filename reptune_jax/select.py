"""Program: how to steer is chosen on validation: vector, layers, operation, dose, in a KL budget.

    python -m reptune_jax.select --config=sentiment --workdir=runs/select

First every vector (`select.methods` x `select.positions`) is added at every depth, at the largest
dose that `select.max_kl` allows; then, on the best few, the other operations, rules for tokens,
widths and shares of that dose. Chosen is what moves the primary measure most among those whose
answers are still text. Nothing is drawn at random, test items are not looked at, and what was
measured is kept in `<workdir>/selection.jsonl`: run again, it is not measured again. The chosen
config is written to `<workdir>/select.py`, for --config.
"""

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from reptune_jax import depth, distributed, program, roles
from reptune_jax.console import say
from reptune_jax.data import behavior as behaviors
from reptune_jax.data import neutral
from reptune_jax.data.behavior import Behavior
from reptune_jax.evals import arms, judging, measures, scoring
from reptune_jax.evals.arms import Condition
from reptune_jax.evals.bench import Bench
from reptune_jax.evals.results import Row
from reptune_jax.folder import Study, write_whole
from reptune_jax.lm import Model
from reptune_jax.reading import reading
from reptune_jax.vectors import extraction
from reptune_jax.vectors.steering_vector import SteeringVector

_REPEATS = 0.3  # of an answer's 4-word runs: more is no text
_CLOSE, _TRIES = 0.85, 6  # share of the budget that is near enough, and doses tried to come there
_MOST = {"ablate": 1.0, "rotate": 180.0}  # doses; others have no end
_FIRST = {"ablate": 0.5, "rotate": 6.0}  # … and where the search for one begins


class Setting(NamedTuple):
    """One way to steer, but for its dose."""

    method: str
    position: str
    layer: int
    width: int = 1
    operation: str = "add"
    tokens: str = "all"

    def __str__(self) -> str:
        last = self.layer + self.width - 1
        layers = f"layer {self.layer}" if self.width == 1 else f"layers {self.layer} to {last}"
        return f"{self.method} at {self.position}, {layers}, {self.operation} at {self.tokens}"

    def of(self, c: ConfigDict, dose: float, max_kl: float) -> ConfigDict:
        """The config with this in it."""
        out = c.copy_and_resolve_references()
        out.vector.method, out.vector.position = self.method, self.position
        out.steer.layers, out.steer.width = (self.layer,), self.width
        out.steer.operation, out.steer.tokens = self.operation, self.tokens
        out.steer.doses, out.steer.max_kl = (dose / 2, dose), max_kl
        if (self.operation, self.tokens) != ("add", "all"):  # nothing else is a constant
            out.study.arms = tuple(arm for arm in c.study.arms if arm != "bake")
        return out


class Point(NamedTuple):
    """A setting at a dose, on validation."""

    setting: Setting
    dose: float  # 0: none keeps to the budget
    kl: float  # nats/token on neutral prose, or on chats where that is more
    gain: float = math.nan  # of the primary measure against untuned, in the direction of the sign
    broken: float = math.nan  # share of answers that are empty or repeat, beyond the untuned's

    def problem(self, max_kl: float, broken: float) -> str:
        """Why it cannot be chosen; "" if it can."""
        if self.dose == 0 or self.kl > max_kl:
            return "over the KL budget"
        if not all(map(math.isfinite, (self.kl, self.gain, self.broken))):
            return "not finite"
        if self.broken > broken:
            return "empty or repeating answers"
        return "" if self.gain > 0 else "not moved as asked"


def run(c: ConfigDict, workdir: Path) -> Path:
    """Searches; returns the file of the chosen config.

    Raises:
      ValueError: layers that the model does not have, or nothing to be chosen.
    """
    study, behavior = Study(workdir), behaviors.load(c.behavior)
    positions = c.select.positions or (c.vector.position,)
    sources = list(itertools.product(c.select.methods, positions))
    for method, position in sources:
        behavior.check(Setting(method, position, 0).of(c, 1.0, c.select.max_kl), "train")
    study.check(c)
    formats = {item.format for item in behavior.items} - {"persona"}
    judging.check(c, behavior)
    measures.check(judging.declared(c, behavior), c.study.primary, formats)
    with study.writing():
        model = program.load_model(c)
        layers = depth.numbers("select.layers", c.select.layers, model.arch.N, c.model)
        study.claim(c)
        search = Search(c, study, model, behavior)
        first = [Setting(*source, layer) for source in sources for layer in layers]
        say(f"==> {len(first)} vectors and layers, added at the largest dose within the budget")
        found = [point for setting in first for point in search.points(setting, (1.0,))]
        best = [point.setting for point in search.ranked(found)[: c.select.keep]]
        more = further(c, best, model.arch.N)
        say(f"==> {len(more)} operations, tokens and widths on the best {len(best)}")
        for setting in more:
            found += search.points(setting, c.select.shares)
        order = search.ranked(dict.fromkeys(found))
        for line in table(order, c):
            say(line)
        if problem := order[0].problem(c.select.max_kl, c.select.broken):
            raise ValueError(
                f"select: the best of {len(order)} points, {order[0].setting}, is {problem}, "
                f"expected one that moves validation within {c.select.max_kl:g} nats/token. Raise "
                "select.max_kl, or try other select.methods, layers or operations."
            )
        chosen = order[0].setting.of(c, order[0].dose, c.select.max_kl)
        why = f"Chosen on validation by `reptune select`. {about(order[0])}."
        distributed.once(lambda: write_whole(study.select, roles.as_file(chosen, why)))
    say(f"chosen: {about(order[0])}. Use it with --config={study.select}")
    return study.select


def further(c: ConfigDict, best: Sequence[Setting], N: int) -> list[Setting]:
    """Every operation, rule and width at the best settings' vectors and layers, once each."""
    each = itertools.product(best, c.select.operations, c.select.tokens, c.select.widths)
    settings = [
        one._replace(
            operation=op, tokens=rule, width=width, layer=max(0, one.layer - (width - 1) // 2)
        )
        for one, op, rule, width in each
    ]
    return [one for one in dict.fromkeys(settings) if one.layer + one.width <= N]


class Search:
    """What a search measures with, and what it has measured."""

    def __init__(self, c: ConfigDict, study: Study, model: Model, behavior: Behavior):
        self.c, self.study, self.model, self.behavior = c, study, model, behavior
        self.source = c.select.methods[0], (*c.select.positions, c.vector.position)[0]
        self.known = _read(study.selection)
        self.answers: extraction.Sides = []  # of the personas, once written
        self.vector = functools.cache(self._vector)
        self.named = functools.cache(lambda: judging.named(c, study, model, behavior))

    def points(self, setting: Setting, shares: Sequence[float]) -> list[Point]:
        """The setting at shares of the largest dose that the budget allows."""
        most = self.largest_dose(setting)
        if not most:
            return [Point(setting, 0.0, math.nan)]
        doses = dict.fromkeys(_rounded(share * most) for share in shares)
        found = []
        untuned = self._measured(None, 0.0, "behavior")
        for dose in doses:
            effect, broken = self._measured(setting, dose, "behavior")
            gain = self.c.sign * (effect - untuned[0])
            (kl,) = self._measured(setting, dose, "kl")
            found.append(Point(setting, dose, kl, gain, broken - untuned[1]))
            say(about(found[-1]))
        return found

    def largest_dose(self, setting: Setting) -> float:
        """The largest dose found whose KL is within the budget, mostly at least 85 % of it; or 0.

        KL grows with a power of the dose, about 2 and then as the last two doses say, by which the
        next one is chosen.
        """
        budget, most = self.c.select.max_kl, _MOST.get(setting.operation, math.inf)
        low, high, dose = 0.0, math.inf, _rounded(min(most, self._first_dose(setting)))
        power, before = 2.0, (0.0, 0.0)
        for _ in range(_TRIES):
            (kl,) = self._measured(setting, dose, "kl")
            if kl <= budget:
                low = dose
                if kl >= _CLOSE * budget or dose == most:
                    break
            else:  # or not finite
                high = dose
            if min(kl, before[1]) > 0 and math.isfinite(kl) and dose != before[0]:
                power = math.log(kl / before[1]) / math.log(dose / before[0])
                power = min(max(power, 0.5), 6.0)
            if math.isfinite(kl):
                before = dose, kl
            factor = (0.93 * budget / max(kl, 1e-12)) ** (1 / power) if math.isfinite(kl) else 0.0
            dose = _rounded(min(most, dose * min(max(factor, 0.25), 4.0)))
            if not low < dose < high:
                dose = _rounded(math.sqrt(low * high) if low else high / 2)
        return low

    def ranked(self, found: Any) -> list[Point]:
        """What can be chosen by gain, the smaller KL first among equals; then the others."""

        def rank(point: Point) -> tuple[bool, float, float]:
            problem = bool(point.problem(self.c.select.max_kl, self.c.select.broken))
            gain = -math.inf if math.isnan(point.gain) else point.gain
            return problem, -gain, math.inf if math.isnan(point.kl) else point.kl

        return sorted(found, key=rank)

    def _first_dose(self, setting: Setting) -> float:
        """A tenth of the residual's length, where doses are multiples of the vector."""
        if setting.operation in _FIRST:
            return _FIRST[setting.operation] / setting.width
        vector = self.vector(setting.method, setting.position)
        length = float(np.linalg.norm(vector.dose_NxD[setting.layer]))
        return 0.1 * float(vector.residual_norm_N[setting.layer]) / length / setting.width

    def _vector(self, method: str, position: str) -> SteeringVector:
        """Made, or read where it was made before."""
        c = self.c.copy_and_resolve_references()
        c.vector.method, c.vector.position = method, position
        own = self.study.trial(f"{method}_{position}")
        own.check(c)
        if not distributed.exists(own.vector):
            say(f"vector: {method} at {position}")
            vector = extraction.read_vector(c, self.model, self.behavior, self.answers)
            own.claim(c)
            distributed.once(lambda: vector.save(own.vector))
        vector = SteeringVector.load(own.vector)
        extraction.fit(vector, self.model)
        return vector

    def _measured(self, setting: Setting | None, dose: float, what: str) -> list[float]:
        """From the file, or now: the KL, or (mean primary measure, share of broken answers)."""
        c, cond = self.c, Condition(self.model, "base")
        if setting is not None:
            c = setting.of(self.c, dose, self.c.select.max_kl)
            vector = self.vector(setting.method, setting.position)
            at = self.model, vector, setting.layer, dose, c.sign
            cond = arms.steered(*at, c.steer)
        of = {
            "what": what,
            "config": roles.digest(roles.without(c.to_dict(), "study", "run")),
            "behavior": self.behavior.digest,
            "steered": setting and [*setting, dose * self.c.sign, vector.digest],
        }
        key = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:16]
        if key not in self.known:
            compute = self._kl if what == "kl" else self._behavior
            row = {"key": key, "what": what, "steered": of["steered"], "found": compute(c, cond)}
            self.known[key] = row
            lines = "".join(json.dumps(row) + "\n" for row in self.known.values())
            distributed.once(lambda: write_whole(self.study.selection, lines))
        return self.known[key]["found"]

    def _kl(self, c: ConfigDict, cond: Condition) -> list[float]:
        rows = scoring.retention_rows(cond, self._labels(cond), self._neutral, c.eval.batch)
        kl = [(row.split, row.value) for row in rows if row.metric == "kl"]
        return [max(float(np.mean([v for s, v in kl if s == split])) for split in dict(kl))]

    @functools.cached_property
    def _neutral(self) -> list[scoring.Reference]:
        """Prose; and where a rule tells prompts from answers, which prose has not, chats too."""
        c, limit = self.c, self.c.steer.documents
        texts = neutral.prose(self.model, "val", limit)
        if set(c.select.tokens) != {"all"}:
            texts += neutral.chats(self.model, "val", c.eval.new_tokens, limit, c.eval.batch)
        return scoring.refer(self.model, texts, c.eval.batch)

    def _behavior(self, c: ConfigDict, cond: Condition) -> list[float]:
        vector = self.vector(*self.source)  # which is not looked at
        bench = Bench(c, self.model, vector, self.named)
        rows = bench.primary_rows(cond, "val")
        answers = rows
        if not bench.primary.judged:
            answers = bench.free_rows(cond, bench.prompts("val"))
        return [bench.effect(rows), broken(answers)]

    def _labels(self, cond: Condition) -> dict[str, Any]:
        return {"behavior": self.behavior.name, "config_sha": ""} | cond.labels


def broken(rows: Sequence[Row]) -> float:
    """The share of answers without a word, or whose 4-word runs repeat; 0 without answers."""
    said = {row.item_id for row in rows if row.text.strip()}
    repeats = {row.item_id: row.value for row in rows if row.metric == "rep4"}
    bad = [i not in said or repeats[i] > _REPEATS for i in repeats]
    return float(np.mean(bad)) if bad else 0.0


def table(order: Sequence[Point], c: ConfigDict) -> list[str]:
    """A line for each point, the best first."""
    width = max(len(str(point.setting)) for point in order)
    return [
        f"{about(point, width)}  {point.problem(c.select.max_kl, c.select.broken)}".rstrip()
        for point in order
    ]


def about(point: Point, width: int = 0) -> str:
    """In a line."""
    return (
        f"{point.setting!s:<{width}}  dose {point.dose:<6g}  gain {point.gain:+.3f}  "
        f"KL {point.kl:.4f}  broken {point.broken:+.2f}"
    )


def _rounded(dose: float) -> float:
    return float(f"{dose:.3g}")


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """What was measured before.

    Raises:
      ValueError: a file that this program did not write.
    """
    if not distributed.exists(path):
        return {}
    with reading(path, "Move it away; what it held is measured again."):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {row["key"]: row | {"found": [float(x) for x in row["found"]]} for row in rows}


if __name__ == "__main__":
    program.main(run, __doc__)
