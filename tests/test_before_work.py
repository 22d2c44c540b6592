"""What can be known beforehand is said before the model is loaded, and leaves no claim."""

import json

import pytest

from reptune_jax import lm, study, train
from reptune_jax.evals import baseline
from tests.support import tiny, tiny_behavior


def edited(path, change):
    """The behavior file with every row changed, or left out where that gives None."""
    rows = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row is not None))
    return path


def without(**of):
    return lambda row: None if all(row.get(k) == v for k, v in of.items()) else row


def measured(*measures):
    return lambda row: row | {"measures": list(measures)} if "measures" in row else row


KEYS = {
    "loss.position": ({"loss__position": "before_answer"}, r"loss\.position: got 'before_answer'"),
    "vector.project_out": (
        {"vector__project_out": "letter"},
        r"project_out: got 'letter', .*open prompts, which have none",
    ),
    "study.primary": (
        {"study__primary": "logodds:claim"},
        r"study\.primary: got 'logodds:claim'.*logodds:free",
    ),
    "study.export": ({"study__export": "vector"}, r"study\.export: got 'vector'"),
}
FILES = {
    "one persona": (without(format="persona", label=0), "persona cluster .*got labels"),
    "nothing to tune on": (without(split="tune"), "no open prompts in split 'tune', only in train"),
    "no validation": (without(split="val"), "no open prompts in split 'val'.*for validation"),
    "no measure": (measured("cheer:free"), "measure: got 'cheer:free', expected one of"),
    "no items of it": (measured("logodds:ab"), "measures: got 'logodds:ab'.*format free"),
}


@pytest.mark.parametrize("name", KEYS)
def test_a_value_that_does_not_fit_the_behavior(tmp_path, name):
    changes, message = KEYS[name]
    c = tiny_behavior.settings("no/such-model", tiny_behavior.write(tmp_path), **changes)
    with pytest.raises(ValueError, match=message):
        study.run(c, tmp_path / "study")
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("name", FILES)
def test_a_behavior_that_lacks_what_a_study_needs(tmp_path, name):
    change, message = FILES[name]
    c = tiny_behavior.settings("no/such-model", edited(tiny_behavior.write(tmp_path), change))
    with pytest.raises(ValueError, match=message):
        study.run(c, tmp_path / "study")
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__layers": (2, 5)}, r"train\.layers: got \(2, 5\), expected layers of .*has 4"),
        ({"loss__layers": (4, 6)}, r"loss\.layers: got \(4, 6\)"),
        ({"steer__layers": (1, 4)}, r"steer\.layers: got \(1, 4\)"),
        ({"targets__layers": (9,), "targets__dose": 1.0}, r"targets\.layers: got \(9,\)"),
    ],
)
@pytest.mark.parametrize("run", [study.run, train.run, baseline.run])
def test_layers_that_the_model_has_not(tmp_path, monkeypatch, run, changes, message):
    tiny.make_llama(tmp_path / "model")
    monkeypatch.setattr(lm, "load", lambda *_: pytest.fail("the weights were read"))
    behavior = tiny_behavior.write(tmp_path)
    c = tiny_behavior.settings(tmp_path / "model", behavior, **changes)
    with pytest.raises(ValueError, match=message):
        run(c, tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_a_first_start_that_fails_claims_nothing(tmp_path, monkeypatch):
    tiny_behavior.patch_neutral(monkeypatch)
    behavior = tiny_behavior.write(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        train.run(tiny_behavior.settings(tmp_path / "no_modle", behavior), tmp_path / "study")
    assert not (tmp_path / "study").exists()
    tiny.make_llama(tmp_path / "model")
    c = tiny_behavior.settings(tmp_path / "model", behavior, train__steps=1)
    assert (train.run(c, tmp_path / "study") / "done.json").exists()


def test_doubts_about_a_behaviors_texts_are_one_line(tmp_path, capsys):
    again = {"messages": [{"role": "user", "content": "Tell me of the weather, please, today."}]}
    path = edited(
        tiny_behavior.write(tmp_path, "doubtful"),
        lambda row: row | again if row.get("id") in ("train0", "test0") else row,
    )
    c = tiny_behavior.settings("no/such-model", path)
    with pytest.raises(ValueError, match="model: 'no/such-model'"):
        study.run(c, tmp_path / "study")
    said = [line for line in capsys.readouterr().out.splitlines() if "doubts" in line]
    assert len(said) == 1 and "behavior doubtful: " in said[0] and "test0" in said[0]
