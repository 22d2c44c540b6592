"""Vectors are checked where they are made and where they are read."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import reptune_jax as rt
from reptune_jax.vectors.capture import Span, make_vector
from tests.support import steering_case, tiny

PAIRS = [("I love it. They are", "I hate it. They are"), ("A good day in", "A terrible day in")]


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return rt.load(str(tiny.make_llama(tmp_path_factory.mktemp("llama"))))


def arrays(**changes):
    v = steering_case.make_vector()
    found = {
        "directions_NxD": v.directions_NxD.copy(),
        "residual_norm_N": v.residual_norm_N.copy(),
        "mean_NxD": v.mean_NxD.copy(),
    }
    for name, value in changes.items():
        found[name][2] = value
    return found


@pytest.mark.parametrize("name", ["directions_NxD", "residual_norm_N", "mean_NxD"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_make_no_vector(name, value, tmp_path):
    with pytest.raises(ValueError, match=rf"vector.{name}: got numbers .* at layers \[2\]"):
        rt.SteeringVector(**arrays(**{name: value}), layers=(0, 1, 2, 3), meta={})
    path = tmp_path / "v.safetensors"
    steering_case.make_vector().save(path)
    about = {"format": "reptune_jax.vector.2", "layers": "[0, 1, 2, 3]", "meta": "{}"}
    stored = {k.rsplit("_", 1)[0]: v for k, v in arrays(**{name: value}).items()}
    assert stored.keys() == load_file(path).keys()
    save_file(stored, path, metadata=about)
    with pytest.raises(ValueError, match=rf"v.safetensors: vector.{name}: got numbers"):
        rt.SteeringVector.load(path)


def test_arithmetic_that_overflows_is_an_error():
    v = steering_case.make_vector()
    for dose in (np.inf, np.nan, 1e300):
        with pytest.raises(ValueError, match=r"directions_NxD: got numbers that are not finite"):
            dose * v


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"directions_NxD": np.ones(4)}, r"directions_NxD: got shape \[4\], expected \[layers, "),
        ({"residual_norm_N": np.ones(3)}, r"residual_norm_N: got shape \[3\], expected \[4\]"),
        ({"mean_NxD": np.ones((4, 3))}, r"mean_NxD: got shape \[4, 3\], expected \[4, 64\]"),
        ({"layers": (0, 4)}, r"vector.layers: got \[4\], expected layers from 0 to 3"),
        ({"layers": (-1,)}, r"vector.layers: got \[-1\]"),
    ],
)
def test_shapes_that_do_not_belong_together(fields, message):
    with pytest.raises(ValueError, match=message):
        rt.SteeringVector(**arrays() | {"layers": (0,), "meta": {}} | fields)


def test_a_zero_direction_steers_but_is_no_vector_to_keep(tmp_path):
    v = steering_case.make_vector()
    path = tmp_path / "v.safetensors"
    for nothing in (0 * v, v + -v, v.at([])):
        with pytest.raises(ValueError, match=r"v.safetensors: got no direction at layers"):
            nothing.save(path)
    assert not path.exists()
    v.save(path)
    tensors, about = load_file(path), {"format": "reptune_jax.vector.2", "meta": "{}"}
    tensors["directions"][3] = 0
    save_file(tensors, path, metadata=about | {"layers": "[1, 3]"})
    with pytest.raises(ValueError, match=r"got no direction at layers \[3\], expected one"):
        rt.SteeringVector.load(path)
    save_file(tensors, path, metadata=about | {"layers": "[0, 1, 2]"})
    assert rt.SteeringVector.load(path).layers == (0, 1, 2)


def test_one_pair_has_no_agreement(ours, tmp_path):
    vector = rt.extract(ours, PAIRS[:1])
    assert vector.meta["agreement"] == [None] * 4
    assert repr(vector).endswith(
        "mean_diff, position last, pairs 1, agreement unknown)".replace(
            "mean_diff", "method mean_diff"
        )
    )
    vector.save(tmp_path / "v.safetensors")
    assert rt.SteeringVector.load(tmp_path / "v.safetensors").meta == vector.meta
    both = rt.extract(ours, PAIRS)
    known = both.meta["agreement"]
    assert f"agreement {min(known):.2f} to {max(known):.2f})" in repr(both)


def test_sides_that_are_the_same_are_named(ours):
    same = ("A day. They are", "A day. They are")
    with pytest.raises(ValueError, match=r"same tokens on both sides.* in 2 of 4 \(number 1, 3,"):
        rt.extract(ours, [PAIRS[0], same, PAIRS[1], same])
    # what differs stands behind the position that is read
    sides = [("Tell me", " good"), ("Tell me", " bad")]
    with pytest.raises(ValueError, match=r"in 1 of 1 \(number 0, from 0\)"):
        rt.extract(ours, [tuple(sides)], position="last")
    assert rt.extract(ours, [tuple(sides)], position="response").layers == (0, 1, 2, 3)


def test_texts_that_are_read_at_their_first_token_are_counted(ours, capsys):
    a, b = Span([7], 0, 1), Span([8, 9], 1, 2)
    make_vector(ours, [a, b], [Span([9], 0, 1), Span([10, 9], 1, 2)], "mean_diff", {})
    assert "2 of 4 texts are read at their first token" in capsys.readouterr().out
    make_vector(ours, [b], [Span([10, 9], 1, 2)], "mean_diff", {})
    assert capsys.readouterr().out == ""


def test_norms_leave_out_a_long_first_token(ours):
    """As in real models, whose first token is a hundred times as long as the others."""
    tokens = np.array(ours.encode_prompt(PAIRS[0][0], chat=False))
    residual = np.asarray(ours.forward(tokens[None], capture=True).residual_NxBxTxD)[:, 0]
    assert len(tokens) > 2
    vector = rt.extract(ours, [(PAIRS[0][0], PAIRS[0][0] + "!")], position="all")
    other = np.array(ours.encode_prompt(PAIRS[0][0] + "!", chat=False))
    more = np.asarray(ours.forward(other[None], capture=True).residual_NxBxTxD)[:, 0]
    means = np.stack([residual[:, 1:].mean(1), more[:, 1:].mean(1)])
    want = np.linalg.norm(means.astype(np.float64), axis=-1).mean(0)
    np.testing.assert_allclose(vector.residual_norm_N, want, rtol=1e-4)
    np.testing.assert_allclose(vector.mean_NxD, means.mean(0), atol=1e-4)


def test_files_of_the_earlier_version_are_read_unless_they_counted_the_first_token(tmp_path):
    path, v = tmp_path / "v.safetensors", steering_case.make_vector(position="response")
    v.save(path)
    about = {"format": "reptune_jax.vector.1", "layers": json.dumps(v.layers)}
    save_file(load_file(path), path, metadata=about | {"meta": json.dumps(v.meta)})
    assert rt.SteeringVector.load(path).digest == v.digest
    save_file(load_file(path), path, metadata=about | {"meta": '{"position": "all"}'})
    with pytest.raises(ValueError, match=r"earlier version .* first token.*Run `extract` again"):
        rt.SteeringVector.load(path)
