"""Where two sources disagree: the right one is read, it is said, and verify sees the bytes."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

import reptune_jax as rt
from reptune_jax import convert
from reptune_jax.hub import safetensors_io, settle, source, stored
from reptune_jax.hub.source import open_source
from reptune_jax.model import families
from tests.support import lora_case, tiny
from tests.support import torch_reference as ref
from tests.support.folders import edit_config, rewrite, tensors

IDS = np.random.default_rng(0).integers(4, tiny.VOCAB, (2, 24))
V_PROJ, HEAD, EMBED = (
    "model.layers.1.self_attn.v_proj.weight",
    "lm_head.weight",
    "model.embed_tokens.weight",
)


def logits(folder):
    return np.asarray(rt.load(str(folder)).forward(IDS.astype(np.int32)).logits_BxTxV)


def transformers_logits(folder):
    hf = ref.load(folder)
    with torch.no_grad():
        return ref.logits(hf, torch.tensor(IDS), torch.ones(IDS.shape).long()).numpy()


def assert_close(got, want):
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def shard(folder):
    """In shards; the files' names."""
    hf = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    hf.save_pretrained(folder, max_shard_size="150KB")
    return json.loads((folder / safetensors_io.INDEX).read_text())["weight_map"]


def leftover(folder):
    """An older v_proj in the last shard: transformers and a plain update take that one."""
    weight_map = shard(folder)
    last = sorted(set(weight_map.values()))[-1]
    assert weight_map[V_PROJ] != last
    found = load_file(folder / last)
    found[V_PROJ] = np.zeros((32, 64), np.float32)
    save_file(found, folder / last, metadata={"format": "pt"})


def stale_index(folder):
    """Shards of an earlier save beside a whole file."""
    whole = (folder / "model.safetensors").read_bytes()
    for path in {folder / file for file in shard(folder).values()}:
        old = {name: 0 * array for name, array in load_file(path).items()}
        save_file(old, path, metadata={"format": "pt"})
    (folder / "model.safetensors").write_bytes(whole)


def tied(folder):
    edit_config(folder, tie_word_embeddings=True)


def two_ropes(folder):
    edit_config(folder, rope_scaling=dict(tiny.LINEAR_ROPE))


KINDS = {"leftover": leftover, "stale_index": stale_index, "tied": tied, "two_ropes": two_ropes}
NOTES = {
    "leftover": f"{V_PROJ} is in model-",
    "stale_index": "holds model.safetensors and model.safetensors.index.json, two sources",
    "tied": f"{HEAD} and {EMBED} are stored and differ; reading both",
    "two_ropes": "disagree; reading rope_scaling, as transformers does",
}


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return tiny.make_llama(tmp_path_factory.mktemp("clean"))


@pytest.fixture
def made(clean, tmp_path):
    def make(kind):
        folder = tmp_path / "in"
        shutil.copytree(clean, folder)
        KINDS[kind](folder)
        return folder

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_the_right_one_is_read_and_said_once(kind, made, clean, capsys):
    folder = made(kind)
    got = logits(folder)
    if kind == "leftover":  # here transformers takes the leftover: the index is right
        assert_close(got, transformers_logits(clean))
        assert np.abs(got - transformers_logits(folder)).max() > 0.1
    else:
        assert_close(got, transformers_logits(folder))
    assert (kind == "two_ropes") == (np.abs(got - logits(clean)).max() > 0.01)
    assert capsys.readouterr().out.count(NOTES[kind]) == 1


@pytest.mark.parametrize("format", ["hf", "orbax"])
@pytest.mark.parametrize("kind", KINDS)
def test_verify_passes_and_the_result_says_the_same_alone(kind, format, made, tmp_path):
    folder = made(kind)
    out = convert.run(str(folder), str(tmp_path / "out"), format, verify=True)
    want = logits(folder)
    shutil.rmtree(folder)
    np.testing.assert_array_equal(logits(out), want)
    if format == "hf":
        assert_close(transformers_logits(out), want)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


def last_wins(folder):
    """The reader that was wrong: the index first, and of two tensors the one read last."""
    index = folder / safetensors_io.INDEX
    if not index.exists():
        return safetensors_io.read_file(folder / "model.safetensors")[0]
    found = {}
    for file in sorted(set(json.loads(index.read_text())["weight_map"].values())):
        found |= safetensors_io.read_file(folder / file)[0]
    return found


