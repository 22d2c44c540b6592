"""Conversion: to the byte there and back, a leaf at a time, all or nothing, verified."""

import json
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from flax import traverse_util
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

import reptune_jax as rt
from reptune_jax import convert, lm
from reptune_jax.evals import agreement, arms
from reptune_jax.hub import safetensors_io
from reptune_jax.hub.safetensors_io import TensorHandle
from tests.support import hub_models, lora_case, tiny
from tests.support.folders import rewrite

COPIED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def tensors_of(folder):
    out = {}
    for path in folder.glob("*.safetensors"):
        out |= load_file(path)
    return out


def assert_same_folder(got, want):
    """Tensors and what goes with them, to the byte."""
    ours, theirs = tensors_of(got), tensors_of(want)
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert ours[name].dtype == array.dtype and ours[name].tobytes() == array.tobytes(), name
    for name in COPIED:
        assert (got / name).read_bytes() == (want / name).read_bytes(), name
    assert not list(got.glob(".*")) and not list(got.parent.glob(".*.partial"))


def make(kind, folder):
    if kind == "bfloat16_tied":
        made = tiny.make_llama(folder, tie_word_embeddings=True)
        hf = AutoModelForCausalLM.from_pretrained(made, dtype=torch.bfloat16)
        hf.save_pretrained(made)
        return made
    if kind in tiny.FAMILIES:
        return tiny.make_family(folder, kind)
    made = tiny.make_qwen2(folder)
    if kind == "mixed":  # norms in float32, the rest in float16
        path = made / "model.safetensors"
        cast = {k: v if "norm" in k else v.astype(np.float16) for k, v in load_file(path).items()}
        save_file(cast, path, metadata={"format": "pt"})
    return made


@pytest.mark.parametrize(
    "kind", ["float32", "bfloat16_tied", "mixed", "phi3", "gpt2", "gpt_neox", "gemma2"]
)
def test_there_and_back_is_the_same_to_the_byte(kind, tmp_path):
    folder = make(kind, tmp_path / "in")
    orbax = convert.run(str(folder), str(tmp_path / "orbax"))
    back = convert.run(str(orbax), str(tmp_path / "back"))
    assert_same_folder(back, folder)
    assert AutoModelForCausalLM.from_pretrained(back, dtype="auto").config.model_type
    want, got = rt.load(str(folder)), rt.load(str(orbax))
    assert got.arch == want.arch and got.stop_ids == want.stop_ids
    for path, leaf in flat(want.params).items():
        assert (np.asarray(flat(got.params)[path]) == np.asarray(leaf)).all(), path


def test_large_models_are_read_and_written_in_shards(tmp_path, monkeypatch):
    folder = tiny.make_llama(tmp_path / "in")
    hf = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    hf.save_pretrained(folder, max_shard_size="100KB")
    monkeypatch.setattr(safetensors_io, "MAX_SHARD_BYTES", 150_000)
    orbax = convert.run(str(folder), str(tmp_path / "orbax"))
    back = convert.run(str(orbax), str(tmp_path / "back"))
    assert_same_folder(back, folder)
    shards = list(back.glob("model-*-of-*.safetensors"))
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {p.name for p in shards} and len(shards) > 2
    assert all(p.stat().st_size < 160_000 for p in shards)
    again = AutoModelForCausalLM.from_pretrained(back)
    for name, weight in hf.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name


@pytest.mark.parametrize("format", ["hf", "orbax"])
def test_what_the_type_asked_for_does_not_hold_is_not_written(format, tmp_path):
    folder, name = make("float32", tmp_path / "in"), "model.layers.1.mlp.down_proj.weight"
    rewrite(folder, lambda tensors: tensors[name].__imul__(1e7))
    with pytest.raises(ValueError, match=r"beyond float16.*mlp.down.*Use dtype bfloat16"):
        convert.run(str(folder), str(tmp_path / "out"), format, "float16")
    assert not (tmp_path / "out").exists()
    convert.run(str(folder), str(tmp_path / "out"), format, "bfloat16")
    assert np.isfinite(rt.load(str(tmp_path / "out")).forward([[7, 8]]).logits_BxTxV).all()


