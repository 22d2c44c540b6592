"""Which runs a contrast of two signs is made of."""

from types import SimpleNamespace

import pytest

from reptune_jax import config, study
from reptune_jax.evals import arms, dial
from reptune_jax.folder import Study


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
    c.study.export = ""
    for arms_, signs in ((("base", arm), (1, -1)), (("base", of, arm), (1,))):
        c.study.arms, c.study.signs = arms_, signs
        with pytest.raises(ValueError, match=f"'{arm}' .* expected {of} and both signs"):
            study.run(c, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
