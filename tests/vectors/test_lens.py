"""What a vector reads, against numpy on captured residuals; the colored text."""

import dataclasses
import re

import jax
import numpy as np
import pytest

import reptune_jax as rt
from reptune_jax.report import tokens
from reptune_jax.vectors import lens
from tests.support import tiny
from tests.support.steering_case import make_vector


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    jax.config.update("jax_disable_most_optimizations", True)
    yield rt.load(str(tiny.make_llama(tmp_path_factory.mktemp("llama"))))
    jax.config.update("jax_disable_most_optimizations", False)


def test_the_lens_is_the_final_norm_and_the_unembedding_of_either_sign(ours):
    table_VxD = np.asarray(ours.params["head"]["embedding"], np.float64)
    scale_D = np.asarray(ours.params["final_norm"]["scale"], np.float64)
    for vector in (make_vector(layers=[1, 3]), make_vector(1, unknown=["residual_norm"])):
        found = lens.top_tokens(ours, vector, top=3)
        assert list(found) == list(vector.layers)
        for l, (toward, away) in found.items():
            v_D = vector.directions_NxD[l].astype(np.float64)
            logits_V = table_VxD @ (v_D / np.sqrt(np.square(v_D).mean()) * scale_D)
            order = np.argsort(-logits_V)
            assert toward == [ours.tokenizer.decode([i]) for i in order[:3]]
            assert away == [ours.tokenizer.decode([i]) for i in order[::-1][:3]]


def test_a_projection_is_in_doses_from_the_mean_of_both_classes(ours):
    ids = ours.encode_prompt("What do you think of the weather?", chat=False)
    h_NxTxD = np.asarray(ours.forward(np.array([ids]), capture=True).residual_NxBxTxD)[:, 0]
    raw = make_vector(layers=[1, 2])
    unknown = dataclasses.replace(raw, mean_NxD=0 * raw.mean_NxD)  # as other tools' files are read
    for vector in (raw, raw.unit(), 3 * raw, unknown):
        got_NxT = lens.project(ours, vector, ids)
        for l in (1, 2):
            d_D = vector.dose_NxD[l].astype(np.float64)
            want_T = (h_NxTxD[l] - vector.mean_NxD[l]) @ d_D / (d_D @ d_D)
            np.testing.assert_allclose(got_NxT[l], want_T, atol=1e-4)
        assert not got_NxT[[0, 3]].any()
    made = rt.extract(ours, [("I love it. They are", "I hate it. They are")])
    for side, text in ((0.5, "I love it. They are"), (-0.5, "I hate it. They are")):
        found = lens.project(ours, made, ours.encode_prompt(text, chat=False))
        np.testing.assert_allclose(found[:, -1], 4 * [side], atol=1e-3)  # as the center is defined
    with pytest.raises(ValueError, match=r"expected \[4, 64\]"):
        lens.project(ours, make_vector(D=32), ids)


def test_a_text_is_colored_by_sign_and_size_and_stays_text():
    pieces = ["<s>", " a&b", "\n", " c"]
    value_NxT = np.array([[90.0, 1.0, -2.0, 0.0], [0.0, 0.0, 0.0, 0.0], [9.0, 0.5, 0.25, -0.5]])
    text = tokens.page(pieces, value_NxT, [0, 2], 'x > "y"')
    spans = re.findall(r'<span style="background:rgba\(([\d,]+),([\d.]+)\)" title="(.*?)">', text)
    assert [float(x) for *_, x in spans] == [90.0, 1.0, -2.0, 0.0, 9.0, 0.5, 0.25, -0.5]
    red, blue = "214,69,65", "65,131,215"
    assert [c for c, *_ in spans] == [red, red, blue, blue, red, red, red, blue]
    strength = [float(a) / 0.75 for _, a, _ in spans]
    np.testing.assert_allclose(strength, [1, 0.5, 1, 0, 1, 1, 0.5, 1], atol=1e-3)
    assert "&lt;s&gt;" in text and " a&amp;b" in text and "x &gt; &quot;y&quot;" in text
    assert text.count("<p><b>layer") == 2 and "http" not in text
    np.testing.assert_array_equal(tokens.limits(np.array([[3.0]])), [3.0])  # a single token