@pytest.mark.parametrize("format", ["hf", "orbax"])
@pytest.mark.parametrize("kind", ["leftover", "stale_index", "tied"])
def test_verify_sees_what_a_wrong_reader_takes_on_both_sides(
    kind, format, made, tmp_path, monkeypatch, capsys
):
    folder = made(kind)
    monkeypatch.setattr(source, "read_tensors", last_wins)
    monkeypatch.setattr(settle, "_same", lambda a, b: True)
    with pytest.raises(SystemExit) as stopped:
        convert.run(str(folder), str(tmp_path / "out"), format, verify=True)
    assert stopped.value.code == 1
    said = capsys.readouterr().out
    assert f"does not hold what {folder} stores" in said
    wrong = {"tied": "ties the embeddings, of which two", "leftover": f"{V_PROJ} has other"}
    assert wrong.get(kind, "weight has other values, the largest by") in said


def plant(kind, folder, out):
    """Into the result, what the passed-over source says."""
    if kind == "two_ropes":
        edit_config(out, rope_scaling={**tiny.LINEAR_ROPE, "factor": 2.0})
    elif kind == "tied":
        rewrite(out, lambda found: found.update({HEAD: found[EMBED]}))
    else:
        rewrite(out, lambda found: found.update({V_PROJ: np.zeros_like(found[V_PROJ])}))


@pytest.mark.parametrize("kind", KINDS)
def test_verify_fails_on_a_planted_difference(kind, made, tmp_path, capsys):
    folder = made(kind)
    out = convert.run(str(folder), str(tmp_path / "out"), "hf")
    convert.check(str(folder), out, "hf", None, str(folder))
    plant(kind, folder, out)
    with pytest.raises(SystemExit):
        convert.check(str(folder), out, "hf", None, str(folder))
    where = {"two_ropes": "config.json has rope_scaling", "tied": f"{HEAD} has other values"}
    assert where.get(kind, f"{V_PROJ} has other values, the largest by") in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["", "bfloat16"])
def test_every_change_of_the_stored_bytes_is_named(dtype, clean, tmp_path):
    opened = open_source(clean)
    out = convert.run(str(clean), str(tmp_path / "out"), "hf", dtype)
    assert stored.differences(opened, out, dtype) == []
    config = (out / "config.json").read_text()

    def change(found):
        found[V_PROJ] = found[V_PROJ] + np.float32(1).astype(found[V_PROJ].dtype)
        found["extra"] = found.pop("model.norm.weight")
        found[EMBED] = found[EMBED].astype(np.float16)
        found[HEAD] = found[HEAD][:300]

    rewrite(out, change)
    edit_config(out, rms_norm_eps=0.5, dtype="float16")
    got = "\n".join(stored.differences(opened, out, dtype))
    for line in (
        f"{V_PROJ} has other values, the largest by 1.0e+00",
        "model.norm.weight is missing",
        "extra is stored, and not in the source",
        f"{HEAD} has shape [300, 64], expected [320, 64]",
        "config.json has rms_norm_eps = 0.5, expected 1e-05",
    ):
        assert line in got, got
    if dtype:
        assert f"{EMBED} has type float16, expected bfloat16" in got
    (out / "config.json").write_text(config)
    assert "config.json" not in "\n".join(stored.differences(opened, out, dtype))


def test_a_tuned_run_differs_from_its_base_where_it_was_tuned_alone(clean, tmp_path, capsys):
    model = rt.load(str(clean), "float32")
    run, _, _ = lora_case.make_run(tmp_path / "run", model)
    for format in ("hf", "orbax"):
        convert.run(str(run), str(tmp_path / format), format, verify=True)
    rewrite(tmp_path / "hf", lambda found: found.update({HEAD: found[HEAD] * 1.01}))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        convert.check(str(run), tmp_path / "hf", "hf", convert.find_run(run), str(clean))
    assert f"{HEAD} has other values" in capsys.readouterr().out


@pytest.mark.parametrize("format", ["hf", "orbax"])
def test_a_run_tuned_from_an_orbax_folder_is_verified_too(format, clean, tmp_path):
    base = convert.run(str(clean), str(tmp_path / "base"), "orbax")
    run, _, _ = lora_case.make_run(tmp_path / "run", rt.load(str(base), "float32"))
    convert.run(str(run), str(tmp_path / "out"), format, verify=True)
    copy = convert.run(str(base), str(tmp_path / "copy"), format, verify=True)
    found = convert.find_run(run)
    changed = found.tensor_names("llama")
    assert stored.differences(open_source(base), tmp_path / "out", "", changed) == []
    several = stored.differences(open_source(base), tmp_path / "out")
    assert len(several) == (4 if format == "hf" else 2)  # v and o, of two layers
    assert stored.differences(open_source(base), copy) == []


