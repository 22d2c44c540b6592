"""The search for a recipe: what can be chosen, what is chosen, what is written."""

import runpy

import pytest

from reptune_jax import ranges, recipe, train
from reptune_jax.evals.bench import Bench
from reptune_jax.folder import Study
from reptune_jax.recipe import Outcome, Trial
from tests.support import tiny, tiny_behavior


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        tiny_behavior.patch_neutral(patch)
        folder = tmp_path_factory.mktemp("recipe")
        yield tiny_behavior.settings(
            tiny.make_llama(folder / "model"),
            tiny_behavior.write(folder),
            train__measure_every=0,
            study__primary="logodds:free",
            search__lr=(1e-4, 3e-3),
            search__cosine=(1.0,),
            search__modules=("attn/v+attn/o",),
            search__layers=("1-3",),
            search__steps=(2, 3),
            search__keep=0.5,
            search__max_kl=5.0,
        )


def test_what_fails_is_not_chosen_however_large_its_gain():
    def trial(lr):
        return Trial(lr, 1.0, "attn/v", (1, 3))

    found = {
        trial(1): Outcome(9.0, 0.5, 0.0),  # over the budget
        trial(2): Outcome(8.0, 0.01, 0.4),  # loops
        trial(3): Outcome(float("nan"), 0.01, 0.0),
        trial(4): Outcome(0.2, 0.01, 0.0),
        trial(5): Outcome(0.3, 0.02, 0.1),
        trial(6): Outcome(-1.0, 0.001, 0.0),
    }
    order = recipe.ranked(found, max_kl=0.02)
    assert [t.lr for t in order[:2]] == [5, 4]
    problems = [found[trial(lr)].problem(0.02) for lr in range(1, 7)]
    assert problems == [
        "over the KL budget", "repeats itself", "not finite", "", "", "not moved as asked"
    ]  # fmt: skip


def test_the_layers_searched_fit_the_models_depth(settings):
    c = settings.copy_and_resolve_references()
    c.train.layers = (10, 20)
    assert {t.layers for t in recipe.combinations(c, [], 30)} == {(10, 20)}
    assert {t.layers for t in recipe.combinations(c, [], 24)} == {(10, 20), (8, 16)}
    assert {t.layers for t in recipe.combinations(c, [], 12)} == {(4, 8)}
    with pytest.raises(ValueError, match=r"search.layers: got 20-10, expected first-stop"):
        recipe.spans(["20-10"])


def test_what_the_written_config_could_not_hold_is_refused_before_anything(settings, tmp_path):
    c = settings.copy_and_resolve_references()
    c.train.lr_by_path = {"attn/v": 1e-4}
    with pytest.raises(ValueError, match=r"1 rates of train.lr_by_path, expected .* one rate"):
        recipe.run(c, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_halving_trains_the_better_half_longer_and_writes_its_config(
    settings, tmp_path, monkeypatch, capsys
):
    effect, untuned = Bench.effect, []

    def distance(bench, rows):
        """A model of random weights has no behavior to gain: here it is to leave the base."""
        now = effect(bench, rows)
        untuned[:] = untuned or [now]  # the first one asked for is the base's
        return abs(now - untuned[0])

    monkeypatch.setattr(Bench, "effect", distance)
    path = recipe.run(settings, tmp_path)
    trials = {folder.name for folder in (tmp_path / "trials").iterdir()}
    assert len(trials) == 3 and sum(name.endswith("_3_steps") for name in trials) == 1
    chosen = ranges.check(runpy.run_path(str(path))["get_config"]())
    (longest,) = (name for name in trials if name.endswith("_3_steps"))
    assert f"lr_{chosen.train.lr:g}_" in longest and chosen.train.steps == 3
    assert chosen.train.modules == ("attn/v", "attn/o") and chosen.model == settings.model
    done = {f.parent.name: f.read_text() for f in (tmp_path / "trials").glob("*/outcome.json")}
    assert done.keys() == trials
    vectors = {(tmp_path / "trials" / t / "vector.safetensors").read_bytes() for t in trials}
    assert vectors == {Study(tmp_path).vector.read_bytes()}

    path.unlink()
    monkeypatch.setattr(train, "run", lambda *_: pytest.fail("a trial that is done ran again"))
    assert recipe.run(settings, tmp_path).exists()
    assert capsys.readouterr().out.count("gain") >= 2 * 3

    settings = settings.copy_and_resolve_references()
    settings.search.max_kl, settings.search.steps = 1e-12, (2,)
    path.unlink()
    with pytest.raises(ValueError, match=r"search: the best of 2 trials, .*is over the KL budget"):
        recipe.run(settings, tmp_path)
    assert not path.exists()
    settings.loss.retain = 9.0
    with pytest.raises(ValueError, match=r"trials/.*holds a run of another config: loss.retain"):
        recipe.run(settings, tmp_path)
