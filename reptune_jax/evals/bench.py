"""What all conditions of a study are measured with, and all measures of one condition."""

import dataclasses
import functools
from pathlib import Path

from ml_collections import ConfigDict

from reptune_jax import program
from reptune_jax.data.schema import Item, load_behavior, select
from reptune_jax.evals import claims, generation, judges, scoring
from reptune_jax.evals.arms import Condition
from reptune_jax.evals.results import Row
from reptune_jax.lm import Model
from reptune_jax.vectors import extraction
from reptune_jax.vectors.steering_vector import SteeringVector


@dataclasses.dataclass(frozen=True)
class Bench:
    """The untuned model, the vector and the items of one study."""

    c: ConfigDict
    base: Model
    vector: SteeringVector
    items: list[Item]

    @functools.cached_property
    def texts(self) -> list[scoring.Text]:
        """The retention texts as the base model reads them; only read if something is measured."""
        return scoring.reference(self.c, self.base)

    def prompts(self, split: str) -> list[Item]:
        """The free prompts of a split, at most as many as the config evaluates."""
        limits = {"test": "prompts", "val": "val_prompts", "ood": "ood_prompts"}
        limit = self.c.eval[limits[split]]
        return select(self.items, split=split, format="free")[: limit or None]

    def rows(self, cond: Condition) -> list[Row]:
        """Behavior on `eval.splits`, retention on neutral text, cosines."""
        program.say(f"measuring {cond.title}")
        rows = [row for split in self.c.eval.splits for row in self.behavior(cond, split)]
        rows += scoring.retention_rows(self.c, cond, self.texts)
        probes = self.prompts("test")[: self.c.eval.heat_map]
        return rows + scoring.cosine_rows(self.c, cond, self.vector, probes)

    def behavior(self, cond: Condition, split: str) -> list[Row]:
        """Free answers with their judge and contrasts; claims and pressure scenarios."""
        prompts = self.prompts(split)
        rows = generation.rows(self.c, cond, prompts)
        rows += scoring.contrast_rows(self.c, cond, prompts)
        return rows + claims.rows(self.c, cond, self.items, split)

    def judge_rows(self, cond: Condition) -> list[Row]:
        """The judge on texts whose label is known: its own AUROC goes into the report."""
        judge = generation.JUDGES.get(Path(self.c.behavior).stem)
        labels = cond.labels(self.c)
        items = [vars(item) for item in select(self.items, split="test", format="free")]
        return judges.judge_rows(items, judge, **labels) if judge else []


def prepare(c: ConfigDict, workdir: Path, model: Model | None = None) -> Bench:
    """Loads or makes everything a measurement needs."""
    program.claim_study(workdir, c)
    model = model or program.load_model(c)
    vector = extraction.run(c, workdir, model)
    vector.check_model(model.sha, model.name)
    return Bench(c, model, vector, load_behavior(c.behavior))
