"""What the models wrote: drawn at random, and the worst failures."""

from typing import Any

import numpy as np
import pandas as pd

from reptune_jax.report import study as studies
from reptune_jax.report.blocks import number
from reptune_jax.report.study import BASE, Setting, Study
from reptune_jax.report.style import COLORS

GENERATIONS = 10
FAILURES = 5  # per sign


def generations(study: Study) -> list[dict[str, Any]]:
    """Answers of all arms to `GENERATIONS` test items drawn with a fixed seed, never picked."""
    arms = study.picks("test")
    texts = {c: _texts(study, c) for c in arms}
    texts = {c: t for c, t in texts.items() if not t.empty}
    if not texts:
        return []
    shared = sorted(set.intersection(*(set(t.index) for t in texts.values())))
    count = min(GENERATIONS, len(shared))
    drawn = np.random.default_rng(0).choice(len(shared), count, replace=False)
    return [_card(study, shared[i], texts) for i in sorted(drawn)]


def failures(study: Study) -> list[dict[str, Any]]:
    """The items on which dual (else the first arm with rows) moved furthest against its sign."""
    cards: list[dict[str, Any]] = []
    for sign in (1, -1):
        options = [study.pick(arm, sign) for arm in ("dual", "token", "steer", "prompt")]
        setting = next((c for c in options if c is not None), None)
        if setting is None or study.primary is None:
            continue
        paired = study.delta(setting, BASE, study.primary, "test")
        worst = (sign * studies.per_item(paired)).nsmallest(FAILURES)
        texts = {c: _texts(study, c) for c in (BASE, setting)}
        for item, moved in worst.items():
            card = _card(study, str(item), texts)
            cards.append(card | {"arm": setting.name, "moved": number(sign * moved, 3, True)})
    return cards


def _card(study: Study, item: str, texts: dict[Setting, pd.DataFrame]) -> dict[str, Any]:
    answers = [
        {"arm": c.name, "color": COLORS[c.arm], "text": row.text,
         "value": number(row.value, 2, True)}
        for c, found in texts.items()
        for row in found[found.index == item].itertuples()
    ]  # fmt: skip
    return {"item": item, "prompt": study.prompts.get(item, ""), "answers": answers}


def _texts(study: Study, setting: Setting) -> pd.DataFrame:
    """Generated test answers of a setting's first seed, by item."""
    rows = study.answers(setting, "test")
    rows = rows[rows.seed == rows.seed.min()].drop_duplicates("item_id")
    return rows.set_index("item_id")[["text", "value"]]
