"""What is attacked, and how an attack is measured: by the study's own primary measure."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from reptune_jax import mesh as meshes
from reptune_jax.console import say
from reptune_jax.data import neutral
from reptune_jax.data.contrast import claim_prompts, first_forms, scenario_prompts
from reptune_jax.data.schema import Item
from reptune_jax.evals import scoring
from reptune_jax.evals.arms import Condition
from reptune_jax.evals.bench import Bench, say_missing
from reptune_jax.evals.results import Row
from reptune_jax.lm import Model
from reptune_jax.model.padding import batches_by_length, pad
from reptune_jax.model.read import read_at_once
from reptune_jax.vectors.steering_vector import SteeringVector

SPLIT = "attacks"  # what all rows of attacks are filed under
CONTROL = 1000  # seeds from here on draw directions that no run was tuned toward


Text = tuple[list[int], list[tuple[int, int]]]  # ids, and [start, stop) of what is averaged


@dataclasses.dataclass(frozen=True, eq=False)
class Lab:
    """A study's bench, cut to the items that attacks are measured on."""

    bench: Bench
    prose: Sequence[scoring.Reference]  # neutral documents as the base model reads them

    @classmethod
    def of(cls, bench: Bench) -> "Lab":
        c, most = bench.c.copy_and_resolve_references(), bench.c.attack.prompts
        c.eval.prompts = c.eval.claims = c.eval.scenarios = most
        prose = neutral.prose(bench.base, "test", c.attack.documents)
        known = scoring.refer(bench.base, prose, c.eval.batch)
        return cls(dataclasses.replace(bench, c=c), known)

    def asking(self, change: Callable[[Item], Item]) -> "Lab":
        """Test items as `change` leaves them; no prose, which is not asked."""
        bench, behavior = dataclasses.replace(self.bench), self.bench.behavior
        items = (
            change(item) if item.split == "test" and item.format != "persona" else item
            for item in behavior.items
        )
        # Where the property keeps what it made.
        vars(bench)["behavior"] = dataclasses.replace(behavior, items=tuple(items))
        return Lab(bench, prose=())


@dataclasses.dataclass(frozen=True)
class Target:
    """A condition that is attacked."""

    lab: Lab
    cond: Condition
    own: SteeringVector  # that it was tuned toward: the behavior's, or a random one

    @property
    def base(self) -> Model:
        return self.lab.bench.base

    @property
    def vectors(self) -> dict[str, SteeringVector]:
        """The behavior's vector, and the target's own where that is another."""
        behavior = self.lab.bench.vector
        return {"": behavior} | ({":own": self.own} if self.own.digest != behavior.digest else {})

    def texts(self) -> list[tuple[Item, Text]]:
        """The test items: a prompt with its `neg` answer, whose tokens are the span; or a question.

        Of questions the first form, and its last token.
        """
        bench, model = self.lab.bench, self.cond.model
        if bench.primary.format == "free":
            found = []
            for item in bench.prompts("test"):
                prompt = self.cond.encode(item)
                ids = prompt + model.tokenizer.encode(item.neg, add_special_tokens=False)
                found.append((item, (ids, [(len(prompt), len(ids))])))
            return found
        items = bench.behavior.select("test", bench.primary.format)[: bench.c.eval.claims or None]
        if bench.primary.format == "claim":
            asked = claim_prompts(items, bench.c.eval.templates[0])
        else:
            asked = scenario_prompts(items)
        first = first_forms(asked)
        ids_I = [model.encode_prompt(self.cond.under_persona(q.messages)) for q in first]
        return [(q.item, (i, [(len(i) - 1, len(i))])) for q, i in zip(first, ids_I, strict=True)]

    def number(
        self, how: str, metric: str, value: Any, item: str = "all", k: float = 0.0, layer: int = -1
    ) -> Row:
        """A number of an attack that is no measure of an item's."""
        labels = self.lab.bench.labels(self.cond) | {"k": float(k), "layer": layer}
        about: dict[str, Any] = {"split": SPLIT, "item_id": item, "cluster": item, "position": how}
        value = float(value) if np.isfinite(value) else np.nan
        return Row(**labels, **about, metric=metric, value=value)

    def measure_asked(self, how: str) -> list[Row]:
        """`measure` of other prompts than the study's, which no other row of an item has.

        Nothing, which is said, where they are longer than the model's context.
        """
        context = self.cond.model.context
        longest = max(len(ids) for _, (ids, _) in self.texts()) + self.lab.bench.c.eval.new_tokens
        if longest > (context or longest):
            say(f"{how}: left out, it needs up to {longest} tokens of context")
            return []
        return [dataclasses.replace(row, prompt_sha="") for row in self.measure(how)]

    def measure(
        self, how: str, cond: Condition | None = None, k: float = 0.0, layer: int = -1
    ) -> list[Row]:
        """The primary measure on test items, and KL(base || it) on prose, of what became of it."""
        cond, bench = cond or self.cond, self.lab.bench
        say(f"{self.cond.title}: {how}{f' {k:g}' if k else ''}")
        of = bench.primary.metric, bench.primary.format
        found = [r for r in bench.primary_rows(cond, "test") if (r.metric, r.format) == of]
        size = min(bench.c.eval.batch, 2 * len(self.lab.prose))  # which is halved there
        kept = cond, bench.labels(cond), self.lab.prose, size
        found += [r for r in scoring.retention_rows(*kept) if r.metric == "kl"]
        say_missing(cond, found)
        at: dict[str, Any] = {"split": SPLIT, "position": how, "k": float(k), "layer": layer}
        return [dataclasses.replace(row, **at) for row in found]


def read_means(cond: Condition, texts: Sequence[Text], batch: int) -> np.ndarray:
    """The mean residual of each text's P spans at every layer, float32 [N, I, P, D]."""
    model, P, batch = cond.model, len(texts[0][1]), min(batch, len(texts))
    out = np.zeros((model.arch.N, len(texts), P, model.arch.D), np.float32)
    for rows in batches_by_length([len(ids) for ids, _ in texts], batch):
        tokens, mask = pad([texts[r][0] for r in rows], model.pad_id, left=False, rows=batch)
        weight_BxPxT = np.zeros((len(tokens), P, tokens.shape[1]), np.float32)
        for b, r in enumerate(rows):
            for p, (start, stop) in enumerate(texts[r][1]):
                weight_BxPxT[b, p, start:stop] = 1 / max(stop - start, 1)
        starts = [texts[r][1][0][0] for r in rows]
        starts += starts[:1] * (len(tokens) - len(rows))
        steer = model.as_steer(cond.steer, tokens, mask, starts)
        tokens, mask, weight_BxPxT = meshes.put_rows((tokens, mask, weight_BxPxT), model.mesh)
        asked = {"steer": steer, "read_BxPxT": weight_BxPxT, "hidden": False}
        found = read_at_once(model.decoder, model.params, tokens, mask, **asked)
        out[:, rows] = meshes.fetch(found.mean_NxBxPxD)[:, : len(rows)]
    return out


def intact(target: Target) -> list[Row]:
    """Before any attack."""
    return target.measure("intact")
