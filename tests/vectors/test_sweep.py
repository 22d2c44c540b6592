"""A sweep is what its cells are one by one, steered in whole forward passes."""

import importlib

import numpy as np
import pytest

import reptune_jax as rt
from reptune_jax.report import responses
from reptune_jax.vectors import sweep as sweeps
from tests.support import steering_case, tiny, tiny_behavior

DOSES = (-2.0, 0.0, 1.0)
ASKED = [
    ("Tell me of the weather.", " It is good.", " It is terrible, truly."),
    ([{"role": "user", "content": "And of mountains? " * 3}], " Yes", " No."),
    ("City", " a", " b"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return rt.load(str(tiny.make_llama(tmp_path_factory.mktemp("llama"))), "float32")


@pytest.fixture(scope="module")
def vector():
    return steering_case.make_vector(layers=[1, 3])


def whole_passes(model, asked, steer):
    """[I, 2] by `score_ids`, every cell in a call of its own."""
    ids, starts = [], []
    for prompt, *answers in asked:
        before = model.encode_prompt(prompt)
        for answer in answers:
            ids.append(before + model.tokenizer.encode(answer, add_special_tokens=False))
            starts.append(len(before))
    found = model.score_ids(ids, starts, steer)
    return np.reshape([logp for logp, _ in found], (len(asked), 2))


@pytest.mark.parametrize(
    ("operation", "tokens"),
    [
        ("add", "answer"),
        ("add", "all"),
        ("clamp", "answer"),
        ("ablate", "generated"),
        ("add", "last:2"),
    ],
)
def test_every_cell_is_its_own_steered_pass(model, vector, operation, tokens):
    found = rt.sweep(model, vector, ASKED, DOSES, operation, tokens, batch_size=3)
    assert found.logp_LxKxIx2.shape == (2, 3, 3, 2)
    for l, layer in enumerate(found.layers):
        for k, dose in enumerate(found.doses):
            steer = rt.Intervention(vector.at(layer), dose, operation, tokens) if dose else None
            want = whole_passes(model, ASKED, steer)
            np.testing.assert_allclose(found.logp_LxKxIx2[l, k], want, atol=2e-4)
    base = found.logp_LxKxIx2[:, 1]
    assert (base == base[0]).all()  # measured once
    if tokens != "generated":
        assert np.ptp(found.logp_LxKxIx2, axis=(0, 1)).min() > 1e-3  # something was moved


def test_letters_are_read_off_one_token(model, vector, monkeypatch):
    """As lettered choices are: both answers from the same rows, and none is run itself."""
    asked = [("Which, a or b?", "a", "b"), ("The other?", "c", "d")]
    assert all(len(model.tokenizer.encode(t, add_special_tokens=False)) == 1 for t in "abcd")
    want = rt.sweep(model, vector, asked, DOSES).logp_LxKxIx2
    for l, layer in enumerate(vector.layers):
        steer = rt.Intervention(vector.at(layer), 1.0, tokens="answer")
        np.testing.assert_allclose(want[l, 2], whole_passes(model, asked, steer), atol=2e-4)
    monkeypatch.setattr(sweeps.score, "continuations", None)
    rt.sweep(model, vector, asked, DOSES)


def test_a_sweep_that_is_stopped_goes_on(model, vector, tmp_path, monkeypatch):
    """What is kept is not computed again and comes to what one call gives; others are refused."""
    keep, want = tmp_path / "s.safetensors", rt.sweep(model, vector, ASKED, DOSES)
    cells, asked = sweeps._cells, []

    def stops(model, done, cells_C, prompt, *rest):
        asked.append(prompt)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return cells(model, done, cells_C, prompt, *rest)

    monkeypatch.setattr(sweeps, "_cells", stops)
    with pytest.raises(KeyboardInterrupt):
        rt.sweep(model, vector, ASKED, DOSES, keep=keep)
    found = rt.sweep(model, vector, ASKED, DOSES, keep=str(keep))
    assert [asked.count(prompt) for prompt in asked] == [1, 2, 2, 1]
    np.testing.assert_array_equal(found.logp_LxKxIx2, want.logp_LxKxIx2)
    longer = rt.sweep(model, vector, [*ASKED, ASKED[0]], DOSES, keep=keep)
    assert len(asked) == 5
    np.testing.assert_array_equal(longer.logp_LxKxIx2[:, :, 3], want.logp_LxKxIx2[:, :, 0])
    for other, named in (
        ({"asked": ASKED[::-1]}, "other prompts"),
        ({"asked": ASKED[:1]}, "other prompts"),
        ({"doses": (0.0, 2.0)}, "other cells"),
        ({"vector": vector.at(1)}, "other vector, cells"),
        ({"operation": "clamp", "tokens": "all"}, "other operation, tokens"),
        ({"keep": tmp_path / "s.npz"}, "ending in .safetensors"),
    ):
        how = {"vector": vector, "asked": ASKED, "doses": DOSES, "keep": keep} | other
        with pytest.raises(ValueError, match=named):
            rt.sweep(model, **how)
    keep.write_bytes(keep.read_bytes()[:-9])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        rt.sweep(model, vector, ASKED, DOSES, keep=keep)
    vector.save(keep)
    with pytest.raises(ValueError, match="other format, model"):
        rt.sweep(model, vector, ASKED, DOSES, keep=keep)


def test_what_is_read_off_a_sweep():
    logodds = np.array([[[-1.0, 2.0], [0.0, 0.0], [1.0, -2.0]]])  # layers, doses, prompts
    logp = np.log(0.3) + np.stack([logodds / 2, -logodds / 2], axis=-1)
    found = rt.Sweep((4,), (-1.0, 0.0, 1.0), logp)
    np.testing.assert_allclose(found.logodds_LxKxI, logodds, atol=1e-12)
    np.testing.assert_allclose(found.slope_LxI, [[1.0, -2.0]])
    assert found.wrong_L.tolist() == [0.5]
    np.testing.assert_allclose(found.coverage_LxK[0, 1], 0.6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"doses": (1.0,)}, "two or more"),
        ({"doses": (1.0, 1.0)}, "all different"),
        ({"asked": []}, "got none, expected"),
        ({"asked": [("a", "b", "")]}, "expected text in each"),
        ({"operation": "push"}, "operation: got 'push'"),
        ({"tokens": "some"}, "tokens: got 'some'"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_what_cannot_be_swept_is_named(model, vector, change, message):
    with pytest.raises(ValueError, match=message):
        rt.sweep(model, vector, **{"asked": ASKED} | change)


def test_the_program_prints_a_line_a_layer_and_draws(model, vector, tmp_path, capsys):
    program = importlib.import_module("reptune_jax.sweep")  # rt.sweep is the function
    vector.save(tmp_path / "v.safetensors")
    given = tmp_path / "v.safetensors", model.name, str(tiny_behavior.write(tmp_path))
    to = tmp_path / "out.png"
    keep = str(tmp_path / "done.safetensors")
    swept = program.run(*given, to=str(to), doses="1,0,-1", prompts=3, tokens="all", keep=keep)
    assert swept.doses == (1.0, 0.0, -1.0) and swept.logodds_LxKxI.shape == (2, 3, 3)
    head, *lines, about = capsys.readouterr().out.splitlines()[:4]
    assert "change at -1, 1" in head and "3 prompts, 2 layers, 3 doses" in about
    change = responses.change_LxKxI(swept).mean(-1)
    for line, layer, moved, slope in zip(
        lines, (1, 3), change, swept.slope_LxI.mean(1), strict=True
    ):
        assert line.split()[0] == str(layer) and f"{slope:+.3f} [" in line
        assert f"{moved[2]:+.2f}, {moved[0]:+.2f}" in line
    assert sum(" * " in line for line in lines) == 1
    assert to.read_bytes().startswith(b"\x89PNG")
    for change, message in (
        ({"to": str(to)}, "expected a new file"),
        ({"doses": "1,b"}, "expected numbers"),
        ({"behavior": ""}, "behavior: got none"),
        ({"behavior": "honesty"}, "has no open prompts"),
    ):
        with pytest.raises(ValueError, match=message):
            program.run(**{"path": given[0], "model": given[1], "behavior": given[2]} | change)