@pytest.mark.parametrize("format", ["hf", "orbax"])
def test_a_gguf_file_goes_to_either(format, tmp_path):
    path = hub_models.write_gguf(tmp_path / "m.gguf", hub_models.make_model("llama"), True)
    out = convert.run(str(path), str(tmp_path / "out"), format, verify=True)
    want, got = rt.load(str(path)), rt.load(str(out))
    assert got.stop_ids == want.stop_ids
    for name, leaf in flat(want.params).items():
        assert (np.asarray(flat(got.params)[name]) == np.asarray(leaf)).all(), name
    text = "Is it True?"
    assert got.tokenizer.encode(text) == want.tokenizer.encode(text)
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"


def test_the_type_can_be_changed_on_the_way(tmp_path, capsys):
    folder = tiny.make_llama(tmp_path / "in")
    out = convert.run(str(folder), str(tmp_path / "out"), "hf", "bfloat16", verify=True)
    assert "verify: max logit difference" in capsys.readouterr().out
    exported = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert {p.dtype for p in exported.parameters()} == {torch.bfloat16}
    for name, weight in AutoModelForCausalLM.from_pretrained(folder).state_dict().items():
        assert torch.equal(exported.state_dict()[name], weight.bfloat16()), name


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return lm.load(str(tiny.make_llama(tmp_path_factory.mktemp("llama"))), "float32")


@pytest.mark.parametrize("rank", [0, 4])
def test_a_tuned_run_is_merged_into_its_base(rank, model, tmp_path):
    run, _, _ = lora_case.make_run(tmp_path / "run", model, rank)
    out = convert.run(str(run), str(tmp_path / "out"), verify=True)
    want, got = flat(arms.tuned(model, run).model.params), flat(rt.load(str(out)).params)
    for path, leaf in want.items():
        np.testing.assert_allclose(got[path], leaf, atol=1e-6, err_msg=path)
    moved = np.abs(got["blocks/attn/v/kernel"] - model.params["blocks"]["attn"]["v"]["kernel"])
    assert moved[1:3].max() > 1e-3 and moved[0].max() == moved[3].max() == 0
    assert model.name not in (out / "README.md").read_text()


def test_a_run_of_another_base_is_refused(model, tmp_path):
    run, _, _ = lora_case.make_run(tmp_path / "run", model)
    other = tiny.make_llama(tmp_path / "other", seed=1)
    for format in ("hf", "adapter"):
        with pytest.raises(ValueError, match=rf"tuned from .*{model.sha}.*Name it with --base"):
            convert.run(str(run), str(tmp_path / "out"), format, base=str(other))
    assert not (tmp_path / "out").exists()
    whole, _, _ = lora_case.make_run(tmp_path / "whole", model, rank=0)
    with pytest.raises(ValueError, match=r"got 'adapter' for .*whole, which trained whole weights"):
        convert.run(str(whole), str(tmp_path / "out"), "adapter")


@pytest.mark.parametrize(("format", "back"), [("orbax", "hf"), ("hf", "orbax")])
def test_one_leaf_is_in_memory_at_a_time(format, back, model, tmp_path, monkeypatch):
    alive, most, inner = weakref.WeakSet(), [0], convert.weights.leaves

    class Tracked(np.ndarray):  # a plain array cannot be hashed into a WeakSet
        __hash__ = object.__hash__

    def tracked(handle):
        def read():
            assert not alive, "a leaf is read while another is held"
            leaf = handle.read().view(Tracked)
            alive.add(leaf)
            most[0] += 1
            return leaf

        return TensorHandle(handle.shape, handle.dtype, read)

    def leaves(*args):
        return {path: tracked(handle) for path, handle in inner(*args).items()}

    monkeypatch.setattr(convert.weights, "leaves", leaves)
    first = convert.run(model.name, str(tmp_path / "first"), format)
    convert.run(str(first), str(tmp_path / "second"), back)
    assert most[0] == 2 * len(flat(model.params))


_SLOW = """
import sys, time
from reptune_jax import convert
from reptune_jax.hub import orbax_io, safetensors_io
inner = orbax_io._save
def slow(where, leaf):
    inner(where, leaf)
    print("saved", flush=True)
    time.sleep(0 if "embed" in str(where) else 60)
orbax_io._save = slow
convert.run(*sys.argv[1:])
"""


def test_a_killed_conversion_leaves_nothing_that_looks_finished(model, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", _SLOW, model.name, str(out), "orbax"]
    root = Path(__file__).parent.parent
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root, env={**os.environ})
    assert process.stdout is not None
    while b"saved" not in process.stdout.readline():
        assert process.poll() is None, "ended by itself"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert {p.name for p in tmp_path.iterdir()} == {".out.partial", ".out.lock"}
    left = tmp_path / ".out.partial"
    assert list(left.glob("params/*"))
    with pytest.raises(ValueError, match=r"has no config.json"):
        rt.load(str(left))
    convert.run(model.name, str(out), "orbax")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert rt.load(str(out)).arch == model.arch


