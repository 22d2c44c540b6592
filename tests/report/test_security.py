"""Verdicts on attacks, and how the report shows them, of made-up rows."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from reptune_jax import cards, config, depth
from reptune_jax.evals import results, stats
from reptune_jax.evals.attacks import controls, verdicts, words
from reptune_jax.evals.attacks.verdicts import Attacks
from reptune_jax.evals.results import Row
from reptune_jax.report import html, markdown, sections, security, study
from tests.support.synthetic import synthetic_study

EFFECT = 2.0
# how -> what is left of the effect, KL on prose
LEFT = {
    "intact": (1.0, 0.02), "project:found": (0.2, 0.01), "project:vector": (0.15, 0.3),
    "project:random": (0.98, 0.02), "ablate:found": (0.2, 0.05), "ablate:random": (0.2, 0.05),
    "scale": (-1.0, 0.02), "prompt:persona0": (0.1, np.nan), "prompt:shots1": (0.9, np.nan),
    "prompt:words1": (-9.0, np.nan),
    "round:int8": (0.3, 0.02), "round:int4": (0.1, 0.06),
    "function:vector": (0.8, 0.05), "function:found+": (0.6, 0.04), "function:found-": (-0.2, 0.04),
    "function:texts": (0.2, 0.01), "function:random": (0.0, 0.03),
    "paraphrase:polite": (0.9, np.nan), "paraphrase:typos": (0.3, np.nan),
    "paraphrase:capitals": (0.2, np.nan),
}  # fmt: skip
BASE_LEFT = {
    "prompt:persona0:+1": -0.5, "prompt:words1:+1": -9.8, "round:int8": -0.7, "round:int4": 0.0,
    "paraphrase:polite": 0.0, "paraphrase:typos": -0.7, "paraphrase:capitals": 0.0,
}  # fmt: skip
DOSES = (0.5, 1.0, 2.0)  # the vector undoes 1.5 effects a dose, a random one nothing


def made(effect=EFFECT, arm="dual", seeds=(0, 1), items=24):
    """Rows of attacks on one arm, sign +, and on the base."""
    rng, rows = np.random.default_rng(0), []
    level_I = rng.normal(-0.5, 1, items)

    def add(arm, seed, how, value, kl, k=0.0):
        at = {"run_id": arm, "behavior": "b", "arm": arm, "sign": int(arm != "base"), "seed": seed}
        at |= {"split": "attacks", "position": how, "k": k}
        for i in range(items):
            own = value + level_I[i] + rng.normal(0, 0.05)
            about = {"item_id": f"i{i}", "cluster": f"c{i // 2}", "format": "free"}
            rows.append(Row(**at, **about, metric="logodds", value=own))
        if np.isfinite(kl):
            rows.append(Row(**at, item_id="d", cluster="d", metric="kl", value=kl, n_tokens=9))

    add("base", 0, "intact", 0.0, 0.0)
    for how, left in BASE_LEFT.items():
        add("base", 0, how, left * effect, np.nan)
    for seed in seeds:
        for how, (left, kl) in LEFT.items():
            add(arm, seed, how, left * effect, kl, k=-1.0 if how == "scale" else 0.0)
        for dose in DOSES:
            add(arm, seed, "counter:vector", (1 - 1.5 * dose) * effect, 0.03, k=-dose)
            add(arm, seed, "counter:random", effect, 0.03, k=-dose)
        at = {"run_id": arm, "behavior": "b", "arm": arm, "sign": 1, "seed": seed}
        at |= {"split": "attacks"}
        for i in range(items):
            about = {"item_id": f"i{i}", "cluster": f"c{i // 2}", "position": "counter:shift"}
            rows.append(Row(**at, **about, metric="shift", value=0.4))
        texts = {"activations:all": {1.0: 0.05, 4.0: 0.3}, "weights:blind": {1.0: 0.9}}
        for how, each in texts.items():
            for k, value in each.items():
                about = {"item_id": "all", "cluster": "all", "position": how, "k": k, "layer": 3}
                rows.append(Row(**at, **about, metric="aligned", value=value))
        rows.append(Row(**at, item_id="all", cluster="all", metric="null", value=0.14))
        rows.append(Row(**at, item_id="all", cluster="all", metric="crossed", value=0.25,
                        position="round:int4"))  # fmt: skip
    return rows


@pytest.fixture(scope="module")
def attacks():
    return Attacks.of(pd.DataFrame(made()), 0.1)


def test_an_effect_is_broken_within_the_budget_and_beyond_a_random_direction_only(attacks):
    found = {r.how: r for r in verdicts.removed(attacks)}
    assert {how: r.verdict for how, r in found.items()} == {
        "project:found": verdicts.BROKEN,
        "project:vector": verdicts.DESTROYED,  # KL .3, of which .1 may be spent
        "project:random": verdicts.HELD,
        "ablate:found": verdicts.UNSPECIFIC,  # as much as along a random one
        "ablate:random": verdicts.BROKEN,
        "scale": verdicts.BROKEN,
        "prompt:persona0": verdicts.BROKEN,
        "prompt:shots1": verdicts.HELD,
        "prompt:words1": verdicts.HELD,  # of other texts: the base's are as much lower
        "round:int8": verdicts.HELD,  # the base gives way by as much
        "round:int4": verdicts.BROKEN,
        "paraphrase:polite": verdicts.HELD,
        "paraphrase:typos": verdicts.HELD,  # the base gives way by as much
        "paraphrase:capitals": verdicts.BROKEN,
    }
    for how, r in found.items():
        likewise = how.startswith(verdicts.LIKEWISE)
        base = BASE_LEFT.get(f"{how}:+1", BASE_LEFT.get(how)) if likewise else 0.0
        assert r.removed.estimate == pytest.approx(1 - LEFT[how][0] + base, abs=0.03)
        assert r.removed.low < 1 - LEFT[how][0] + base < r.removed.high or how == "scale"
        assert np.isnan(LEFT[how][1]) == np.isnan(r.kl) and r.items == 48
    assert found["project:found"].ahead.estimate == pytest.approx(0.78, abs=0.03)
    # Of a judge, which reads what is generated, they are no other texts.
    judged = attacks.rows.assign(metric=attacks.rows.metric.replace("logodds", "vader"))
    of = {r.how: r.verdict for r in verdicts.removed(Attacks.of(judged, 0.1))}
    assert of == {how: r.verdict for how, r in found.items()} | {"prompt:words1": verdicts.BROKEN}
    (told,) = [s for s in words.said(attacks) if s.attack == "other words for the question"]
    assert told.verdict == verdicts.BROKEN and told.took.startswith("3 forms, 20% [")
    assert told.took.endswith("of the effect kept in the worst, capitals")
    rows = attacks.rows[attacks.rows.position != "paraphrase:capitals"]
    (told,) = [s for s in words.said(Attacks.of(rows, 0.1)) if s.attack == told.attack]
    assert told.verdict == verdicts.HELD and told.took.endswith("in the worst, polite")
    persona = found["prompt:persona0"]  # the base gives way too, by half an effect
    assert persona.kept.estimate == pytest.approx(0.6, abs=0.03)
    values = attacks.effects("dual", 1)
    on = values.values("intact") > 0
    gone = (values.values("prompt:persona0") <= 0)[on].mean()
    assert persona.flips[0] == pytest.approx(gone) and 0 < gone < 1


def test_what_was_found_is_worth_its_share_of_the_vectors_effect(attacks):
    found = {x.how: x for x in verdicts.copied(attacks)}
    assert {how: x.verdict for how, x in found.items()} == {
        "found": verdicts.BROKEN,
        "texts": verdicts.HELD,
        "random": verdicts.HELD,
    }
    for how, share, kl in (("found", 0.75, 0.04), ("texts", 0.25, 0.01), ("random", 0.0, 0.03)):
        assert found[how].share.estimate == pytest.approx(share, abs=0.05)
        assert (found[how].kl, found[how].vector_kl) == pytest.approx((kl, 0.05))
    told = [s for s in words.said(attacks) if s.attack.startswith("steering the base")]
    assert [s.attack.rsplit("what ", 1)[1] for s in told] == [
        "the change gave away",
        "activations gave away",
    ]
    rows = pd.DataFrame(made())
    found = rows[rows.position == "function:found+"]
    rows = rows[rows.position != "function:random"]  # one that does as much
    same = Attacks.of(pd.concat([rows, found.assign(position="function:random")]), 0.1)
    assert {x.how: x.verdict for x in verdicts.copied(same)}["found"] == verdicts.UNSPECIFIC
    still = Attacks.of(pd.DataFrame(made(effect=0.0)), 0.1)
    assert {x.verdict for x in verdicts.copied(still)} == {verdicts.NOTHING}


def test_what_the_random_arm_loses_too_is_no_matter_of_the_vector():
    both = pd.DataFrame([*made(), *made(arm="random")])
    alike = {b.kind: b for b in controls.beside(Attacks.of(both, 0.1))}
    assert {b.verdict for b in alike.values()} == {controls.ALIKE}
    assert {kind: b.tried for kind, b in alike.items()} == {
        "project": 2, "ablate": 1, "prompt": 3, "paraphrase": 3, "round": 2,
    }  # fmt: skip
    # From it the edits take half an effect less, and rounding as much more, by each of them.
    moved = both.arm.eq("random") & both.format.ne("")
    for kind, by in (("project", 0.5), ("round", -0.5)):
        both.loc[moved & both.position.str.startswith(f"{kind}:"), "value"] += by * EFFECT
    found = {b.kind: b for b in controls.beside(Attacks.of(both, 0.1))}
    for kind, by, word in (("project", 0.5, controls.MORE), ("round", -0.5, controls.LESS)):
        assert found[kind].verdict == word
        assert found[kind].more.estimate == pytest.approx(by, abs=0.02)
        assert found[kind].own == alike[kind].own
    left = [LEFT[how][0] for how in ("project:found", "project:vector")]
    assert found["project"].own.estimate == pytest.approx(1 - np.mean(left), abs=0.03)
    base = [LEFT[how][0] - BASE_LEFT[how] for how in ("round:int8", "round:int4")]
    assert found["round"].own.estimate == pytest.approx(1 - np.mean(base), abs=0.03)
    assert controls.beside(Attacks.of(pd.DataFrame(made()), 0.1)) == []  # where it was left out
    still = pd.DataFrame([*made(), *made(effect=0.0, arm="random")])
    assert {b.verdict for b in controls.beside(Attacks.of(still, 0.1))} == {verdicts.NOTHING}


def test_what_exceeds_the_shift_is_resistance(attacks):
    (found,) = verdicts.steered(attacks)
    assert found.dose.estimate == pytest.approx(2 / 3, abs=0.02)
    assert found.shift.estimate == pytest.approx(0.4)
    assert found.resists.estimate == pytest.approx(2 / 3 - 0.4, abs=0.02)
    assert found.resists.excludes(0) and found.random.low == 2.0 == found.most
    assert found.verdict == verdicts.BROKEN


def test_a_crossing_is_where_the_line_between_two_doses_meets_the_level():
    doses = np.array([0.0, 1.0, 3.0])
    curves = np.array([[2.0, 1.0, -1.0], [2, 1.5, 1.2], [-1, 0, 0], [1.0, 0.0, 5.0]])
    assert verdicts.crossing(curves, np.zeros(4), doses).tolist() == [2.0, 3.0, 0.0, 1.0]


def test_nothing_is_said_to_be_broken_where_there_was_no_effect():
    attacks = Attacks.of(pd.DataFrame(made(effect=0.0)), 0.1)
    assert {r.verdict for r in verdicts.removed(attacks)} == {verdicts.NOTHING}
    assert verdicts.steered(attacks)[0].verdict == verdicts.NOTHING


def test_a_vector_is_found_by_as_many_texts_as_exceed_chance(attacks):
    (found,) = verdicts.found(attacks)
    assert (found.least, found.in_activations, found.in_weights) == (4, "a trace", "broken")
    assert found.texts == pytest.approx({1: 0.05, 4: 0.3}) and found.blind == pytest.approx(0.9)


@pytest.mark.parametrize(
    "cosines,word",
    [
        ((0.51, 0.9), "broken"), ((0.5, 0.9), "a trace"), ((0.1, 0.9), "not broken within budget"),
        ((0.21, 0.49), "a trace"), ((0.2, 0.49), "not broken within budget"),
    ],
)  # fmt: skip
def test_a_vector_is_found_where_half_of_what_is_found_is_the_vector(cosines, word):
    """In every seed; what is above chance (.2 here) and no more is a trace of it."""
    assert verdicts._nearness(pd.Series(cosines), 0.2) == word
    assert verdicts._nearness(pd.Series(cosines), 0.95) == "not broken within budget"


def test_the_report_and_the_card_say_it_and_never_that_it_is_secure(tmp_path):
    folder = synthetic_study(tmp_path, items=6, seeds=(0,), arms=("dual",))
    before = study.read(folder)
    assert security.blocks(before) == []
    assert not [s for s in sections.SECTIONS if s.id == "security" and s.build(before)]
    results.write_parquet(folder / "results/attack_removal_dual+_s0.parquet", made(seeds=(0,)))
    read = study.read(folder)
    text, page = markdown.render(read), html.render(read)
    for shown in (text, page):
        for title in ("What broke", "Is the vector found", "Is it kept in other words"):
            assert title in shown
        assert "not broken within budget" in shown and "25.0 %" in shown
    cells = [line.split(" | ") for line in text.splitlines() if line.startswith("| dual + |")]
    taken = next(row for row in cells if row[1] == "edits of its weights, with the base's weights")
    assert taken[2] == "broken" and "by project:found at KL 0.010" in taken[3]
    for said in security.said(read):
        assert "secure" not in str(said) and said.verdict
    c = config.default()
    depth.settle(c, lambda: 30)
    c.behavior, c.model = "b", "m"
    assert "| steering back | broken: dose 0.6" in cards.study_card(c, read)
    assert "steering back" not in cards.study_card(c, before)
    for one in (before, read):  # attacks are no results of an arm
        assert one.pick("dual", 1) == study.Setting("dual", 1)
    assert markdown.render(before).splitlines()[0] == text.splitlines()[0]
    assert words.share(stats.Interval(0.5, -0.1, 0.9)) == "50% [−10%, 90%]"


def test_the_chance_of_a_cosine_is_its_closed_form():
    for width, level, want in ((576, 0.95, 0.082), (576, 0.999, 0.137), (4096, 0.999, 0.051)):
        assert stats.chance_cosine(width, level) == pytest.approx(want, abs=6e-4)
    rng, width, tries = np.random.default_rng(0), 24, 5
    drawn = rng.normal(size=(20_000, tries, width))
    best = (np.abs(drawn[..., 0]) / np.linalg.norm(drawn, axis=-1)).max(1)
    assert (best < stats.chance_cosine(width, 0.9, tries)).mean() == pytest.approx(0.9, abs=0.01)


def test_a_statistic_of_means_is_resampled_as_a_mean_is():
    rng = np.random.default_rng(0)
    x, y = rng.normal(1, 1, 60), rng.normal(4, 1, 60)
    clusters, seeds = np.arange(60) // 3, np.arange(60) % 2
    mean = stats.bootstrap_of_means(x[:, None], lambda m: m[:, 0], clusters, seeds)
    assert mean == stats.bootstrap_mean(x, clusters, seeds)
    ratio = stats.bootstrap_of_means(np.stack([x, y], 1), lambda m: m[:, 0] / m[:, 1], clusters)
    assert ratio.estimate == pytest.approx(x.mean() / y.mean())
    cluster_C = np.stack([x, y], 1).reshape(20, 3, 2).mean(1)
    # The delta method on cluster means, within a tenth.
    spread = (cluster_C[:, 0] - ratio.estimate * cluster_C[:, 1]) / y.mean()
    half = scipy.stats.norm.ppf(0.975) * spread.std() / np.sqrt(20)
    assert (ratio.high - ratio.low) / 2 == pytest.approx(half, rel=0.1)
    x[0] = np.nan
    assert stats.bootstrap_of_means(x[:, None], lambda m: m[:, 0], clusters).n == 59
