"""A study that grows: what was made for fewer runs, or at another KL, is made again with them."""

from types import SimpleNamespace

import pytest

from reptune_jax import config
from reptune_jax.evals import baseline, dial, results, steering
from reptune_jax.evals.results import Row, to_make
from reptune_jax.folder import RunName, Study

BASE = Row(
    run_id="r", behavior="sentiment", arm="base", sign=0, seed=0, split="test", item_id="i1",
    cluster="c1", metric="logodds", value=0.25,
)  # fmt: skip


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A folder, and the calls of what measures: nothing is."""
    made = []
    fake = lambda *given: made.append(given[2:5]) or []  # noqa: E731
    monkeypatch.setattr(dial, "measure", fake)
    monkeypatch.setattr(steering, "measure", fake)
    monkeypatch.setattr(baseline, "best_prompt", lambda bench, sign: made.append(sign))
    monkeypatch.setattr(baseline, "has_personas", lambda items: True)
    monkeypatch.setattr(dial, "check", lambda c, study: None)
    monkeypatch.setattr(dial, "dual_kl", lambda bench, study, sign: 0.02)
    return Study(tmp_path), made


def tuned(study, seed):
    """A tuned dual run's results."""
    about = {"run_id": "r", "behavior": "b", "arm": "dual", "sign": 1, "split": "neutral"}
    row = Row(**about, seed=seed, item_id="d", cluster="d", metric="kl", value=0.1, n_tokens=10)
    run = study.run(RunName("dual", 1, seed))
    run.checkpoints.mkdir(parents=True)
    results.write_parquet(run.results, [row])


def settings(**study):
    c = config.default()
    c.study.update(study)
    return c


def test_lists_may_grow_and_other_values_have_to_be_the_same(tmp_path, capsys):
    path = tmp_path / "a.parquet"
    made_for = to_make(path, {"seeds": [1, 0], "kl": 0.5})
    assert made_for == {"seeds": [0, 1], "kl": 0.5}
    results.write_parquet(path, [BASE], made_for)
    assert to_make(path, {"seeds": [1], "kl": 0.5}) is None  # it has more
    assert "already there" in capsys.readouterr().out
    assert to_make(path, {"seeds": [2], "kl": 0.5}) == {"seeds": [0, 1, 2], "kl": 0.5}
    assert "seeds were [0, 1], are [0, 1, 2]" in capsys.readouterr().out
    assert to_make(path, {"seeds": [1], "kl": 0.4}) == {"seeds": [0, 1], "kl": 0.4}
    results.write_parquet(path, [BASE])
    assert to_make(path, {"seeds": [2], "kl": 0.5}) is None
    assert "does not say of which runs" in capsys.readouterr().out


def test_scaled_weights_and_steering_follow_the_seeds_and_the_kl_of_dual(study):
    folder, made = study
    c = settings(arms=("base", "steer", "token", "dual", "weights"), seeds=(0,), signs=(1,))

    def run():
        made.clear()
        dial.run(c, folder.path, bench=SimpleNamespace())
        steering.run(c, folder.path, bench=SimpleNamespace())
        return list(made)

    tuned(folder, 0)
    assert run() == [("weights", 1, [0]), ([1], [])]
    assert run() == []
    c.study.seeds = (0, 1)
    tuned(folder, 1)  # which changes what is compared at equal KL
    assert run() == [("weights", 1, [0, 1]), ([1], [])]
    c.study.seeds = (1,)
    assert run() == []  # nothing is lost where fewer are asked for
    c.study.signs, c.study.arms = (1, -1), (*c.study.arms, "bake")
    assert run() == [("weights", -1, [0, 1]), ("weights", 1, [0, 1]), ([-1, 1], [-1, 1])]


def test_the_prompt_arm_and_its_other_sign_may_come_later(study):
    folder, made = study
    bench = SimpleNamespace(
        rows=lambda cond: [BASE] if cond else [], judge_rows=lambda cond: [], base=None,
        behavior=SimpleNamespace(items=(), name="b"),
    )  # fmt: skip
    for arms, signs, asked in (
        (("base",), (1,), []),
        (("base", "prompt"), (1,), [1]),
        (("base", "prompt"), (1, -1), [-1, 1]),
        (("base",), (1, -1), []),
    ):
        made.clear()
        baseline.run(settings(arms=arms, signs=signs), folder.path, bench)
        assert made == asked
