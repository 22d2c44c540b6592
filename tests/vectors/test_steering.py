"""Behavior vectors: arithmetic, files, online steering against torch hooks, extraction."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import reptune_jax as rt
from reptune_jax import lm
from reptune_jax.hub import templates
from reptune_jax.model.intervene import Steer
from tests.support import tiny
from tests.support import torch_reference as ref
from tests.support.steering_case import (
    TOLERANCE,
    assert_equals_torch,
    draw_batch,
    hooks,
    make_vector,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_llama(tmp_path_factory.mktemp("llama"), mlp_bias=True)


@pytest.fixture(scope="module")
def ours(folder):
    return rt.load(str(folder))


@pytest.fixture(scope="module")
def theirs(folder):
    return ref.load(folder)


def test_arithmetic():
    v, w = make_vector(0, layers=[1, 2]), make_vector(1, layers=[2, 3])
    np.testing.assert_array_equal((v * 1.5).directions_NxD, 1.5 * v.directions_NxD)
    np.testing.assert_array_equal((2 * v).directions_NxD, (v * 2).directions_NxD)
    np.testing.assert_array_equal((-v).directions_NxD, -v.directions_NxD)
    both = v + w
    np.testing.assert_array_equal(both.directions_NxD, v.directions_NxD + w.directions_NxD)
    assert both.layers == (1, 2, 3)
    told = make_vector(0, model="m", behavior="b", agreement=[0.5] * 4)
    assert (told + make_vector(1, behavior="b", agreement=[0.1] * 4)).meta == {
        "norm": "raw", "model": "m", "behavior": "b",
    }  # fmt: skip
    assert (v * 1.5).directions_NxD.dtype == np.float32
    np.testing.assert_array_equal(v.directions_NxD, make_vector(0, [1, 2]).directions_NxD)  # intact


def test_at_keeps_only_these_layers():
    v = make_vector()
    one = v.at(layers=[3, 1])
    assert one.layers == (1, 3)
    np.testing.assert_array_equal(one.directions_NxD[[1, 3]], v.directions_NxD[[1, 3]])
    assert not one.directions_NxD[[0, 2]].any()
    with pytest.raises(ValueError, match=r"layers: got \[0, 7\], expected some of \[1, 3\]"):
        one.at([0, 1, 7])


def test_a_dose_is_a_class_difference_or_a_residual_norm():
    raw = make_vector()
    np.testing.assert_array_equal(raw.dose_NxD, raw.directions_NxD)
    unit = raw.unit()
    assert unit.meta["norm"] == "unit" and raw.meta["norm"] == "raw"
    np.testing.assert_allclose(np.linalg.norm(unit.directions_NxD, axis=1), 1, rtol=1e-6)
    dose = (0.5 * unit).dose_NxD
    np.testing.assert_allclose(np.linalg.norm(dose, axis=1), raw.residual_norm_N / 2, rtol=1e-6)
    np.testing.assert_allclose(unit.unit().directions_NxD, unit.directions_NxD, rtol=1e-6)
    assert not raw.at([1]).unit().directions_NxD[0].any()  # and no NaN
    with pytest.raises(ValueError, match="got doses in raw and in unit units, expected the same"):
        raw + unit


def test_random_control_has_the_same_lengths_and_another_direction():
    v = make_vector(layers=[1, 2])
    control = v.random_like(7)
    lengths = [np.linalg.norm(x.directions_NxD, axis=1) for x in (v, control)]
    np.testing.assert_allclose(lengths[1], lengths[0], rtol=1e-5)
    cosine_N = np.sum(v.directions_NxD * control.directions_NxD, 1)[1:3] / lengths[0][1:3] ** 2
    assert np.abs(cosine_N).max() < 0.5
    assert control.digest == v.random_like(7).digest != v.random_like(8).digest
    assert control.meta["method"] == "random:7"


def test_digest_is_of_the_numbers():
    v = make_vector()
    assert v.digest == make_vector(other="meta").digest
    assert len({v.digest, (2 * v).digest, v.at([1]).digest, make_vector(1).digest}) == 4


def test_a_saved_vector_is_read_back_whole(tmp_path):
    v = make_vector(layers=[1, 3], model="org/name", pairs=7, agreement=[0.5, 0.25])
    path = tmp_path / "deep" / "honesty.safetensors"
    v.save(path)
    again = rt.SteeringVector.load(path)
    for field in ("directions_NxD", "residual_norm_N", "mean_NxD"):
        np.testing.assert_array_equal(getattr(again, field), getattr(v, field))
    assert (again.layers, again.meta, again.digest) == (v.layers, v.meta, v.digest)
    assert [p.name for p in path.parent.iterdir()] == ["honesty.safetensors"]


def test_a_failed_save_leaves_what_was_there(tmp_path):
    v = make_vector()
    v.save(tmp_path / "v.safetensors")
    before = (tmp_path / "v.safetensors").read_bytes()
    with pytest.raises(TypeError, match="not JSON serializable"):
        make_vector(1, bad=object()).save(tmp_path / "v.safetensors")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"v.safetensors": before}


def test_files_that_are_no_vectors_are_refused(tmp_path, folder):
    load = rt.SteeringVector.load
    path = tmp_path / "v.safetensors"
    make_vector().save(path)
    whole = path.read_bytes()
    for keep in (0, 6, 100, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match=r"v.safetensors: not a readable safetensors file"):
            load(path)
    with pytest.raises(ValueError, match=r"got format 'pt', expected 'reptune_jax.vector.2'"):
        load(folder / "model.safetensors")
    path.write_bytes(whole)
    tensors = load_file(path)
    del tensors["mean"]
    about = {"format": "reptune_jax.vector.2", "layers": json.dumps([0]), "meta": "{}"}
    save_file(tensors, path, metadata=about)
    with pytest.raises(ValueError, match=r"v.safetensors: lacks mean.* Run `extract` again"):
        load(path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "absent.safetensors")


def test_a_vector_of_another_model_is_refused(ours):
    ids = np.ones((1, 4), np.int32)
    for wrong in (make_vector(layers=range(3), N=3), make_vector(D=32, model="org/other")):
        with pytest.raises(ValueError, match=r"expected \[4, 64\]. Extract it on this model"):
            ours.forward(ids, steer=wrong)
        with pytest.raises(ValueError, match=r"expected \[4, 64\]"):
            rt.bake(ours, wrong)
        with pytest.raises(ValueError, match="vector: got"):
            make_vector() + wrong
    vector = make_vector(model="org/other", model_sha="abc")
    with pytest.raises(ValueError, match=r"made on org/other \(abc\), expected one made on mine"):
        vector.check_model(ours.sha, "mine")
    make_vector(model_sha=ours.sha).check_model(ours.sha, "mine")


def test_the_library_names_both_models_where_a_vector_of_the_same_shape_is_of_another(ours, capsys):
    ids, said = np.ones((1, 4), np.int32), "vector: made on org/like (abc), used on"
    ours.forward(ids, steer=make_vector(model="org/like", model_sha=ours.sha))
    ours.forward(ids, steer=make_vector(model="org/like"))  # of an old file, which does not say
    assert said not in capsys.readouterr().out
    ours.forward(ids, steer=make_vector(model="org/like", model_sha="abc"))
    assert f"{said} {ours.name} ({ours.sha})" in capsys.readouterr().out
    rt.bake(ours, make_vector(model="org/baked", model_sha="abc"))
    assert "made on org/baked (abc)" in capsys.readouterr().out


def test_a_vector_says_how_it_was_made_and_of_what(ours):
    pairs = [("I love it. They are", "I hate it. They are"), ("Good in", "Bad in")]
    vec = rt.extract(ours, pairs)
    want = {
        "operation": "add", "layer_base": 0, "position": "last", "norm": "raw", "pairs": 2,
        "method": "mean_diff", "model_sha": ours.sha, "model_type": "llama",
        "template": templates.template_sha(ours.tokenizer),
    }  # fmt: skip
    assert {key: vec.meta[key] for key in want} == want
    assert vec.meta["hook"].startswith("residual stream, output of block l")
    shas = {rt.extract(ours, p).meta["data_sha"] for p in (pairs, pairs[:1], pairs[::-1])}
    assert len(shas) == 3 and vec.meta["data_sha"] in shas


# ---------------------------------------------------------------- online steering


def test_steered_logits_are_those_of_torch_hooks(ours, theirs):
    ids, mask = draw_batch()
    raw = make_vector(layers=[1, 3])
    for vector in (raw, -2 * raw.at([1]), 0.3 * raw.unit()):
        logits = ours.forward(ids, mask, steer=vector).logits_BxTxV
        assert_equals_torch(logits, theirs, ids, mask, hooks(vector.dose_NxD))
    plain = ours.forward(ids, mask).logits_BxTxV
    assert np.abs(np.asarray(logits - plain)).max() > 0.1


def test_rows_with_their_own_layer_and_dose_equal_separate_runs(ours, theirs):
    """An intervention is data: a whole sweep is one compiled program."""
    ids, mask = draw_batch()
    ids, mask = np.repeat(ids[:1], 3, axis=0), np.repeat(mask[:1], 3, axis=0)
    directions = make_vector().directions_NxD
    conditions = [(0, 1.5), (3, -2.0), (2, 0.0)]
    add_NxB = np.zeros((4, 3), np.float32)
    for row, (layer, dose) in enumerate(conditions):
        add_NxB[layer, row] = dose
    steer = Steer(directions, add_NxB, np.zeros((4, 3)), np.ones((3, 24)))
    logits = np.asarray(ours.forward(ids, mask, steer=steer).logits_BxTxV)
    for row, (layer, dose) in enumerate(conditions):
        one = slice(row, row + 1)
        vectors = {layer: torch.tensor(dose * directions[layer])}
        assert_equals_torch(logits[one], theirs, ids[one], mask[one], vectors)

    compiled = lm._forward._cache_size()
    for layer, dose in [(1, 0.5), (2, 9.0)]:
        other = dataclasses.replace(steer, add_NxB=np.zeros((4, 3), np.float32))
        other.add_NxB[layer] = dose
        ours.forward(ids, mask, steer=other)
    assert lm._forward._cache_size() == compiled


def test_ablation_removes_the_component_where_it_is_asked_for(ours):
    ids, mask = draw_batch()
    v = make_vector().directions_NxD
    ablate_NxB = np.zeros((4, 3), np.float32)
    ablate_NxB[2] = [1.0, 0.25, 0.0]  # all of it, a quarter, nothing
    token_BxT = np.ones((3, 24))
    token_BxT[0, :6] = 0
    steer = Steer(v, np.zeros((4, 3), np.float32), ablate_NxB, token_BxT)
    plain = np.asarray(ours.forward(ids, mask, capture=True).residual_NxBxTxD)
    got = np.asarray(ours.forward(ids, mask, steer=steer, capture=True).residual_NxBxTxD)
    np.testing.assert_allclose(got[:2], plain[:2], atol=1e-5)  # below the layer
    u = v[2] / np.linalg.norm(v[2])
    share = ablate_NxB[2][:, None] * token_BxT
    want = plain[2] - (share * (plain[2] @ u))[..., None] * u
    np.testing.assert_allclose(got[2], want, atol=1e-4)
    assert np.abs(got[2, 0, 6:] @ u).max() < 1e-4 < np.abs(plain[2, 0, 6:] @ u).min()
    assert np.abs(got[3, 0, 6:] - plain[3, 0, 6:]).max() > 0.01


def test_ablation_comes_before_addition(ours):
    ids, mask = draw_batch()
    v = make_vector().directions_NxD
    ones_NxB = np.ones((4, 3), np.float32) * np.array([[0], [0], [1], [0]], np.float32)
    steer = Steer(v, 3 * ones_NxB, ones_NxB, np.ones((3, 24)))
    got = np.asarray(ours.forward(ids, mask, steer=steer, capture=True).residual_NxBxTxD)
    length = np.linalg.norm(v[2])
    np.testing.assert_allclose(got[2] @ (v[2] / length), 3 * length, rtol=1e-4)


def test_a_zero_layer_changes_nothing(ours):
    ids, mask = draw_batch()
    nothing = make_vector(layers=[])
    logits = ours.forward(ids, mask, steer=nothing).logits_BxTxV
    np.testing.assert_allclose(logits, ours.forward(ids, mask).logits_BxTxV, atol=1e-5)


# ---------------------------------------------------------------- extraction

CLAIMS = ["Grass is green", "The moon is a good lamp for reading at night", "Two and two is four"]


def raw_pairs():
    return [
        (f"Be honest. {c}\nAnswer: yes", f"Tell me lies, always. {c}\nAnswer: no") for c in CLAIMS
    ]


def completed(pairs):
    return [
        tuple((p, side) for p in pair)
        for pair, side in zip(pairs, [" a", " bc", " d"], strict=True)
    ]


def torch_means(hf_model, tokenizer, pairs, where):
    """[2, N, D]: mean residual of each side; `where(ids, prompt length)` -> token indices."""
    sides = []
    for side in (0, 1):
        rows = []
        for pair in pairs:
            text = (pair[side], "") if isinstance(pair[side], str) else pair[side]
            ids = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in text]
            one = torch.tensor([ids[0] + ids[1]])
            residual = ref.residuals(hf_model, one, torch.ones_like(one))[:, 0]
            rows.append(residual[:, where(one[0].tolist(), len(ids[0]))].mean(1))
        sides.append(torch.stack(rows).numpy())
    return np.stack(sides)  # [2, pairs, N, D]


@pytest.mark.parametrize("position", ["last", "before_answer", "response", "all", -3])
def test_extract_is_the_mean_difference_of_torch_residuals(position, ours, theirs):
    newline = ours.tokenizer("\n", add_special_tokens=False)["input_ids"]
    pairs = completed(raw_pairs()) if position == "response" else raw_pairs()
    where = {
        "last": lambda ids, n: [n - 1],
        "before_answer": lambda ids, n: [n - 1 - ids[n - 1 :: -1].index(newline[0])],
        "response": lambda ids, n: list(range(n, len(ids))),
        "all": lambda ids, n: list(range(1, len(ids))),
        -3: lambda ids, n: [n - 3],
    }[position]
    vector = rt.extract(ours, pairs, position=position, batch_size=2)
    means = torch_means(theirs, ours.tokenizer, pairs, where)
    difference = means[0].mean(0) - means[1].mean(0)
    scale = np.linalg.norm(difference, axis=1, keepdims=True)
    assert np.abs((vector.directions_NxD - difference) / scale).max() < TOLERANCE
    np.testing.assert_allclose(vector.mean_NxD, means.mean((0, 1)), atol=1e-4)
    norms = np.linalg.norm(means, axis=-1).mean((0, 1))
    np.testing.assert_allclose(vector.residual_norm_N, norms, rtol=1e-4)
    assert vector.layers == (0, 1, 2, 3)
    assert (vector.meta["model_sha"], vector.meta["position"]) == (ours.sha, str(position))

    unit = means[0] - means[1]
    unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
    cosines = np.einsum("pnd,qnd->npq", unit, unit)
    apart = [(0, 1), (0, 2), (1, 2)]
    agreement = np.mean([[c[p, q] for p, q in apart] for c in cosines], axis=1)
    np.testing.assert_allclose(vector.meta["agreement"], agreement, atol=1e-3)


def test_extraction_that_cannot_be_done_is_refused(ours):
    pairs = [("Yes.", "No.")]
    for kwargs, message in [
        ({"method": "umap"}, "method: got 'umap', expected one of mean_diff, pca, "),
        ({"position": "first"}, "position: got 'first', expected last, before_answer"),
        ({"position": "before_answer"}, "no line starts with 'Answer'"),
        ({"position": "response"}, "nothing follows the prompt"),
        ({"position": -40}, "the prompt has"),
    ]:
        with pytest.raises(ValueError, match=message):
            rt.extract(ours, pairs, **kwargs)
    with pytest.raises(ValueError, match="pairs: got none"):
        rt.extract(ours, [])


def test_probe_is_centred_only_on_request():
    v = make_vector()
    assert not np.asarray(v.probe().center_NxD).any()
    np.testing.assert_array_equal(v.probe(center=True).center_NxD, v.mean_NxD)
    np.testing.assert_array_equal(v.probe().direction_NxD, jnp.asarray(v.directions_NxD))
