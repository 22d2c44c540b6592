"""Whose a folder is, and what is called what in it."""

import json

import pytest

from reptune_jax import config, ranges, roles
from reptune_jax.folder import Run, RunName, Study
from tests.support import tiny


def settings(**changes):
    c = config.default()
    c.model = "model"
    c.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return ranges.check(c)


def test_a_workdir_belongs_to_one_config(tmp_path):
    folder = Run(tmp_path / "a" / "b")
    folder.claim(settings())
    (folder.checkpoints / "1").mkdir(parents=True)
    stored = json.loads(folder.config.read_text())
    assert (
        stored["config"]["train"]["layers"] == ["0.33", "0.67"] and "chat" not in stored["config"]
    )
    assert {"jax", "orbax-checkpoint"} <= stored["versions"].keys() and stored["device"]
    before = folder.config.read_bytes()
    folder.claim(settings())
    with pytest.raises(ValueError) as e:
        folder.claim(settings(train__lr=0.5, model="other"))
    assert "model: 'model' there, 'other' now" in str(e.value)
    assert "train.lr: 0.0003 there, 0.5 now" in str(e.value) and "seed" not in str(e.value)
    assert folder.config.read_bytes() == before


def test_what_may_change_between_two_starts_does(tmp_path):
    Run(tmp_path).claim(settings())
    passing = {"mesh__fsdp": 2, "train__save_every": 7, "chat__layer": 3, "study__seeds": (4,)}
    Run(tmp_path).claim(settings(**passing))
    assert set(roles.keys_of("passing")) >= {"mesh", "train.save_every", "train.profile"}


def test_a_folder_that_is_older_than_a_key_is_still_its_configs(tmp_path):
    folder = Run(tmp_path)
    folder.claim(settings())
    (folder.checkpoints / "1").mkdir(parents=True)
    stored = json.loads(folder.config.read_text())
    del stored["config"]["train"]["lora"]
    folder.config.write_text(json.dumps(stored))
    folder.claim(settings())
    with pytest.raises(ValueError, match=r"train.lora.rank: 0 there, 8 now"):
        folder.claim(settings(train__lora__rank=8))


def test_a_models_folder_is_no_workdir(tmp_path):
    tiny.make_llama(tmp_path)
    with pytest.raises(ValueError, match=r"holds a config.json that is not a run's"):
        Study(tmp_path).claim(settings())


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"config": 3}', '{"config": {"train": {"lora": 4}}}', "[" * 10**5],
)
def test_a_damaged_config_is_named(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"workdir .*: holds a config.json that is not a run's"):
        Study(tmp_path).claim(settings())


def test_a_study_is_shared_by_its_runs_and_may_grow(tmp_path):
    study = Study(tmp_path)
    study.claim(settings())
    study.run("dual+_s0").checkpoints.mkdir(parents=True)
    study.claim(settings(arm="token", sign=-1, seed=3, study__seeds=(1,)))
    with pytest.raises(ValueError, match=r"train.steps: 40 there, 80 now"):
        study.claim(settings(train__steps=80))


def test_a_runs_name_is_made_and_read_in_one_place(tmp_path):
    names = [RunName.of(settings(arm=a, sign=s)) for a in ("dual", "out") for s in (1, -1)]
    assert [*map(str, names)] == ["dual+_s0", "dual-_s0", "out+_s0", "out-_s0"]
    assert [RunName.parse(str(name)) for name in names] == names
    assert RunName.parse("report") is None and RunName.parse("dual_s0") is None
    assert Study(tmp_path).run(names[1]).results == tmp_path / "dual-_s0/results/tuned.parquet"


def test_a_key_that_nothing_there_depends_on_may_change(tmp_path, capsys):
    study = Study(tmp_path)
    study.claim(settings())
    study.claim(settings(vector__pairs=5))  # nothing is there yet
    study.vector.write_bytes(b"the vector")
    study.check(settings(vector__pairs=5, train__lr=0.5))
    study.claim(settings(vector__pairs=5, train__lr=0.5, loss__layers=(1, 2)))
    assert (
        "train.lr: 0.0003 there, 0.5 now. Nothing that is there depends" in capsys.readouterr().out
    )
    stored = json.loads(study.config.read_text())["config"]
    assert (stored["train"]["lr"], stored["vector"]["pairs"]) == (0.5, 5)
    for changes in ({"vector__pairs": 6}, {"model": "other"}, {"targets__dose": 1.0}):
        with pytest.raises(ValueError, match=r"holds a run of another config"):
            study.check(settings(**{"vector__pairs": 5, **changes}))


def test_once_there_are_results_a_new_folder_is_needed_but_no_new_vector(tmp_path):
    study = Study(tmp_path)
    study.claim(settings())
    study.baseline.parent.mkdir()
    study.baseline.touch()
    with pytest.raises(
        ValueError, match=r"train.lr: .*vector.safetensors and targets.jsonl do not"
    ):
        study.claim(settings(train__lr=0.5))
    with pytest.raises(ValueError, match=r"vector.pairs: [^.]*\. Use another --workdir.*resume\.$"):
        study.claim(settings(vector__pairs=5))
    assert json.loads(study.config.read_text())["config"]["train"]["lr"] == 3e-4
