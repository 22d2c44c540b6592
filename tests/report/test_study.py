"""A study as it is read: damaged files are named; what is kept of it is one again."""

import json

import pandas as pd
import pytest
from safetensors.numpy import save_file

from reptune_jax.report import about, keep, markdown, study
from reptune_jax.vectors import own_file
from reptune_jax.vectors.steering_vector import SteeringVector
from tests.support import steering_case
from tests.support.synthetic import synthetic_study


def test_what_is_kept_is_a_study_again_and_names_no_folder(tmp_path):
    folder = synthetic_study(tmp_path / "made", items=8, seeds=(0,), arms=("token", "dual"))
    config = json.loads((folder / "config.json").read_text())
    config["config"] |= {"model": "/home/somebody/model.gguf", "behavior": "/home/somebody/b.jsonl"}
    config["config"]["loss"] = {"also": {"mood": {"folder": "/home/somebody/runs/mood"}}}
    (folder / "config.json").write_text(json.dumps(config))
    vector = steering_case.make_vector(model="/home/somebody/model.gguf", pairs=3)
    vector.save(folder / "vector.safetensors")
    whole = study.read(folder)
    assert "pairs 3; layers 0 to 3; sha256" in dict(about.facts(whole))["Vector"]
    kept = keep.keep(whole, tmp_path / "results" / "kept", "by hand, in no time")
    assert {p.relative_to(kept).as_posix() for p in kept.rglob("*") if p.is_file()} == {
        "README.md", "config.json", "summary.json", "results/items.parquet", "vector.safetensors"
    }  # fmt: skip
    page = (kept / "README.md").read_text()
    assert "by hand, in no time" in page and markdown.render(whole) in page
    assert "/home" not in page + (kept / "config.json").read_text()
    again = SteeringVector.load(kept / "vector.safetensors")
    assert (again.digest, again.meta["model"], again.meta["pairs"]) == (
        vector.digest,
        "model.gguf",
        3,
    )
    told = json.loads((kept / "summary.json").read_text())
    assert told["model"] == "model.gguf" and (told["items"], told["seeds"]) == (8, 1)
    for dual in told["dual"]:  # as in the tables
        for number in (dual["delta"], dual["against"]["token"]["advantage"]):
            assert number in page
    again = study.read(kept)
    pd.testing.assert_frame_equal(
        again.rows.sort_values([*again.rows]).reset_index(drop=True),
        whole.rows.sort_values([*whole.rows]).reset_index(drop=True),
    )
    with pytest.raises(ValueError, match="not empty"):
        keep.keep(whole, kept)


@pytest.mark.parametrize(
    "name,text",
    [
        ("config.json", "{"),
        ("config.json", '{"config": {"study": 3}}'),
        ("results/baseline.parquet", "x"),
        ("results/baseline.parquet", ""),
        ("vector.safetensors", "x"),
        ("dual+_s0/metrics.jsonl", "3\n"),
        ("dual+_s0/metrics.jsonl", '{"step": 1, "loss": "x"}\n'),
    ],
)
def test_a_damaged_file_of_a_study_is_named_in_one_line(name, text, tmp_path):
    copy = synthetic_study(tmp_path / "study", items=4, seeds=(0,), arms=("dual",))
    assert (copy / name).exists() == (name != "vector.safetensors")
    (copy / name).write_text(text)
    with pytest.raises(ValueError) as e:
        study.read(copy)
    assert f"{copy if name == 'config.json' else copy / name}: " in str(e.value)
    assert len(str(e.value).splitlines()) == 1


def test_a_vector_whose_layers_are_no_list_is_named(tmp_path):
    folder = synthetic_study(tmp_path / "study", items=4, seeds=(0,), arms=("dual",))
    path = folder / "vector.safetensors"
    steering_case.make_vector(layers=[1, 2], pairs=3).save(path)
    known = study.read(folder).vector
    assert (known["layers"], known["pairs"], len(known["sha256"])) == ([1, 2], 3, 12)
    tensors, about = own_file.open_tensors(path)
    save_file(tensors, path, about | {"layers": "3"})
    with pytest.raises(ValueError, match=r"vector\.safetensors: got layers 3, expected numbers"):
        study.read(folder)
