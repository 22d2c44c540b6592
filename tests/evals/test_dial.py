"""Which runs a contrast of two signs is made of."""

from types import SimpleNamespace

import pytest

from reptune_jax import config, study
from reptune_jax.evals import arms, dial
from reptune_jax.folder import RunName, Study


@pytest.mark.parametrize("arm,of", [("weights", "token"), ("contrast", "dual")])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_contrast_is_made_of_the_two_signs_of_its_arm(arm, of, sign, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(arms, "contrasted", lambda *given: asked.append(given))
    dial._condition(SimpleNamespace(base="base"), Study(tmp_path), arm, sign, 3, 1.5)
    runs = [tmp_path / f"{of}{side}_s3" for side in ("+-" if sign > 0 else "-+")]
    assert asked == [(arm, "base", *runs, 1.5)]


@pytest.mark.parametrize("arm,of", [("weights", "token"), ("contrast", "dual")])
def test_a_study_without_those_runs_is_refused_before_any_work(arm, of, tmp_path):
    c = config.default()
    c.study.export, c.study.arms = "", ("base", arm)
    with pytest.raises(ValueError, match=f"'{arm}' .* expected {of} too"):
        study.run(c, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("sign", [1, -1])
def test_a_study_of_one_side_trains_the_other_of_what_a_contrast_is_made_of(
    sign, tmp_path, monkeypatch
):
    c = config.default()
    c.study.arms, c.study.signs, c.study.export = ("base", "weights", "token", "dual"), (sign,), ""
    done = {"trained": [], "evaluated": []}

    def noting(what):
        return lambda one, *_: done[what].append(str(RunName.of(one)))

    monkeypatch.setattr(study, "prepare", lambda *_: SimpleNamespace(base=None))
    monkeypatch.setattr(study.baseline, "run", lambda *_: None)
    monkeypatch.setattr(study.train, "run", noting("trained"))
    monkeypatch.setattr(study.tuned, "run", noting("evaluated"))
    monkeypatch.setattr(study.dial, "run", lambda *_: None)
    monkeypatch.setattr(study.studies, "read", lambda *_: None)
    monkeypatch.setattr(study.html, "write", lambda _: None)
    monkeypatch.setattr(study.outcomes, "headline", lambda _: [])
    study.run(c, tmp_path)
    mark, other = "+-" if sign > 0 else "-+"
    assert done["trained"] == [f"token{mark}_s0", f"token{other}_s0", f"dual{mark}_s0"]
    assert done["evaluated"] == [f"token{mark}_s0", f"dual{mark}_s0"]
