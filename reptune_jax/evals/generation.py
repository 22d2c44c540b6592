"""Free answers and how they are judged."""

import math
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from reptune_jax.data.schema import Item
from reptune_jax.evals import judges
from reptune_jax.evals.arms import Condition
from reptune_jax.evals.judging import Judge
from reptune_jax.evals.results import Row, sha
from reptune_jax.hub.endings import said
from reptune_jax.model.decode import MISSING


def rows(
    settings: ConfigDict,
    cond: Condition,
    labels: dict[str, Any],
    items: Sequence[Item],
    asked: Sequence[Judge],
) -> list[Row]:
    """What each judge says and fluency guards of every answer; the text travels with the judges'.

    An answer whose logits were not finite is missing: its values are NaN, never those of no words.
    `settings` is `eval` of the config.
    """
    if not items:
        return []
    prompts = [cond.encode(item) for item in items]
    how = settings.new_tokens, 0.0, cond.steer, settings.batch
    new = cond.model.generate_each(prompts, *how, missing=True)
    texts = [said(cond.model.tokenizer, ids) if ids[-1] != MISSING else "" for ids in new]
    whole = [i for i, ids in enumerate(new) if ids[-1] != MISSING]
    written = [(items[i], texts[i]) for i in whole]
    judged = {judge.metric: dict(zip(whole, judge.score(written), strict=True)) for judge in asked}
    out = []
    for i, (item, prompt, ids, text) in enumerate(zip(items, prompts, new, texts, strict=True)):
        scores: dict[str, Any] = {
            "distinct2": judges.distinct_n(text, 2),
            "rep4": judges.repetition_rate(text, 4),
            "stopped": ids[-1] in cond.model.stop_ids,
        }
        scores |= {metric: found.get(i, math.nan) for metric, found in judged.items()}
        out += [
            Row.of(
                item,
                labels,
                metric=metric,
                value=float(value) if ids[-1] != MISSING else math.nan,
                text=text if metric in judged or not judged else "",
                prompt_sha=sha(prompt),
            )
            for metric, value in scores.items()
        ]
    return out
