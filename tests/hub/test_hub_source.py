"""Model names -> config and tensors: HF folders, the hub, and what is refused."""

import json

import ml_dtypes
import numpy as np
import pytest

from reptune_jax.hub import safetensors_io
from reptune_jax.hub.safetensors_io import read_tensors, save_tensors
from reptune_jax.hub.source import open_source
from reptune_jax.hub.tokenizer import gguf_tokenizer
from tests.support.hub_models import assert_same, make_model, tokenizer_metadata, weights_of


@pytest.fixture(scope="module")
def llama():
    return make_model("llama")


@pytest.fixture(scope="module")
def qwen2():
    return make_model("qwen2", tie_word_embeddings=True)


@pytest.fixture
def folder(llama, tmp_path):
    path = tmp_path / "tiny"
    llama.save_pretrained(path)
    gguf_tokenizer(tokenizer_metadata()).save_pretrained(path)
    return path


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# folders


def test_folder_gives_config_tensors_and_tokenizer(folder, llama):
    source = open_source(str(folder))
    assert_same(source.tensors, weights_of(llama))
    assert source.config["hidden_size"] == 32
    assert source.folder == folder
    assert source.tokenizer("<|im_end|>")["input_ids"] == [2]
    assert source.eos_ids == (2,)


def test_eos_ids_are_those_of_all_files_the_generation_config_first(folder):
    edit_json(folder / "generation_config.json", eos_token_id=[7, 5, 7])
    assert open_source(folder).eos_ids == (7, 5, 2)
    (folder / "generation_config.json").unlink()
    assert open_source(folder).eos_ids == (2,)


def test_shards_of_transformers_are_read(llama, tmp_path):
    llama.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / safetensors_io.INDEX).exists()
    assert_same(read_tensors(tmp_path), weights_of(llama))


def test_folder_without_tokenizer_opens(folder):
    for path in folder.glob("*token*"):
        path.unlink()
    assert open_source(folder).tokenizer is None


def test_code_in_a_folder_is_not_run(folder, tmp_path):
    proof = tmp_path / "ran"
    (folder / "evil.py").write_text(
        f"open({str(proof)!r}, 'w')\nclass Tok: pass\nclass Config: pass\n"
    )
    edit_json(folder / "config.json", auto_map={"AutoConfig": "evil.Config"}, model_type="evil")
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tok", None]})
    try:
        open_source(folder)
    except ValueError as error:
        assert "not run" in str(error)
    assert not proof.exists()


def test_missing_path_suggests_what_is_there(folder):
    with pytest.raises(ValueError, match=r"does not exist \(did you mean '.*tiny'\?\)"):
        open_source(folder.parent / "tinny")
    with pytest.raises(
        ValueError, match=r"expected a folder with config.json, a .gguf file, or a hub"
    ):
        open_source("./nowhere/at/all")


def test_a_file_of_a_folder_names_the_folder(folder):
    with pytest.raises(ValueError, match=r"expected its folder. Name '.*tiny'"):
        open_source(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("x.gguf", r"Did you mean the file '.*x.gguf'"),
        ("adapter_config.json", "This is an adapter"),
        ("readme.txt", "Is this the model's own folder"),
    ],
)
def test_folder_without_config(tmp_path, other, message):
    (tmp_path / other).write_text("{}")
    with pytest.raises(ValueError, match=f"has no config.json.*{message}"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("pytorch_model.bin", "only pytorch_model.bin. Pickles are not opened"),
        ("adapter_model.safetensors", "only an adapter"),
        ("readme.txt", "Download the weights too"),
    ],
)
def test_folder_without_weights(folder, other, message):
    (folder / "model.safetensors").unlink()
    (folder / other).write_bytes(b"")
    with pytest.raises(ValueError, match=f"found no .*safetensors weights, .*{message}"):
        open_source(folder)


def test_broken_config_and_quantized_weights(folder):
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(ValueError, match=r"is quantized \(gptq\), expected plain weights"):
        open_source(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: is not valid JSON"):
        open_source(folder)


def test_tokenizer_of_another_model(folder):
    edit_json(folder / "config.json", vocab_size=200)
    with pytest.raises(ValueError, match=r"got id 267 .*vocabulary of 200"):
        open_source(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_safetensors_says_how_many_bytes(folder, keep):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    expected = f"{len(whole):,}" if keep == -1 else "a whole header first"
    with pytest.raises(ValueError, match=f"got {len(whole[:keep]):,} bytes, expected {expected}"):
        open_source(folder)


# an index


@pytest.fixture
def sharded(tmp_path):
    save_tensors(tmp_path, {"a": np.ones(4, np.float32), "b": np.ones(4, np.float32)}, 16)
    return tmp_path


def test_index_naming_a_missing_shard(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"names model-00002-of-00002.safetensors, which is missing"
    ):
        read_tensors(sharded)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "x/y.safetensors", ".."])
