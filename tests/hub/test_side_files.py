"""What goes with the weights: the source's own bytes, or what old and new readers both read."""

import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

import reptune_jax as rt
from reptune_jax import convert
from reptune_jax.hub import side_files, source
from tests.support import hub_models, old_reader, tiny
from tests.support.folders import edit_config, spaced_tokenizer

LLAMA2 = ["LlamaTokenizer", "LlamaTokenizerFast", "GemmaTokenizer", "Qwen2Tokenizer"]
LLAMA2 += ["GPT2TokenizerFast", "GPTNeoXTokenizerFast", "CohereTokenizerFast"]
LLAMA2 += ["PreTrainedTokenizerFast"]
TEXTS = ["hi world", "<s>[INST] hi [/INST]", "  he\nlo</s>hi"]


@pytest.fixture
def folder(tmp_path):
    return tiny.make_llama(tmp_path / "in")


def out_by(way, given, out):
    """The folder that one of the two ways out writes."""
    return rt.save_hf(rt.load(str(given)), out) if way == "save" else convert.run(given, out, "hf")


# ---------------------------------------------------------------- the source's own


@pytest.mark.parametrize("tokenizer_class", LLAMA2)
def test_ids_are_those_of_tokenizer_json_whatever_the_class(tokenizer_class, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    core = spaced_tokenizer(tmp_path, tokenizer_class)
    ours = source._tokenizer(tmp_path)
    for text in TEXTS:
        assert ours.encode(text) == core.encode(text).ids
        bare = core.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special_tokens=False) == bare
    assert ours.decode(ours.encode("hi world"), skip_special_tokens=True) == "hi world"
    assert ours.get_vocab() == core.get_vocab()  # no <mask> of the class, beyond the embedding
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, 2, None)


def test_a_token_that_only_the_config_names_is_added(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    core = spaced_tokenizer(tmp_path, "LlamaTokenizer", pad_token="[PAD]")
    assert source._tokenizer(tmp_path).pad_token_id == core.get_vocab_size()


@pytest.mark.parametrize("way", ["save", "convert"])
def test_the_sources_files_travel_byte_for_byte(way, folder, tmp_path):
    spaced_tokenizer(folder, "LlamaTokenizer", extra_special_tokens=["</s>"], private={"a": 1})
    given = {
        "generation_config.json": b'{"temperature": 0.6,   "eos_token_id": [2, 1]}',
        "LICENSE": b"Mine.",
        "licence.txt": b"MIT",
        "NOTICE.md": b"Built with \xff",
        "USE_POLICY.md": b"no",
        "chat_template.jinja": b"{{ messages[0]['content'] }}\n",
        "special_tokens_map.json": b'{"bos_token":"<s>"}',
        "tokenizer.model": b"\x00\x01",
        "additional_chat_templates/tool.jinja": b"{{ 1 }}",
    }
    (folder / "additional_chat_templates").mkdir()
    for name, text in given.items():
        (folder / name).write_bytes(text)
    for name in ("modeling_x.py", "tokenizer_x.py", "hf_token", "training_args.bin", "README.md"):
        (folder / name).write_text("not this")
    edit_config(folder, custom="kept", transformers_version="4.31.0")
    given |= {n: (folder / n).read_bytes() for n in ("config.json", "tokenizer_config.json")}
    given["tokenizer.json"] = (folder / "tokenizer.json").read_bytes()
    out = out_by(way, folder, tmp_path / "out")
    there = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    weights = there.pop("model.safetensors")
    assert weights and there.pop("README.md", b"") != b"not this"
    assert there == given
    again, core = rt.load(str(out)), Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert again.tokenizer.encode(TEXTS[1]) == core.encode(TEXTS[1]).ids


def test_of_the_config_only_what_changed_changes(folder, tmp_path):
    edit_config(folder, dtype=None, torch_dtype="float32", custom="kept")
    before = json.loads((folder / "config.json").read_text())
    rt.save_hf(rt.load(str(folder), dtype="bfloat16"), tmp_path / "out")
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert list(after) == list(before) and after == before | {"torch_dtype": "bfloat16"}


def test_links_out_of_the_folder_are_not_copied(folder, tmp_path, capsys):
    (tmp_path / "passwd").write_text("secret")
    (folder / "LICENSE_x").symlink_to(tmp_path / "passwd")
    (folder / "NOTICE").write_text("within")
    (folder / "LICENSE_y").symlink_to("NOTICE")
    for way in ("save", "convert"):
        out = out_by(way, folder, tmp_path / way)
        assert "LICENSE_x: is a link out of the model's folder" in capsys.readouterr().out
        assert not (out / "LICENSE_x").exists()
        assert (out / "LICENSE_y").read_text() == "within" and not (out / "LICENSE_y").is_symlink()


def test_a_snapshot_of_the_hubs_cache_links_to_its_blobs(tmp_path):
    repo = tmp_path / "models--org--name"
    snapshot = tiny.make_llama(repo / "snapshots" / "abc")
    (snapshot / "LICENSE").write_text("Mine.")
    (repo / "blobs").mkdir()
    for i, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(repo / "blobs" / str(i))
        path.symlink_to(Path("../../blobs") / str(i))
    out = rt.save_hf(rt.load(str(snapshot)), tmp_path / "out")
    for name in ("LICENSE", "tokenizer.json", "config.json"):
        assert (out / name).read_bytes() == (snapshot / name).read_bytes()


def test_a_tokenizer_behind_a_link_that_is_not_followed_is_made(folder, tmp_path):
    (folder / "tokenizer.json").rename(tmp_path / "elsewhere.json")
    (folder / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
    model = rt.load(str(folder))
    out = rt.load(str(rt.save_hf(model, tmp_path / "out")))
    assert out.encode_prompt("hi") == model.encode_prompt("hi")


def test_modes_follow_the_umask(folder, tmp_path):
    before = os.umask(0o027)
    try:
        out = rt.save_hf(rt.load(str(folder)), tmp_path / "out")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(p.stat().st_mode) for p in out.iterdir()} == {0o640}
    assert stat.S_IMODE(out.stat().st_mode) == 0o750


@pytest.mark.parametrize("way", ["save", "convert"])
def test_no_path_of_this_machine_goes_out(way, folder, tmp_path):
    edit_config(folder, _name_or_path=str(folder))
    about = json.loads((folder / "tokenizer_config.json").read_text())
    lost = {"name_or_path": "./models/x", "special_tokens_map_file": str(folder / "config.json")}
    kept = {"chat_template": "/think", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about | lost | kept))
    (folder / "generation_config.json").write_text('{"_name_or_path": "org/name"}')
    out = out_by(way, folder, tmp_path / "out")
    for path in out.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path
    assert json.loads((out / "tokenizer_config.json").read_text()) == about | kept
    assert (out / "generation_config.json").read_text() == '{"_name_or_path": "org/name"}'


