"""Verdicts: claims asked in several formats, pressure scenarios with lettered choices.

Scored by the log-probabilities of the two verdicts' first tokens: no parsing, no judge.
"""

from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from reptune_jax.data.contrast import Contrast, claim_prompts, scenario_prompts
from reptune_jax.data.schema import Item, select
from reptune_jax.evals.arms import Condition
from reptune_jax.evals.results import Row, sha
from reptune_jax.hub import tokenizer as tokenizers


def rows(c: ConfigDict, cond: Condition, items: Sequence[Item], split: str) -> list[Row]:
    """`logodds` of the right over the wrong verdict, for every claim x template x order.

    `mass` is the share of probability on the two verdicts: where it is small the model is not
    answering the question, and its log-odds say little.
    """
    claims = select(items, split=split, format="claim")[: c.eval.claims or None]
    asked = [x for template in c.eval.templates for x in claim_prompts(claims, template)]
    asked += scenario_prompts(select(items, split=split, format="ab"))
    return score(c, cond, asked) if asked else []


def score(c: ConfigDict, cond: Condition, asked: Sequence[Contrast]) -> list[Row]:
    """One row per question."""
    tokenizer, prompts, pairs = cond.model.tokenizer, [], []
    for x in asked:
        text = tokenizers.chat_text(tokenizer, cond.under_persona(x.messages))
        prompts.append(tokenizer.encode(text, add_special_tokens=False))
        pairs.append(tokenizers.free_label_tokens(tokenizer, text, x.pos, x.neg))
    logp_Ix2 = cond.model.next_logp(prompts, np.array(pairs), cond.steer, c.eval.batch)
    labels = cond.labels(c)
    return [
        Row(
            **labels,
            split=x.item.split,
            item_id=x.item.id,
            cluster=x.item.cluster,
            template=x.template,
            format=x.item.format,
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
