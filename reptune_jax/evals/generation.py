"""Free answers and how they are judged."""

import math
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from reptune_jax.data.schema import Item
from reptune_jax.evals import judges
from reptune_jax.evals.arms import Condition
from reptune_jax.evals.measures import METRICS
from reptune_jax.evals.results import Row, sha
from reptune_jax.hub.endings import said
from reptune_jax.model.decode import MISSING


def rows(
    settings: ConfigDict,
    cond: Condition,
    labels: dict[str, Any],
    items: Sequence[Item],
    judged: str | None,
) -> list[Row]:
    """The judged metric, if any, and fluency guards of every answer; the text travels with it.

    An answer whose logits were not finite is missing: its values are NaN, never those of no words.
    `settings` is `eval` of the config.
    """
    if not items:
        return []
    out, judge = [], METRICS[judged].judge if judged else None
    prompts = [cond.encode(item) for item in items]
    asked = settings.new_tokens, 0.0, cond.steer, settings.batch
    new = cond.model.generate_each(prompts, *asked, missing=True)
    for item, prompt, ids in zip(items, prompts, new, strict=True):
        whole = ids[-1] != MISSING
        text = said(cond.model.tokenizer, ids) if whole else ""
        scores: dict[str, Any] = {
            "distinct2": judges.distinct_n(text, 2),
            "rep4": judges.repetition_rate(text, 4),
            "stopped": ids[-1] in cond.model.stop_ids,
        }
        if judge is not None:
            scores[str(judged)] = judge(text)
        out += [
            Row.of(
                item,
                labels,
                metric=metric,
                value=float(value) if whole else math.nan,
                text=text if metric == judged or judged is None else "",
                prompt_sha=sha(prompt),
            )
            for metric, value in scores.items()
        ]
    return out