def test_names_of_models_are_shown_without_their_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    shown = {"org/name": "org/name", "models/mine": "mine", "/gone/a/b": "b", "~/m.gguf": "m.gguf"}
    assert {name: side_files.public_name(name) for name in shown} == shown


def test_the_folder_must_still_be_there(folder, tmp_path):
    model = rt.load(str(folder))
    folder.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"in: is gone, expected the model's folder"):
        rt.save_hf(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- made, of a GGUF file

_LINEAR = {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}
_GEMMA = {
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 7e3},
    },
    "head_dim": 8,
    "sliding_window": 16,
    "num_hidden_layers": 6,
    "query_pre_attn_scalar": 8,
    "tie_word_embeddings": True,
}
GGUFS = {
    "llama": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 3e5}},
        {},
        {"rope_theta": 3e5, "rope_scaling": None},
    ),
    "qwen2": ({"rope_parameters": _LINEAR | {"rope_type": "default"}}, {}, {"rope_theta": 5e5}),
    "llama linear": (
        {"rope_parameters": _LINEAR},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ),
    "gemma3_text": (
        _GEMMA,
        {"rope.freq_base_swa": 7e3},
        {"rope_theta": 1e6, "rope_local_base_freq": 7e3},
    ),
}


@pytest.fixture(params=GGUFS)
def made(request, tmp_path):
    """(the model of a GGUF file, the folder it was written to, keys that older readers read)"""
    changes, extra, keys = GGUFS[request.param]
    family = request.param.split()[0]
    hf = hub_models.make_model(family, **changes)
    arch = "gemma3" if family == "gemma3_text" else None
    model = rt.load(str(hub_models.write_gguf(tmp_path / "m.gguf", hf, extra=extra, arch=arch)))
    return model, rt.save_hf(model, tmp_path / "out"), keys


def test_a_gguf_files_export_is_spelled_for_old_readers_too(made):
    model, out, keys = made
    config, about = (
        json.loads((out / f"{name}.json").read_text()) for name in ("config", "tokenizer_config")
    )
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert {k: config[k] for k in keys} == keys and "rope_parameters" in config
    assert rt.load(str(out)).arch == model.arch
    assert about["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert about["chat_template"] == hub_models.TEMPLATE and about["add_bos_token"] is False
    assert about["added_tokens_decoder"]["2"]["content"] == "<|im_end|>"
    assert about["added_tokens_decoder"]["2"]["special"] is True
    assert not isinstance(about.get("extra_special_tokens", {}), list)
    assert not about.keys() & {"backend", "is_local", "local_files_only"}
    special = json.loads((out / "special_tokens_map.json").read_text())
    assert special["eos_token"] == about["eos_token"] == "<|im_end|>"


@pytest.mark.slow
@pytest.mark.skipif(old_reader.PYTHON is None, reason="no REPTUNE_OLD_PYTHON")
def test_transformers_4_reads_a_gguf_files_export(made):
    model, out, _ = made
    old, chat = old_reader.read(out), model.encode_prompt(old_reader.CHAT)
    assert old["version"].startswith("4.") and old["chat"] == chat and old["eos"] == 2
    assert old["ids"] == [model.tokenizer.encode(text) for text in old_reader.TEXTS]
    logits = np.asarray(model.forward(np.array([chat])).logits_BxTxV)[0, -1]
    np.testing.assert_allclose(old["logits"], logits, atol=1e-5)
    assert old["new"] == model.generate_each([chat], 8)[0]
    assert old["dtype"] == "torch.float32"
