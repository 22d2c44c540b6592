"""The search for how to steer: doses that spend a budget, what can be chosen, what is written."""

import json
import math
import runpy

import jax
import pytest

from reptune_jax import config, depth, ranges, select
from reptune_jax.data.behavior import Behavior
from reptune_jax.evals.bench import Bench
from reptune_jax.evals.results import Row
from reptune_jax.select import Point, Search, Setting
from tests.support import tiny, tiny_behavior

HERE = Setting("mean_diff", "response", 2)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    jax.config.update("jax_disable_most_optimizations", True)  # compiling is nearly all of the time
    with pytest.MonkeyPatch.context() as patch:
        tiny_behavior.patch_neutral(patch)
        folder = tmp_path_factory.mktemp("select")
        yield tiny_behavior.settings(
            tiny.make_llama(folder / "model"),
            tiny_behavior.write(folder),
            study__primary="logodds:free",
            study__arms=("base", "steer", "bake"),
            select__methods=("mean_diff", "pca_center"),
            select__layers=("1", "0.5"),
            select__widths=(1, 2),
            select__operations=("add", "rotate"),
            select__tokens=("all", "generated"),
            select__shares=(1.0,),
            select__keep=1,
            select__max_kl=0.5,
            select__broken=1.0,
        )
    jax.config.update("jax_disable_most_optimizations", False)


def spender(kl_of, budget, operation="add"):
    """A search whose KL is a function of the dose, and the doses that it asked for."""
    asked = []

    class Told(Search):
        def __init__(self, c):
            self.c = c

        def _first_dose(self, setting):
            return 1.0

        def _measured(self, setting, dose, what):
            asked.append(dose)
            return [kl_of(dose)]

    c = config.default()
    c.select.max_kl = budget
    return Told(c).largest_dose(HERE._replace(operation=operation)), asked


@pytest.mark.parametrize("scale", [1e-6, 0.003, 0.1, 40.0])
@pytest.mark.parametrize("power", [1.5, 2.0, 3.0])
def test_a_dose_spends_the_budget_and_no_more(scale, power):
    dose, asked = spender(lambda d: scale * d**power, 0.1)
    reachable = scale > 1e-3  # in six tries, each at most four times the last
    assert scale * dose**power <= 0.1 and len(asked) <= 6
    if reachable:
        assert scale * dose**power >= 0.8 * 0.1


def test_a_dose_ends_where_its_operation_does_and_where_numbers_are_not_finite():
    assert spender(lambda d: 1e-4 * d, 0.1, "ablate")[0] == 1.0
    assert spender(lambda d: 0.0, 0.1)[0] == 1020.0  # four times each, to three digits
    assert 0 < spender(lambda d: math.nan if d > 0.3 else 1e-3 * d, 0.1)[0] <= 0.3
    assert spender(lambda d: 0.2 + d, 0.1)[0] == 0.0  # clamping may cost too much at any dose


def test_what_fails_is_not_chosen_however_large_its_gain():
    search = object.__new__(Search)

    search.c = config.default()
    points = [
        Point(HERE, 1.0, 0.2, 9.0, 0.0),  # over the budget of .1
        Point(HERE, 2.0, 0.05, 8.0, 0.3),  # no text
        Point(HERE, 3.0, 0.05, math.nan, 0.0),
        Point(HERE, 4.0, 0.09, 0.2, 0.0),
        Point(HERE, 5.0, 0.01, 0.3, 0.1),
        Point(HERE, 6.0, 0.01, -1.0, 0.0),
        Point(HERE, 0.0, math.nan),
        Point(HERE, 8.0, 0.02, 0.3, 0.1),
    ]
    assert [p.dose for p in search.ranked(points)[:3]] == [5, 8, 4]
    problems = [p.problem(0.1, 0.1) for p in points]
    assert problems == [
        "over the KL budget", "empty or repeating answers", "not finite", "", "",
        "not moved as asked", "over the KL budget", "",
    ]  # fmt: skip