def test_verifying_fails_where_predictions_differ(model, tmp_path, capsys):
    other = tiny.make_llama(tmp_path / "other", seed=1)
    with pytest.raises(SystemExit) as stopped:
        convert.check(model.name, other, "hf", None, model.name)
    assert stopped.value.code == 1 and "verify: FAILED" in capsys.readouterr().out
    nothing = agreement.Difference(float("nan"), 0.0, 1.0)
    assert not nothing.within(agreement.ALLOWED["float32"])


def test_a_difference_is_the_textbooks():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 6, 9)).astype(np.float32)
    found = agreement.compare([a[:2], a[2:]], [b[:2], b[2:]])
    p, q = torch.tensor(a).log_softmax(-1), torch.tensor(b).log_softmax(-1)
    want = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
    assert found.kl == pytest.approx(float(want), rel=1e-5)
    assert found.logit == pytest.approx(np.abs(a - b).max() / np.abs(a).max())
    assert found.agreement == np.mean(a.argmax(-1) == b.argmax(-1))


def test_damaged_orbax_folders_are_refused(model, tmp_path):
    out = convert.run(model.name, str(tmp_path / "out"))
    index = json.loads((out / "orbax_model.json").read_text())
    entry = index["leaves"]["final_norm/scale"]
    for change, message in (
        ({"crc32": entry["crc32"] ^ 1}, r"final_norm.scale: is damaged \(checksum\)"),
        ({"shape": [65]}, r"1 leaves do not fit config.json, such as final_norm/scale"),
    ):
        leaves = index["leaves"] | {"final_norm/scale": entry | change}
        (out / "orbax_model.json").write_text(json.dumps(index | {"leaves": leaves}))
        with pytest.raises(ValueError, match=message):
            rt.load(str(out))
    (out / "orbax_model.json").write_text("{}")
    with pytest.raises(ValueError, match=r"got format None"):
        rt.load(str(out))


def test_of_a_study_the_dual_run_is_taken_and_said(model, tmp_path, capsys):
    for name in ("dual+_s0", "token+_s0"):
        lora_case.make_run(tmp_path / name, model)
    assert convert.find_run(tmp_path).folder.name == "dual+_s0"
    assert "taking dual+_s0" in capsys.readouterr().out


def test_what_cannot_be_converted_is_refused_before_anything_is_written(model, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for name in ("token+_s0", "token-_s0"):  # none that is meant without saying so
        (tmp_path / "study" / name / "checkpoints").mkdir(parents=True)
    new = str(tmp_path / "new")
    for args, message in [
        ((model.name, str(tmp_path / "full")), "is a file or not empty, expected a new folder"),
        ((str(tmp_path / "absent"), new), "does not exist"),
        ((model.name, new, "gguf"), "format: got 'gguf', expected one of orbax, hf, adapter"),
        ((model.name, new, "adapter"), "which is no tuned run, expected a run with train.lora"),
        ((str(tmp_path / "study"), new), r"is the folder of a study.*study/token\+_s0"),
        ((model.name, new, "hf", "int8"), "dtype: got 'int8', expected one of float32"),
        ((model.name, new, "hf", "", False, "x"), "base: got 'x' for .*, which is no tuned run"),
    ]:
        with pytest.raises(ValueError, match=message):
            convert.run(*args)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "study"]
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["notes.txt"]


def program(*args):
    command = [sys.executable, "-m", "reptune_jax.convert", *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)


def test_the_program_says_what_it_did_and_what_is_wrong(model, tmp_path):
    out = tmp_path / "out"
    done = program(f"--from={model.name}", f"--to={out}", "--format=hf", "--verify")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "verify: max logit difference 0.0e+00" in done.stdout
    assert_same_folder(out, Path(model.name))
    again = program(f"--from={model.name}", f"--to={out}")
    assert again.returncode == 1 and "Traceback" not in again.stderr
    assert f"error: {out}: is a file or not empty" in again.stderr
    shown = program("--help").stdout
    for flag in ("--from", "--to", "--format", "--dtype", "--[no]verify", "--base"):
        assert flag in shown
    assert shown.lstrip().startswith("Program: a model from one format")
