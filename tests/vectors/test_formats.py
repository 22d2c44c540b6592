"""Vector files of other tools: their own readers read ours, and what they write we read rightly."""

import json

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import reptune_jax as rt
from tests.support import steering_case, tiny
from tests.support import torch_reference as ref

META = {"model": "org/x", "model_sha": "abc", "model_type": "llama", "position": "last"}
NAMES = ["v.safetensors", "v.gguf", "v.svec", "v.pt", "v.npz"]


def vector(**meta):
    return steering_case.make_vector(layers=[1, 3], agreement=[None, 0.5, 0.4, 0.3], **META | meta)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_llama(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("name", [*NAMES, "layers.safetensors"])
def test_the_way_there_and_back_keeps_what_a_dose_adds(tmp_path, name, unit):
    v = vector().unit() if unit else vector()
    v.save(tmp_path / name, "layers" if name == "layers.safetensors" else "")
    again = rt.SteeringVector.load(tmp_path / name, n_layers=4)
    np.testing.assert_allclose(again.dose_NxD, v.dose_NxD, rtol=1e-6)
    assert again.layers == (1, 3) and [p.name for p in tmp_path.iterdir()] == [name]
    if name != "v.pt":  # which has no place for a text
        np.testing.assert_allclose(again.unit().dose_NxD, v.unit().dose_NxD, rtol=1e-5)
        assert {**again.meta, **META, "agreement": v.meta["agreement"]} == again.meta
        again.check_model("abc", "it")
        with pytest.raises(ValueError, match=r"made on org/x \(abc\), expected one made on y"):
            again.check_model("other", "y")


def test_the_gguf_packages_reader_finds_the_layers_we_named(tmp_path):
    v = vector()
    v.save(tmp_path / "v.gguf")
    found = gguf.GGUFReader(tmp_path / "v.gguf")
    rows = {tensor.name: tensor for tensor in found.tensors}
    assert rows.keys() == {"direction.1", "direction.3"}  # llama.cpp adds N to block N's output
    for layer in (1, 3):
        row = rows[f"direction.{layer}"]
        assert (row.tensor_type, list(row.shape)) == (gguf.GGMLQuantizationType.F32, [64])
        np.testing.assert_array_equal(row.data, v.directions_NxD[layer])
    said = {key: field.contents() for key, field in found.fields.items()}
    assert said["general.architecture"] == "controlvector"
    assert said["controlvector.model_hint"] == "llama"
    assert said["controlvector.layer_count"] == 2
    assert "output of 0-based block N" in said["controlvector.hook"]


def write_gguf(path, rows, arch="controlvector"):
    """As repeng does."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_string(f"{arch}.model_hint", "llama")
    writer.add_uint32(f"{arch}.layer_count", len(rows))
    for name, row in rows.items():
        writer.add_tensor(name, row)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_control_vector_of_repeng_steers_the_blocks_that_it_names(tmp_path, folder):
    model, rng = rt.load(str(folder)), np.random.default_rng(0)
    rows = {l: rng.standard_normal(64).astype(np.float32) for l in (1, 2)}
    write_gguf(tmp_path / "v.gguf", {f"direction.{l}": row for l, row in rows.items()})
    v = rt.SteeringVector.load(tmp_path / "v.gguf", n_layers=4)
    assert v.meta["model_type"] == "llama" and v.layers == (1, 2)
    ids, mask = steering_case.draw_batch()
    hf, hooks = steering_case.ref.load(folder), {l: torch.tensor(r) for l, r in rows.items()}
    logits = model.forward(ids, mask, steer=v).logits_BxTxV
    steering_case.assert_equals_torch(logits, hf, ids, mask, hooks)
    for refused in (lambda: v.unit(), lambda: v.probe(center=True)):
        with pytest.raises(ValueError, match="is unknown, as it was read from another tool's"):
            refused()
    assert v.probe().direction_NxD.shape == (4, 64)
    short = rt.SteeringVector.load(tmp_path / "v.gguf")
    assert short.directions_NxD.shape == (3, 64)
    with pytest.raises(ValueError, match=r"expected 4\. Load it with n_layers=4"):
        model.forward(ids, mask, steer=short)


def test_lm_evals_file_adds_the_same_by_torch_hooks(tmp_path, folder):
    v = steering_case.make_vector(layers=[1, 3], **META).unit()
    v.save(tmp_path / "v.pt")
    config = torch.load(tmp_path / "v.pt", weights_only=True)
    model, hooks = steering_case.ref.load(folder), []
    modules = dict(model.base_model.named_modules())  # where lm-eval looks for the names
    for name, spec in config.items():
        assert (spec["action"], spec["bias"], spec["head_index"]) == ("add", None, None)
        added = spec["steering_vector"] * spec["steering_coefficient"]
        hooks.append(modules[name].register_forward_hook(lambda m, i, out, v=added: out + v))
    ids, mask = steering_case.draw_batch()
    with torch.no_grad():
        theirs = model(torch.tensor(ids).long(), attention_mask=torch.tensor(mask)).logits
    for hook in hooks:
        hook.remove()
    want = {l: torch.tensor(v.dose_NxD[l]) for l in (1, 3)}
    oracle = ref.steered_logits(model, torch.tensor(ids).long(), torch.tensor(mask), want)
    np.testing.assert_allclose(theirs[0], oracle[0], atol=1e-5)
    gpt2 = vector(model_type="gpt2")
    gpt2.save(tmp_path / "g.pt")
    assert torch.load(tmp_path / "g.pt", weights_only=True).keys() == {"h.1", "h.3"}


def test_steered_files_with_a_coefficient_and_other_actions(tmp_path):
    row = torch.arange(4.0)
    spec = {
        "steering_vector": row[None],
        "steering_coefficient": -2.0,
        "action": "add",
        "bias": None,
    }
    torch.save({"model.layers.5": spec}, tmp_path / "v.pt")
    found = rt.SteeringVector.load(tmp_path / "v.pt", n_layers=8)
    np.testing.assert_array_equal(found.directions_NxD[5], [0, -2, -4, -6])
    for change in ({"action": "clamp"}, {"bias": row}, {"head_index": 3}):
        torch.save({"layers.5": spec | change}, tmp_path / "v.pt")
        with pytest.raises(
            ValueError, match=r"v.pt: got '(add|clamp)' at 'layers.5'.*expected 'add'"
        ):
            rt.SteeringVector.load(tmp_path / "v.pt")


@pytest.mark.parametrize("name", ["vec_layer_2_Llama-2-7b-chat-hf.pt", "layer_2.pt", "layer2.pth"])
def test_a_file_a_layer_says_its_layer_by_name(tmp_path, name):
    torch.save(torch.arange(4.0).to(torch.float16), tmp_path / name)
    found = rt.SteeringVector.load(tmp_path / name, n_layers=6)
    assert found.layers == (2,) and found.directions_NxD.shape == (6, 4)
    np.testing.assert_array_equal(found.directions_NxD[2], [0, 1, 2, 3])


def test_a_tensor_of_all_layers_counts_from_the_embeddings_or_not(tmp_path):
    states = torch.arange(1.0, 9).reshape(4, 2)  # hidden_states of 3 blocks: row 0 the embeddings
    persona = tmp_path / "evil_response_avg_diff.pt"
    torch.save(states, persona)
    found = rt.SteeringVector.load(persona)
    np.testing.assert_array_equal(found.directions_NxD, states[1:])
    assert "n_layers" not in found.meta["unknown"]
    torch.save(states, tmp_path / "v.pt")
    for n_layers, want in ((3, states[1:]), (4, states)):
        found = rt.SteeringVector.load(tmp_path / "v.pt", n_layers)
        np.testing.assert_array_equal(found.directions_NxD, want)
    for n_layers in (None, 5, 2):
        with pytest.raises(ValueError, match=r"v.pt: got a tensor \[4, 2\] that does not say its"):
            rt.SteeringVector.load(tmp_path / "v.pt", n_layers)


@pytest.mark.parametrize("names", [("15", "3"), ("layer_15", "layer_3"), ("layers.15", "layers.3")])
@pytest.mark.parametrize("ending", ["safetensors", "npz", "pt"])
def test_plain_tensors_by_the_names_of_their_layers(tmp_path, names, ending):
    rows = {name: np.full(4, i + 1, np.float32) for i, name in enumerate(names)}
    path = tmp_path / f"v.{ending}"
    {
        "safetensors": lambda: save_file(rows, path, {"format": "pt"}),
        "npz": lambda: np.savez(path, **rows),
        "pt": lambda: torch.save({k: torch.tensor(v) for k, v in rows.items()}, path),
    }[ending]()
    found = rt.SteeringVector.load(path, n_layers=16)
    assert found.layers == (3, 15)
    np.testing.assert_array_equal(found.directions_NxD[[15, 3]], [[1] * 4, [2] * 4])
    assert found.meta["unknown"] == ["residual_norm", "mean"]


def test_the_files_of_svec_readers_have_what_they_ask_for(tmp_path):
    v = vector()
    v.save(tmp_path / "v.svec")
    found = json.loads((tmp_path / "v.svec").read_text())
    assert found["model_type"] == "llama" and found["explained_variances"].keys() == {"1", "3"}
    np.testing.assert_array_equal(np.float32(found["directions"]["3"]), v.directions_NxD[3])
    theirs = {"model_type": "qwen2", "directions": {"2": [[1, 2, 3]], "0": [4, 5, 6]}}
    (tmp_path / "t.svec").write_text(json.dumps(theirs | {"explained_variances": {}}))
    read = rt.SteeringVector.load(tmp_path / "t.svec", n_layers=3)
    np.testing.assert_array_equal(read.directions_NxD, [[4, 5, 6], [0, 0, 0], [1, 2, 3]])
    assert read.meta["model_type"] == "qwen2"


def test_plain_files_hold_one_tensor_a_layer(tmp_path):
    v = vector()
    v.save(tmp_path / "v.safetensors", "layers")
    v.save(tmp_path / "v.npz")
    for found in (load_file(tmp_path / "v.safetensors"), np.load(tmp_path / "v.npz")):
        np.testing.assert_array_equal(found["layer_3"], v.directions_NxD[3])
        assert {"layer_1", "layer_3"} <= set(found)


def test_what_a_format_cannot_say_is_refused_and_leaves_no_file(tmp_path):
    refused = [
        (steering_case.make_vector(model_type="llama"), "v.gguf", "", r"layer 0, .*--layers=1-"),
        (vector(model_type=""), "v.gguf", "", r"does not say its model's type.*--model-hint"),
        (vector(), "v.bin", "", r"v.bin: got the ending '.bin', expected .safetensors, .gguf"),
        (vector(), "v.gguf", "svec", r"v.gguf: got the ending '.gguf', expected .svec"),
        (vector(), "v.gguf", "hf", r"format: got 'hf', expected one of reptune, gguf"),
        (0 * vector(), "v.gguf", "", r"got no direction at layers \[1, 3\]"),
    ]
    for v, name, format, message in refused:
        with pytest.raises(ValueError, match=message):
            v.save(tmp_path / name, format)
    assert not list(tmp_path.iterdir())


ROW = np.ones(4, np.float32)
NO_VECTORS = {
    "mixed.gguf": (
        {"direction.1": ROW, "direction.2": ROW[:3]},
        r"shapes .*expected \[D\] at each",
    ),
    "name.gguf": ({"blk.1": ROW}, r"got blk.1 \(F32\), expected direction.N"),
    "half.gguf": ({"direction.1": ROW.astype(np.float16)}, r"got direction.1 \(F16\), expected"),
    "nan.gguf": ({"direction.1": ROW * np.nan}, r"not finite at layers \[1\]"),
    "deep.gguf": ({"direction.9": ROW}, "up to layer 9, expected a model of 4 layers"),
    "zero.gguf": ({"direction.1": 0 * ROW}, "no direction at"),
    "text.gguf": ("{}", "not a GGUF file"),
    "text.svec": ("{", "is not valid JSON"),
    "keys.svec": ('{"model_type": "x"}', "KeyError: 'directions'"),
    "list.svec": ('{"model_type": "x", "directions": []}', "AttributeError"),
    "heads.svec": ('{"model_type": "x", "directions": {"1": [[1, 2], [3, 4]]}}', "shapes .*2, 2"),
    "ours.npz": ({"layer_1": ROW, "reptune": "[]"}, "expected an object"),
    "object.npz": ({"layer_1": np.array([{}])}, "holds pickled objects, expected arrays"),
    "large.npz": ({"layer_1": np.full(4, 1e300)}, r"not finite at layers \[1\]"),
    "names.npz": ({"weight": ROW}, "got 'weight', expected a tensor for each layer"),
    "twice.npz": ({"1": ROW, "layer_1": ROW}, "got 'layer_1', expected"),
    "list.pt": ([torch.ones(3)], "got a list, expected a tensor or a dict"),
    "cube.pt": (torch.ones(2, 3, 4), r"got a tensor \[2, 3, 4\] that does not say"),
}


@pytest.mark.parametrize("name", NO_VECTORS)
def test_files_that_are_no_vectors_are_refused_by_name(tmp_path, name):
    content, message = NO_VECTORS[name]
    path = tmp_path / name
    if isinstance(content, str):
        path.write_text(content)
    else:
        write = {".gguf": write_gguf, ".npz": lambda p, rows: np.savez(p, **rows)}
        write.get(path.suffix, lambda p, value: torch.save(value, p))(path, content)
    with pytest.raises(ValueError, match=rf"{name}: .*{message}"):
        rt.SteeringVector.load(path, n_layers=4)


def test_a_model_is_no_control_vector(tmp_path):
    write_gguf(tmp_path / "v.gguf", {"direction.1": ROW}, "llama")
    with pytest.raises(ValueError, match=r"v.gguf: got architecture 'llama', expected 'controlvec"):
        rt.SteeringVector.load(tmp_path / "v.gguf")


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_file_of_any_format_is_refused_or_finite(name, tmp_path):
    """Cut, bytes changed, bytes put in: one line that names the file, or numbers."""
    vector().save(tmp_path / name)
    whole, rng = (tmp_path / name).read_bytes(), np.random.default_rng(0)
    refused = 0
    for i in range(60):
        data, at = bytearray(whole), int(rng.integers(0, len(whole)))
        some = rng.integers(0, 256, 8).astype(np.uint8).tobytes()
        if i % 3 == 0:
            del data[at:]
        elif i % 3 == 1:
            data[at] ^= 1 << int(rng.integers(0, 8))
        else:
            data[at:at] = some
        (tmp_path / name).write_bytes(data)
        try:
            assert np.isfinite(rt.SteeringVector.load(tmp_path / name).directions_NxD).all()
        except ValueError as error:
            refused += 1
            assert name in str(error) and "\n" not in str(error)
    assert refused > 20


def test_a_truncated_file_of_any_format_is_refused(tmp_path):
    for name in NAMES:
        path = tmp_path / name
        vector().save(path)
        whole = path.read_bytes()
        for keep in (0, 3, len(whole) // 2, len(whole) - 40):
            path.write_bytes(whole[:keep])
            with pytest.raises(ValueError, match=name):
                rt.SteeringVector.load(path)