def test_index_pointing_outside_the_folder(sharded, shard):
    edit_json(sharded / safetensors_io.INDEX, weight_map={"a": shard})
    with pytest.raises(ValueError, match="expected a file name inside the folder"):
        read_tensors(sharded)


def test_index_of_another_model(sharded):
    shard = "model-00001-of-00002.safetensors"
    edit_json(sharded / safetensors_io.INDEX, weight_map={"a": shard, "c": shard})
    with pytest.raises(ValueError, match=r"c is not in model-00001.*\(1 such\)"):
        read_tensors(sharded)
    (sharded / safetensors_io.INDEX).write_text("[]")
    with pytest.raises(ValueError, match=r"index\.json: got a JSON list, expected"):
        read_tensors(sharded)


def test_two_files_with_the_same_tensor_and_no_index(sharded):
    (sharded / safetensors_io.INDEX).unlink()
    assert read_tensors(sharded).keys() == {"a", "b"}
    one = (sharded / "model-00001-of-00002.safetensors").read_bytes()
    (sharded / "copy.safetensors").write_bytes(one)
    with pytest.raises(ValueError, match=r"a is in model-00001.* and in another file"):
        read_tensors(sharded)


# writing


def test_saved_tensors_are_read_back_and_by_safetensors(tmp_path):
    from safetensors import safe_open

    rng = np.random.default_rng(0)
    arrays = {
        "float": rng.normal(size=(3, 5)).astype(np.float32),
        "transposed": rng.normal(size=(3, 5)).astype(np.float32).T,
        "bfloat": rng.normal(size=(2, 2)).astype(ml_dtypes.bfloat16),
        "half": rng.normal(size=7).astype(np.float16),
        "scalar": np.float32(3).reshape(()),
        "empty": np.zeros((0, 4), np.int64),
    }
    assert save_tensors(tmp_path, arrays) == [tmp_path / "model.safetensors"]
    assert_same(read_tensors(tmp_path), arrays)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        np.testing.assert_array_equal(file.get_tensor("transposed").numpy(), arrays["transposed"])


def test_saved_shards_load_in_transformers(llama, folder):
    import transformers

    limit = 20_000
    written = save_tensors(folder, iter(weights_of(llama).items()), limit)
    assert len(written) > 3
    assert written[-1].name == safetensors_io.INDEX
    assert not (folder / "model.safetensors").exists()  # it would be stale
    assert max(p.stat().st_size for p in written[:-1]) < 2 * limit
    again = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for name, weight in weights_of(again).items():
        np.testing.assert_array_equal(weight, weights_of(llama)[name])
    save_tensors(folder, weights_of(llama))  # one file again, no shard left over
    assert [p.name for p in folder.glob("*.safetensors*")] == ["model.safetensors"]


@pytest.mark.parametrize("limit", [16, 1e9])
def test_a_failed_save_leaves_what_was_there(tmp_path, limit):
    save_tensors(tmp_path, {"a": np.zeros(4, np.float32)})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def pairs():
        yield "a", np.ones(4, np.float32)
        yield "b", np.ones(4, np.float32)
        raise RuntimeError("disk gone")

    with pytest.raises(RuntimeError, match="disk gone"):
        save_tensors(tmp_path, pairs(), limit)
    twice = [("a", np.ones(4, np.float32)), ("a", np.ones(4, np.float32))]
    with pytest.raises(ValueError, match="a: given twice"):
        save_tensors(tmp_path, twice, limit)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


# the hub


def test_hub_errors_say_what_to_do(monkeypatch):
    import huggingface_hub

    response = type("Response", (), {"headers": {}, "request": None, "status_code": 404})()
    for error, message in [
        (
            huggingface_hub.errors.RepositoryNotFoundError("404", response=response),
            "neither a folder",
        ),
        (huggingface_hub.errors.GatedRepoError("403", response=response), "is gated. Accept its"),
        (huggingface_hub.errors.HFValidationError("a--b"), "is no valid hub id"),
        (ConnectionError("no route\nmore"), r"cannot be reached \(ConnectionError: no route\)"),
    ]:

        def fail(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(ValueError, match=f"model: 'org/name' .*{message}"):
            open_source("org/name")


def test_hub_snapshot_is_opened_as_a_folder(monkeypatch, folder, llama):
    import huggingface_hub

    asked = {}

    def download(name, **patterns):
        asked.update(patterns, name=name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    source = open_source("org/name")
    assert (source.name, source.folder) == ("org/name", folder)
    assert_same(source.tensors, weights_of(llama))
    files = [p.name for p in folder.iterdir()]
    wanted = ["pytorch_model.bin", "consolidated.safetensors", "evil.py", "model.gguf"]
    kept = huggingface_hub.utils.filter_repo_objects(
        files + wanted,
        allow_patterns=asked["allow_patterns"],
        ignore_patterns=asked["ignore_patterns"],
    )
    assert sorted(kept) == sorted(files)
