"""`reptune vector`: files in, files and tables out, and refusals before anything is written."""

import dataclasses
import html
import re

import numpy as np
import pytest
from matplotlib import image

import reptune_jax as rt
from reptune_jax import vector
from tests.support import steering_case, tiny

META = {"model": "org/x", "model_sha": "abc", "model_type": "llama", "behavior": "cheer"}


@pytest.fixture
def files(tmp_path):
    """a: raw, layers 0 to 3; b: unit, layers 1 and 3."""
    a = steering_case.make_vector(0, agreement=[0.1, 0.2, 0.3, 0.4], **META)
    b = steering_case.make_vector(1, layers=[1, 3], **META).unit()
    a.save(tmp_path / "a.safetensors")
    b.save(tmp_path / "b.safetensors")
    return tmp_path, a, b


def run(folder, name, *paths, **options):
    vector.run([name, *(str(folder / path) for path in paths)], **options)


def test_convert_scales_and_keeps_the_layers_that_are_named(files):
    folder, a, _ = files
    run(folder, "convert", "a.safetensors", "v.gguf", layers="1-2", scale=-2.0)
    found = rt.SteeringVector.load(folder / "v.gguf")
    assert found.layers == (1, 2) and found.meta["model_sha"] == "abc"
    np.testing.assert_allclose(found.directions_NxD[[1, 2]], -2 * a.directions_NxD[[1, 2]])
    run(folder, "convert", "v.gguf", "w.safetensors")
    again = rt.SteeringVector.load(folder / "w.safetensors")
    np.testing.assert_array_equal(again.directions_NxD, found.directions_NxD)


@pytest.mark.parametrize(
    ("text", "found"),
    [("3", [3]), ("1-", [1, 3, 7]), ("2-7", [3, 7]), ("7, 0-1", [7, 0, 1]), ("2", [2])],
)
def test_layers_as_people_type_them(text, found):
    assert vector.parse_layers(text, [0, 1, 3, 7]) == found


@pytest.mark.parametrize("text", ["x", "-3", "1-2-3", "8-", "", "1.5"])
def test_layers_that_are_none(text):
    with pytest.raises(ValueError, match="layers: got"):
        vector.parse_layers(text, [0, 1, 3, 7])


def test_a_foreign_vector_is_given_its_model_and_a_known_one_is_checked(files):
    folder, a, _ = files
    model = str(tiny.make_llama(folder / "llama"))
    dataclasses.replace(a, meta={}).at([2]).save(folder / "v.pt")
    with pytest.raises(ValueError, match=r"v.pt: does not say how many layers .*--model=NAME"):
        run(folder, "convert", "v.pt", "w.safetensors")
    run(folder, "convert", "v.pt", "w.safetensors", model=model)
    found = rt.SteeringVector.load(folder / "w.safetensors")
    loaded = rt.load(model)
    assert (found.meta["model_sha"], found.meta["model_type"]) == (loaded.sha, "llama")
    assert found.meta["model"] == "llama" and found.directions_NxD.shape == (4, 64)
    with pytest.raises(ValueError, match=r"made on org/x \(abc\), expected one made on .*llama"):
        run(folder, "convert", "a.safetensors", "x.svec", model=model)
    wide = steering_case.make_vector(D=32, layers=[1])
    wide.save(folder / "wide.npz")
    with pytest.raises(ValueError, match=r"got \[4, 32\] .* expected \[4, 64\]"):
        run(folder, "convert", "wide.npz", "x.svec", model=model)
    assert not (folder / "x.svec").exists()


def test_info_says_whose_it_is_and_how_long(files, capsys):
    folder, a, b = files
    run(folder, "info", "a.safetensors")
    text = capsys.readouterr().out
    assert f"digest: {a.digest}\n" in text and "model_sha: abc\n" in text
    rows = [line.split() for line in text.splitlines()[-4:]]
    norm_N = np.linalg.norm(a.directions_NxD, axis=1)
    want = np.stack([range(4), norm_N, norm_N / a.residual_norm_N, a.meta["agreement"]], 1)
    np.testing.assert_allclose(np.array(rows, float), want, rtol=2e-3, atol=6e-4)
    run(folder, "info", "b.safetensors")
    layer, norm, share, agreement = capsys.readouterr().out.splitlines()[-1].split()
    assert (layer, share, agreement) == ("3", "1.000", "-")  # a unit vector's dose is one residual
    np.testing.assert_allclose(float(norm), b.residual_norm_N[3], rtol=1e-3)


def test_diff_compares_what_a_dose_adds(files, capsys):
    folder, a, b = files
    run(folder, "diff", "a.safetensors", "b.safetensors")
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert lines[0].split()[:3] == ["0", "only", "in"] and "a.safetensors" in lines[0]
    x, y = a.directions_NxD[3], b.directions_NxD[3]
    layer, cosine, ratio = map(float, lines[3].split())
    assert layer == 3
    np.testing.assert_allclose(cosine, x @ y / np.linalg.norm(x) / np.linalg.norm(y), atol=1e-4)
    np.testing.assert_allclose(ratio, b.residual_norm_N[3] / np.linalg.norm(x), rtol=1e-3)


