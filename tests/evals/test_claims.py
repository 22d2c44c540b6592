"""Which questions are asked."""

import collections

from reptune_jax import config
from reptune_jax.data import behavior as behaviors
from reptune_jax.evals import claims


def test_as_many_claims_and_scenarios_are_asked_as_the_config_says(monkeypatch):
    monkeypatch.setattr(claims, "score", lambda cond, labels, asked, batch: asked)
    honesty, c = behaviors.load("honesty"), config.default()

    def items() -> dict[str, int]:
        asked = claims.rows(c.eval, None, {}, honesty, "test")
        return collections.Counter(form for form, _ in {(x.item.format, x.item.id) for x in asked})

    every = {form: len(honesty.select("test", form)) for form in ("claim", "ab")}
    assert items() == every
    c.eval.claims, c.eval.scenarios = 4, 3
    assert items() == {"claim": 4, "ab": 3}