def test_an_answer_is_broken_where_it_says_nothing_or_repeats_itself():
    def rows(item, text, rep4):
        about = {"run_id": "", "behavior": "", "arm": "steer", "sign": 1, "seed": 0}
        about |= {"split": "val", "item_id": item, "cluster": item}
        return [
            Row(**about, metric="rep4", value=rep4),
            Row(**about, metric="vader", value=0.0, text=text),
        ]

    found = [*rows("a", "Fine.", 0.0), *rows("b", "  ", 0.0), *rows("c", "no " * 9, 0.9)]
    assert select.broken(found) == pytest.approx(2 / 3)
    assert select.broken([]) == 0.0


def test_depths_are_of_the_model_and_layers_are_in_it(settings):
    c = settings.copy_and_resolve_references()
    for wrong in ("2", "-1", "1.5", "half", "0.5x"):
        with pytest.raises(ValueError, match=f"select.layers: got {wrong}, expected layers"):
            depth.numbers("select.layers", (wrong,), 2, "m")
    asked = ("0.3", ".5", "0.8", "1.0", "7")
    assert depth.numbers("select.layers", asked, 30, "m") == [7, 9, 15, 24, 29]
    assert depth.numbers("select.layers", asked[:4], 4, "m") == [1, 2, 3]
    c.select.widths, c.select.tokens = (1, 4), ("all",)
    found = select.further(c, [HERE], 4)
    assert {(one.layer, one.width) for one in found} == {(2, 1)}  # 1 to 4 are not all there
    assert {(one.layer, one.width) for one in select.further(c, [HERE], 8)} == {(2, 1), (1, 4)}


def test_the_search_writes_the_config_of_its_best_point_and_goes_on_where_it_was(
    settings, tmp_path, monkeypatch, capsys
):
    effect, chosen_from, untuned, splits = Bench.effect, Behavior.select, [], set()

    def distance(bench, rows):
        """A model of random weights has no behavior to gain: here it is to leave the base."""
        now = effect(bench, rows)
        untuned[:] = untuned or [now]  # the first one asked for is the base's
        return abs(now - untuned[0]) + (now != untuned[0])

    def told(behavior, *args, **named):
        splits.update(args[:1])
        return chosen_from(behavior, *args, **named)

    monkeypatch.setattr(Bench, "effect", distance)
    monkeypatch.setattr(Behavior, "select", told)
    path = select.run(settings, tmp_path)
    assert splits == {"train", "val"}
    out = capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "selection.jsonl").read_text().splitlines()]
    ways = {tuple(row["steered"][:6]) for row in lines if row["steered"]}
    first = {(m, "response", l, 1, "add", "all") for m in settings.select.methods for l in (1, 2)}
    assert first < ways and len(ways) == 4 + 7  # the best one's other operations, rules, widths
    within = [r["found"][0] for r in lines if r["what"] == "kl" and r["found"][0] <= 0.5]
    assert len(within) >= 11

    c = ranges.check(runpy.run_path(str(path))["get_config"]())
    assert (c.model, c.behavior) == (settings.model, settings.behavior)
    assert c.steer.max_kl == 0.5 and len(c.steer.layers) == 1 and c.steer.doses[1] > 0
    constant = (c.steer.operation, c.steer.tokens) == ("add", "all")
    assert ("bake" in c.study.arms) == constant
    best = out.split("chosen: ")[1]
    assert f"{c.steer.operation} at {c.steer.tokens}  dose {c.steer.doses[1]:g}" in best
    assert best.startswith(c.vector.method) and "Chosen on validation" in path.read_text()

    text, kept = path.read_text(), (tmp_path / "selection.jsonl").read_bytes()
    path.unlink()
    for what in ("_kl", "_behavior"):
        monkeypatch.setattr(Search, what, lambda *_: pytest.fail("measured again"))
    assert select.run(settings, tmp_path).read_text() == text
    assert (tmp_path / "selection.jsonl").read_bytes() == kept

    path.unlink()
    (tmp_path / "selection.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"selection.jsonl: it is not what .*Move it away"):
        select.run(settings, tmp_path)
    assert not path.exists()