def test_merge_is_the_weighted_sum_of_what_doses_add(files):
    folder, a, b = files
    a.at([1, 2]).save(folder / "a.gguf")
    run(folder, "merge", "b.safetensors", "a.gguf", "m.safetensors", weights="0.5,-2")
    found = rt.SteeringVector.load(folder / "m.safetensors")
    want = 0.5 * b.dose_NxD - 2 * a.at([1, 2]).dose_NxD
    np.testing.assert_allclose(found.dose_NxD, want, rtol=1e-5)
    assert (found.layers, found.meta["norm"], found.meta["method"]) == ((1, 2, 3), "raw", "merge")
    assert found.meta["behavior"] == "cheer" and "agreement" not in found.meta
    assert [(m["weight"], m["behavior"]) for m in found.meta["merged"]] == [
        (0.5, "cheer"),
        (-2, "cheer"),
    ]
    dataclasses.replace(a, meta={}).save(folder / "bare.pt")  # says nothing but its directions
    run(folder, "merge", "bare.pt", "a.safetensors", "n.safetensors", weights="1,-3")
    found = rt.SteeringVector.load(folder / "n.safetensors")
    np.testing.assert_allclose(found.dose_NxD, -2 * a.dose_NxD, rtol=1e-5)
    assert found.meta["model_sha"] == "abc" and "unknown" not in found.meta
    (folder / "n.safetensors").unlink()
    steering_case.make_vector(model="org/y", model_sha="other").save(folder / "y.safetensors")
    with pytest.raises(ValueError, match=r"made on org/y \(other\), expected .*org/x \(abc\)"):
        run(folder, "merge", "a.safetensors", "y.safetensors", "n.safetensors")
    for weights in ("1", "1,x", "1,2,3", "1,inf"):
        with pytest.raises(ValueError, match=r"weights: got .*expected 2 numbers"):
            run(folder, "merge", "a.safetensors", "b.safetensors", "n.npz", weights=weights)
    assert not list(folder.glob("n.*"))


def test_plot_draws_a_picture_and_files_of_one_depth(files):
    folder, a, _ = files
    a.at([1, 2]).save(folder / "a.gguf")
    for names in (["a.safetensors"], ["a.safetensors", "b.safetensors", "a.gguf"]):
        to = f"{len(names)}.png"
        run(folder, "plot", *names, to)
        picture = image.imread(folder / to)
        assert picture.shape[0] > 500 and picture[..., :3].std() > 0.05
    same = vector._compared(a, a)  # with the next layer
    assert same.keys() == {0, 1, 2}
    assert same[1] == pytest.approx(vector._cosine(a.directions_NxD[1], a.directions_NxD[2]))


@pytest.mark.parametrize(
    ("name", "paths", "message"),
    [
        ("join", [], r"vector: got 'join', expected one of convert, info, diff, merge, plot"),
        ("info", [], r"info: got 0 files, expected 1"),
        ("merge", ["a.safetensors", "m.npz"], r"merge: got 2 files, expected 3 or more"),
        ("info", ["none.gguf"], r"none.gguf: no such file"),
        ("convert", ["a.safetensors", "b.safetensors"], r"b.safetensors: is there already"),
        ("merge", ["a.safetensors"] * 2 + ["b.safetensors"], r"b.safetensors: is there already"),
        ("plot", ["a.safetensors", "b.safetensors"], r"b.safetensors: is there already"),
        ("plot", ["a.safetensors", "p.svg"], r"got the ending '.svg', expected .png"),
        ("convert", ["a.safetensors", "v.gguf"], r"layer 0, expected layers from 1"),
        ("convert", ["a.safetensors", "v.txt"], r"got the ending '.txt', expected .safetensors"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(files, name, paths, message):
    folder, *_ = files
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=message):
        run(folder, name, *paths)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_vector_is_read_with_its_model(files, capsys):
    folder, a, _ = files
    model = str(tiny.make_llama(folder / "llama"))
    a.at([1, 2, 3]).save(folder / "v.gguf")  # which does not say how many layers there are
    run(folder, "lens", "v.gguf", model=model, layers="1,3", top=2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines if " + " in line] == [["1", "+"], ["3", "+"]]
    assert sum(" - " in line for line in lines) == 2
    text = "I <love> gardens."
    for name in ("x.html", "x.png"):
        run(folder, "read", "v.gguf", name, model=model, text=text, layers="2-")
    page = (folder / "x.html").read_text()
    assert html.unescape(re.sub("<[^>]*>", "", page)).count(text) == 2  # at layers 2 and 3
    assert image.imread(folder / "x.png").ndim == 3


def test_what_cannot_be_read_is_refused_before_anything_is_written(files):
    folder = files[0]
    for paths, options, message in [
        (("lens", "a.safetensors"), {}, "model: got none, expected a folder"),
        (("read", "a.safetensors", "x.html"), {"text": "Hi"}, "model: got none"),
        (("read", "a.safetensors", "x.html"), {"model": "m"}, "text: got none, expected some"),
        (("read", "a.safetensors", "x.pdf"), {"text": "Hi"}, "'.pdf', expected .html or .png"),
        (("read", "a.safetensors", "b.safetensors"), {"text": "Hi"}, "is there already"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(folder, *paths, **options)
    assert not list(folder.glob("x.*"))
