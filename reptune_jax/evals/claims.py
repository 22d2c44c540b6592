"""Verdicts: claims asked in several formats, pressure scenarios with lettered choices.

Scored by the log-probabilities of the two verdicts' first tokens: no parsing, no judge.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from reptune_jax.data.behavior import Behavior
from reptune_jax.data.contrast import Contrast, claim_prompts, scenario_prompts
from reptune_jax.evals.arms import Condition
from reptune_jax.evals.results import Row, sha
from reptune_jax.hub import templates
from reptune_jax.hub import tokenizer as tokenizers


def rows(
    settings: ConfigDict, cond: Condition, labels: dict[str, Any], behavior: Behavior, split: str
) -> list[Row]:
    """`logodds` of the right over the wrong verdict, for every claim x template x order.

    `mass` is the share of probability on the two verdicts: where it is small the model is not
    answering the question, and its log-odds say little.
    """
    claims = behavior.select(split, "claim")[: settings.claims or None]
    asked = [x for template in settings.templates for x in claim_prompts(claims, template)]
    scenarios = behavior.select(split, "ab")[: settings.scenarios or None]
    asked += scenario_prompts(scenarios)
    return score(cond, labels, asked, settings.batch) if asked else []


def score(
    cond: Condition, labels: dict[str, Any], asked: Sequence[Contrast], batch: int
) -> list[Row]:
    """One row per question."""
    tokenizer, prompts, pairs = cond.model.tokenizer, [], []
    for x in asked:
        text = templates.prompt_text(tokenizer, cond.under_persona(x.messages))
        prompts.append(templates.encode(tokenizer, text))
        pairs.append(tokenizers.free_label_tokens(tokenizer, text, x.pos, x.neg))
    logp_Ix2 = cond.model.next_logp(prompts, np.array(pairs), cond.steer, batch, missing=True)
    return [
        Row.of(
            x.item,
            labels,
            template=x.template,
            order=x.order,
            metric="logodds",
            value=float(pos - neg),
            label=float("nan") if x.label is None else float(x.label),
            logp_pos=float(pos),
            logp_neg=float(neg),
            mass=float(np.exp(pos) + np.exp(neg)),
            prompt_sha=sha(prompt),
        )
        for x, prompt, (pos, neg) in zip(asked, prompts, logp_Ix2, strict=True)
    ]