def test_a_tied_model_whose_head_alone_is_stored_is_whole(tmp_path, capsys):
    """As safetensors' save_model leaves it."""
    folder = tiny.make_llama(tmp_path / "in", tie_word_embeddings=True)
    rewrite(folder, lambda found: found.update({HEAD: found.pop(EMBED)}))
    assert tensors(folder).keys() & {HEAD, EMBED} == {HEAD}
    assert_close(logits(folder), transformers_logits(folder))
    assert f"of the two {HEAD} alone is stored" in capsys.readouterr().out
    out = convert.run(str(folder), str(tmp_path / "out"), "hf", verify=True)
    assert_close(transformers_logits(out), logits(folder))


def test_a_tied_heads_true_copy_stays_tied(tmp_path, capsys):
    folder = tiny.make_llama(tmp_path / "in", tie_word_embeddings=True)
    rewrite(folder, lambda found: found.update({HEAD: found[EMBED].copy()}))
    assert rt.load(str(folder)).arch.tied
    assert "differ" not in capsys.readouterr().out


def test_shards_beside_a_whole_file_and_tensors_that_the_index_does_not_name(
    clean, tmp_path, capsys
):
    folder = tmp_path / "in"
    shutil.copytree(clean, folder)
    weight_map = shard(folder)
    (folder / "model.safetensors").write_bytes((clean / "model.safetensors").read_bytes())
    (folder / safetensors_io.INDEX).unlink()
    assert_close(logits(folder), logits(clean))
    first = sorted(set(weight_map.values()))[0]
    assert f"holds model.safetensors and {first}, two sources" in capsys.readouterr().out
    (folder / "model.safetensors").unlink()
    found = load_file(folder / first) | {"old.weight": np.zeros(3, np.float32)}
    save_file(found, folder / first, metadata={"format": "pt"})
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / safetensors_io.INDEX).write_text(index)
    assert_close(logits(folder), logits(clean))
    assert f"old.weight is in {first} (1 such tensors), but" in capsys.readouterr().out


def test_an_index_that_points_to_the_wrong_shard_names_both(clean, tmp_path):
    folder = tmp_path / "in"
    shutil.copytree(clean, folder)
    weight_map = shard(folder)
    right, wrong = weight_map[V_PROJ], sorted(set(weight_map.values()))[-1]
    index = {"metadata": {}, "weight_map": weight_map | {V_PROJ: wrong}}
    (folder / safetensors_io.INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"{V_PROJ} is not in {wrong} but in {right}"):
        open_source(folder)


def test_two_kinds_of_weights_in_one_folder_are_refused(clean, tmp_path):
    out = convert.run(str(clean), str(tmp_path / "out"), "orbax")
    shutil.copyfile(clean / "model.safetensors", out / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds orbax_model.json and model.safetensors, two"):
        open_source(out)


def test_a_config_that_says_tied_of_a_family_that_says_nothing(tmp_path):
    """SmolLM3's default is tied: the key may be absent, the head different."""
    folder = tiny.make_family(tmp_path / "in", "smollm3", tie_word_embeddings=False)
    edit_config(folder, tie_word_embeddings=None)
    assert families.is_tied(json.loads((folder / "config.json").read_text()))
    assert_close(logits(folder), transformers_logits(folder))
    assert not rt.load(str(folder)).arch.tied


@pytest.mark.parametrize("theta", [10_000.0, 50_000.0])
def test_stored_frequencies_that_are_not_the_configs_are_said(theta, clean, tmp_path, capsys):
    folder = shutil.copytree(clean, tmp_path / "in")
    frequencies = (theta ** -(np.arange(0, 16, 2) / 16)).astype(np.float16)
    name = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    rewrite(folder, lambda f: f.update({name.format(l): frequencies.copy() for l in range(4)}))
    edit_config(folder, rope_parameters=None)
    assert_close(logits(folder), transformers_logits(folder))
    said = capsys.readouterr().out
    assert said.count("rope_theta: not in config.json; taking 10000.0") == 1
    line = f"{name.format(0)} is not what config.json makes with rope_theta 10000"
    assert said.count(line) == (theta != 10_000.0)
    convert.run(str(folder), str(tmp_path / "out"), "hf", verify=True)  # buffers are not weights


def test_buffers_of_other_types_are_no_difference(tmp_path):
    """Pythia's: a mask of bools, a scalar."""
    folder = tiny.make_family(tmp_path / "in", "gpt_neox")
    names = [f"gpt_neox.layers.{l}.attention" for l in range(3)]
    mask, low = np.tri(8, dtype=bool)[None, None], -1e9
    rewrite(folder, lambda found: found.update({f"{n}.bias": mask.copy() for n in names}))
    rewrite(folder, lambda f: f.update({f"{n}.masked_bias": np.array(low, "f4") for n in names}))
    for format in ("hf", "orbax"):
        convert.run(str(folder), str(tmp_path / format), format, verify=True)
