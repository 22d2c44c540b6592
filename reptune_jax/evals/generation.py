"""Free answers and how they are judged."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from reptune_jax.data.schema import Item
from reptune_jax.evals import judges
from reptune_jax.evals.arms import Condition
from reptune_jax.evals.results import Row, sha

# the offline judge of a behavior's free answers: higher = exhibits it more
JUDGES: dict[str, Callable[[str], float]] = {"sentiment": judges.vader}


def write(cond: Condition, items: Sequence[Item], new_tokens: int, batch: int) -> list[str]:
    """One greedy continuation per prompt, without its prompt."""
    prompts = [cond.encode(item) for item in items]
    new = cond.model.generate_each(prompts, new_tokens, steer=cond.steer, batch_size=batch)
    return [cond.model.tokenizer.decode(ids, skip_special_tokens=True) for ids in new]


def rows(c: ConfigDict, cond: Condition, items: Sequence[Item]) -> list[Row]:
    """Judge score and fluency guards of every answer; the text travels with the score."""
    if not items:
        return []
    labels = cond.labels(c)
    judge = JUDGES.get(labels["behavior"])
    out = []
    for item, text in zip(items, write(cond, items, c.eval.new_tokens, c.eval.batch), strict=True):
        scores: dict[str, Any] = {
            "distinct2": judges.distinct_n(text, 2),
            "rep4": judges.repetition_rate(text, 4),
        }
        if judge is not None:
            scores["vader"] = judge(text)
        out += [
            Row(
                **labels,
                split=item.split,
                item_id=item.id,
                cluster=item.cluster,
                format=item.format,
                metric=metric,
                value=float(value),
                text=text if metric == "vader" or judge is None else "",
                prompt_sha=sha(cond.encode(item)),
            )
            for metric, value in scores.items()
        ]
    return out


def has_judge(c: ConfigDict) -> bool:
    """Whether the behavior's free answers can be judged offline."""
    return Path(c.behavior).stem in JUDGES


def mean_score(c: ConfigDict, cond: Condition, items: Sequence[Item]) -> float:
    """Mean judge score, for choices made on the validation split."""
    found = [r.value for r in rows(c, cond, items) if r.metric == "vader"]
    return sum(found) / len(found)
