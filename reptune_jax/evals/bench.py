"""What all conditions of a study are measured with, and all measures of one condition."""

import collections
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from reptune_jax import distributed, program
from reptune_jax.console import say
from reptune_jax.data import behavior as behaviors
from reptune_jax.data import neutral
from reptune_jax.data.behavior import Behavior
from reptune_jax.data.schema import Item
from reptune_jax.evals import claims, generation, judging, measures, scoring
from reptune_jax.evals.arms import Condition
from reptune_jax.evals.judging import Judge, Measured
from reptune_jax.evals.measures import METRICS, Measure
from reptune_jax.evals.results import Row
from reptune_jax.folder import Study
from reptune_jax.lm import Model
from reptune_jax.roles import digest
from reptune_jax.vectors import extraction
from reptune_jax.vectors.steering_vector import SteeringVector


@dataclasses.dataclass(frozen=True)
class Bench:
    """The untuned model, the vector and the behavior of one study."""

    c: ConfigDict
    base: Model
    vector: SteeringVector
    named: Callable[[], Measured | None]  # the judge of `eval.judge`, which is made when asked for

    @functools.cached_property
    def behavior(self) -> Behavior:
        return behaviors.load(self.c.behavior)

    @functools.cached_property
    def judges(self) -> list[Judge]:
        """Those that score generated answers: the behavior's own, and the named one where fit."""
        own, named = judging.own(self.behavior), self.named()
        return [*own, named.judge] if named and named.fit else own

    @functools.cached_property
    def primary(self) -> Measure:
        """What the study declared; by default the behavior's first measure."""
        return Measure.parse(judging.declared(self.c, self.behavior)[0])

    @functools.cached_property
    def references(self) -> list[scoring.Reference]:
        """The retention texts as the base model reads them; only read if something is measured."""
        return scoring.references(self.base, "test", self.c.eval)

    @functools.cached_property
    def swept_prose(self) -> list[scoring.Reference]:
        """Validation prose, on which sweeps spend their KL, as the base model reads it."""
        prose = neutral.prose(self.base, "val", self.c.steer.documents)
        return scoring.refer(self.base, prose, self.c.eval.batch)

    def labels(self, cond: Condition) -> dict[str, Any]:
        """The columns that all rows of a condition share."""
        about = {"behavior": self.behavior.name, "config_sha": digest(self.c.to_dict())}
        return about | cond.labels

    def prompts(self, split: str) -> list[Item]:
        """The free prompts of a split, at most as many as the config evaluates."""
        limits = {"test": "prompts", "val": "val_prompts", "ood": "ood_prompts"}
        limit = self.c.eval[limits[split]]
        return self.behavior.select(split, "free")[: limit or None]

    def rows(self, cond: Condition) -> list[Row]:
        """Behavior on `eval.splits`, retention on neutral text, cosines."""
        say(f"measuring {cond.title}")
        labels, batch = self.labels(cond), self.c.eval.batch
        rows = [row for split in self.c.eval.splits for row in self.behavior_rows(cond, split)]
        rows += scoring.retention_rows(cond, labels, self.references, batch)
        probes = self.prompts("test")[: self.c.eval.heat_map]
        rows += scoring.cosine_rows(cond, labels, self.vector, probes)
        say_missing(cond, rows)
        return rows

    def behavior_rows(self, cond: Condition, split: str) -> list[Row]:
        """Free answers with their judge and contrasts; claims and pressure scenarios."""
        prompts, labels, settings = self.prompts(split), self.labels(cond), self.c.eval
        rows = self.free_rows(cond, prompts[: settings.answered or None])
        rows += scoring.contrast_rows(cond, labels, prompts, settings.batch)
        return rows + claims.rows(settings, cond, labels, self.behavior, split)

    def free_rows(self, cond: Condition, prompts: list[Item]) -> list[Row]:
        """Answers to open prompts, judged where the behavior has a judge."""
        return generation.rows(self.c.eval, cond, self.labels(cond), prompts, self.judges)

    def primary_rows(self, cond: Condition, split: str) -> list[Row]:
        """What choices on validation are made by, and the measures that come with it."""
        if self.primary.judged:
            return self.free_rows(cond, self.prompts(split))
        labels, settings = self.labels(cond), self.c.eval
        if self.primary.format == "free":
            return scoring.contrast_rows(cond, labels, self.prompts(split), settings.batch)
        return claims.rows(settings, cond, labels, self.behavior, split)

    def effect(self, rows: list[Row]) -> float:
        """Mean of the primary measure.

        NaN where one of them is missing: the rest would be other items than those of other choices.
        A judge that is asked may have no score of a few.
        """
        of = self.primary.metric, self.primary.format
        values = np.array([row.value for row in rows if (row.metric, row.format) == of])
        missing = np.isnan(values)
        if METRICS[self.primary.metric].asked and missing.mean() <= judging.MOST_MISSING:
            values = values[~missing]
        return float(np.mean(values))

    def judge_rows(self, cond: Condition) -> list[Row]:
        """Each judge on test answers whose label is known: the report makes an AUROC of them.

        Also of one that is too weak to judge anything else; `template` says whose score it is.
        """
        texts, labels = judging.labelled(self.behavior, "test")
        found = [Measured(j, texts, labels, j.score(texts)) for j in judging.own(self.behavior)]
        if named := self.named():
            found.append(named)
        return [
            Row.of(
                item,
                self.labels(cond),
                metric="judge",
                template=one.judge.metric,
                value=float(value),
                label=float(label),
                text=text,
            )
            for one in found
            for (item, text), label, value in zip(one.texts, one.labels, one.scores, strict=True)
        ]


def say_missing(cond: Condition, rows: list[Row]) -> None:
    """Counts, by metric, the values of a condition that could not be computed."""
    of = collections.Counter(row.metric for row in rows)
    bad = collections.Counter(row.metric for row in rows if np.isnan(row.value))
    if bad:
        counts = ", ".join(f"{n} of {of[metric]} {metric}" for metric, n in sorted(bad.items()))
        unasked = any(not METRICS[metric].asked for metric in bad)
        why = f"not finite in {cond.model.dtype}" if unasked else "no score of the judge"
        say(f"{cond.title}: missing, {why}: {counts}")


def prepare(c: ConfigDict, study: Study, model: Model | None = None) -> Bench:
    """Loads or makes everything a measurement needs."""
    behavior = behaviors.load(c.behavior)
    formats = {item.format for item in behavior.items} - {"persona"}
    judging.check(c, behavior)
    measures.check(judging.declared(c, behavior), c.study.primary, formats)
    base = functools.cache(lambda: model or program.load_model(c))
    vector = extraction.run(c, study, base)
    extraction.fit(vector, base())
    named = functools.cache(lambda: judging.named(c, study, base(), behavior))
    bench = Bench(c, base(), vector, named)
    if METRICS[bench.primary.metric].asked and not distributed.exists(study.baseline):
        named()  # before anything is measured: it may be too weak
    return bench
