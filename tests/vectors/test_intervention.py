"""Every operation and token rule against a few lines of float64 numpy; padding, batches, caches."""

import dataclasses

import jax
import numpy as np
import pytest

import reptune_jax as rt
from reptune_jax import console
from reptune_jax.model.intervene import OPERATIONS, span
from reptune_jax.vectors.intervention import Intervention, When
from tests.support import tiny
from tests.support.steering_case import draw_batch, make_vector

TOLERANCE = 1e-4  # absolute, of residuals of length about 8 and logits of size about 10
DOSES = {"add": -2.0, "ablate": 0.75, "clamp": 1.5, "rescale": 3.0, "rotate": 25.0}
START = np.array([10, 9, 2])  # where the answers of `draw_batch` begin
# rule -> the tokens of a row of n whose answer begins at s
RULES = {
    "all": lambda s, n: range(n),
    "prompt": lambda s, n: range(s),
    "generated": lambda s, n: range(s, n),
    "answer": lambda s, n: range(s - 1, n),
    "last:3": lambda s, n: range(max(s - 3, 0), s),
    "generated:1-3": lambda s, n: range(s + 1, min(s + 3, n)),
    "generated:2-": lambda s, n: range(s + 2, n),
}
LAYER = 2


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return rt.load(str(tiny.make_llama(tmp_path_factory.mktemp("llama"))))


@pytest.fixture(scope="module")
def plain(ours):
    ids, mask = draw_batch()
    return np.asarray(ours.forward(ids, mask, capture=True).residual_NxBxTxD, np.float64)


def edited(h, v, operation, dose):
    v = np.asarray(v, np.float64)
    length, u = np.linalg.norm(h), v / np.linalg.norm(v)
    along = h @ u
    if operation == "add":
        return h + dose * v
    if operation == "ablate":
        return h - dose * along * u
    if operation == "clamp":
        return h + (dose * np.linalg.norm(v) - along) * u
    if operation == "rescale":
        return (h + dose * v) * length / np.linalg.norm(h + dose * v)
    between = np.arccos(along / length)
    angle = np.clip(between - np.deg2rad(dose), 0, np.pi)
    beside = (h - along * u) / np.linalg.norm(h - along * u)
    return length * (np.cos(angle) * u + np.sin(angle) * beside)


def residuals(model, ids, mask, steer, start):
    out = model.forward(ids, mask, steer, capture=True, start_B=start)
    return np.asarray(out.residual_NxBxTxD)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_does_what_it_says_at_its_tokens_and_padding_and_rows_do_not_matter(
    operation, rule, ours, plain
):
    (ids, mask), v = draw_batch(), make_vector()
    steer = Intervention(v.at(LAYER), DOSES[operation], operation, rule)
    got = residuals(ours, ids, mask, steer, START)
    want = plain[LAYER].copy()
    for b, n in enumerate(mask.sum(1)):
        for t in RULES[rule](START[b], n):
            want[b, t] = edited(want[b, t], v.directions_NxD[LAYER], operation, DOSES[operation])
    real = mask.astype(bool)
    np.testing.assert_allclose(got[LAYER][real], want[real], atol=TOLERANCE)
    np.testing.assert_allclose(got[:LAYER], plain[:LAYER], atol=TOLERANCE)
    assert np.abs(got[LAYER] - plain[LAYER])[real].max() > 0.1  # something was done

    # left for right padding, in another order of rows, and each row alone
    order, T = [2, 0, 1], ids.shape[1]
    left = [np.stack([np.roll(a[b], T - mask[b].sum()) for b in order]) for a in (ids, mask)]
    moved = residuals(ours, *left, steer, START[order])
    for place, b in enumerate(order):
        n = mask[b].sum()
        one = residuals(ours, ids[b : b + 1], mask[b : b + 1], steer, START[b : b + 1])
        for other in (moved[:, place, T - n :], one[:, 0, :n]):
            np.testing.assert_allclose(other, got[:, b, :n], atol=TOLERANCE)


@pytest.mark.parametrize("operation", ["rescale", "rotate"])
def test_a_turn_ends_at_the_vector_and_lengths_stay(operation, ours, plain):
    (ids, mask), v = draw_batch(), make_vector()
    real, u = mask.astype(bool), v.directions_NxD[LAYER] / np.linalg.norm(v.directions_NxD[LAYER])
    length = np.linalg.norm(plain[LAYER][real], axis=-1)
    for dose in (7.0, -170.0, 180.0):
        steer = Intervention(v.at(LAYER), dose, operation)
        h = residuals(ours, ids, mask, steer, START)[LAYER][real]
        np.testing.assert_allclose(np.linalg.norm(h, axis=-1), length, rtol=1e-5)
        if operation == "rotate" and dose != 7.0:
            np.testing.assert_allclose(h @ u, np.sign(dose) * length, rtol=1e-5)


def generated(model, steer):
    """Left-padded rows with 6 greedy tokens, and the logits that a full forward has for them."""
    ids, mask = draw_batch()
    ids, mask = (np.stack([np.roll(r, 24 - m.sum()) for r, m in zip(a, mask, strict=True)])
                 for a in (ids, mask))  # fmt: skip
    new = model.generate_ids(ids, mask, 6, steer=steer)
    both, real = (np.concatenate([a, b], 1) for a, b in ((ids, new), (mask, np.ones_like(new))))
    out = model.forward(both, real, steer=steer, start_B=mask.sum(1))
    return new, np.asarray(out.logits_BxTxV)[:, 23:-1]


def assert_greedy(new_BxM, logits_BxMxV):
    chosen = np.take_along_axis(logits_BxMxV, new_BxM[..., None], axis=2)[..., 0]
    np.testing.assert_allclose(chosen, logits_BxMxV.max(axis=2), atol=TOLERANCE)


def test_generation_with_a_cache_is_that_of_full_forwards(ours):
    model = dataclasses.replace(ours, stop_ids=())
    plain_new = generated(model, None)[0]
    moved = 0
    for operation in OPERATIONS:
        for rule in RULES if operation == "add" else ("prompt", "last:3", "generated:1-3"):
            dose = {"ablate": 1.0, "rotate": 60.0}.get(operation, 4.0)
            steer = Intervention(make_vector().at([1, 2]), dose, operation, rule)
            new, logits = generated(model, steer)
            assert_greedy(new, logits)
            moved += (new != plain_new).any()
            if rule.startswith("generated"):  # the first one is read off the prompt
                np.testing.assert_array_equal(new[:, 0], plain_new[:, 0])
    assert moved > 12  # of 19: the wrong tokens would have been seen


@pytest.mark.parametrize("rule", RULES)
def test_scores_are_those_of_full_forwards_whether_or_not_rows_share_their_beginning(rule, ours):
    rng = np.random.default_rng(0)
    first = rng.integers(4, tiny.VOCAB, 24).tolist()
    ids = [first + rng.integers(4, tiny.VOCAB, n).tolist() for n in (9, 4, 7)]
    starts, steer = [27, 26, 28], Intervention(make_vector().at([1]), 2.0, tokens=rule)
    assert ours.split_prefix(ids, 25, steer)[1] == (0 if rule == "last:3" else 24)
    mask = np.array([np.arange(33) < len(row) for row in ids]).astype(np.int32)
    tokens = np.array([row + [0] * (33 - len(row)) for row in ids])
    logits = ours.forward(tokens, mask, steer=steer, start_B=starts).logits_BxTxV
    logp = np.asarray(jax.nn.log_softmax(logits))
    got = ours.score_ids(ids, starts, steer)
    for b, (row, start) in enumerate(zip(ids, starts, strict=True)):
        want = sum(logp[b, t - 1, row[t]] for t in range(start, len(row)))
        assert got[b][0] == pytest.approx(want, abs=10 * TOLERANCE)


def test_a_condition_is_the_prompts_mean_cosine_without_the_first_token(ours, plain):
    (ids, mask), about = draw_batch(), make_vector(5)
    c = about.directions_NxD[1]
    cosine = plain[1] @ c / np.linalg.norm(plain[1], axis=-1) / np.linalg.norm(c)
    mean = np.array([cosine[b, 1:s].mean() for b, s in enumerate(START)])
    low, middle, high = np.argsort(mean)
    above = float(mean[[low, middle]].mean())
    steer = Intervention(make_vector().at(0), 2.0, when=When(about, 1, above))
    got = residuals(ours, ids, mask, steer, START)
    always = residuals(ours, ids, mask, Intervention(make_vector().at(0), 2.0), START)
    np.testing.assert_allclose(got[:, [middle, high]], always[:, [middle, high]], atol=TOLERANCE)
    n = mask[low].sum()
    np.testing.assert_allclose(got[:, low, :n], plain[:, low, :n], atol=TOLERANCE)
    below = Intervention(make_vector().at(0), 2.0, when=When(-about, 1, -above))
    turned = residuals(ours, ids, mask, below, START)
    np.testing.assert_allclose(turned[:, low], always[:, low], atol=TOLERANCE)
    np.testing.assert_allclose(turned[:, high], plain[:, high], atol=TOLERANCE)

    model = dataclasses.replace(ours, stop_ids=())
    whole = np.array([cosine[b, 1:n].mean() for b, n in enumerate(mask.sum(1))])  # all is prompt
    above = float(np.sort(whole)[1:].mean())
    steer = Intervention(make_vector().at(0), 4.0, when=When(about, 1, above))
    new, logits = generated(model, steer)
    assert_greedy(new, logits)
    changed = (new != generated(model, None)[0]).any(1)
    np.testing.assert_array_equal(changed, whole > above)


def test_a_prompt_of_one_token_is_judged_by_it(ours):
    ids, about = np.array([[7], [9]]), make_vector(5)
    h = residuals(ours, ids, None, None, None)[1, :, 0]
    cosine = h @ about.directions_NxD[1] / np.linalg.norm(h, axis=-1)
    cosine /= np.linalg.norm(about.directions_NxD[1])
    steer = Intervention(make_vector().at(0), 2.0, when=When(about, 1, float(cosine.mean())))
    moved = residuals(ours, ids, None, steer, None) - residuals(ours, ids, None, None, None)
    moved = np.abs(moved[0, :, 0]).max(-1)
    np.testing.assert_array_equal(moved > 0.1, cosine > cosine.mean())


def test_several_are_done_one_after_the_other_each_at_its_tokens(ours, plain):
    (ids, mask), v, w = draw_batch(), make_vector(), make_vector(1)
    one = Intervention(v, {LAYER: 20.0}, "rotate", "prompt")
    two = Intervention(w.at(LAYER), 0.5, "ablate")
    for steer in (one + two + w.at(LAYER), w.at(LAYER) + two + one):
        got = residuals(ours, ids, mask, steer, START)[LAYER]
        want, reverse = plain[LAYER].copy(), not isinstance(steer.parts[0].dose, dict)
        done = [("rotate", v, 20.0), ("ablate", w, 0.5), ("add", w, 1.0)]
        for b, n in enumerate(mask.sum(1)):
            for t in range(n):
                for operation, vector, dose in done[::-1] if reverse else done:
                    if operation != "rotate" or t < START[b]:
                        d = vector.directions_NxD[LAYER]
                        want[b, t] = edited(want[b, t], d, operation, dose)
        real = mask.astype(bool)
        np.testing.assert_allclose(got[real], want[real], atol=TOLERANCE)


def test_each_layer_may_have_a_dose_of_its_own(ours):
    (ids, mask), v = draw_batch(), make_vector()
    got = residuals(ours, ids, mask, Intervention(v, {0: 0.5, 3: -2.0}), None)
    want = residuals(ours, ids, mask, 0.5 * v.at(0) + -2.0 * v.at(3), None)
    np.testing.assert_array_equal(got, want)


def test_a_vector_that_is_added_everywhere_says_so_once(ours, capsys):
    console.note.cache_clear()  # another test of this process may have had it said
    ids, v = np.ones((1, 4), np.int32), make_vector(9)
    ours.forward(ids, steer=v.at([0, 1, 2]))
    ours.forward(ids, steer=Intervention(v, dict.fromkeys(range(4), 0.1)))  # said so by hand
    ours.forward(ids, steer=Intervention(v, 0.1, "ablate"))  # as it should be
    assert "full dose" not in capsys.readouterr().out
    ours.forward(ids, steer=v)
    ours.forward(ids, steer=Intervention(v))
    said = capsys.readouterr().out
    assert said.count("all 4 layers, and its full dose is added at each of them") == 1
    assert "vec.at(layers=[2])" in said


def test_what_cannot_be_meant_is_refused_by_name():
    v = make_vector(layers=[1, 2])
    for given, message in [
        ({"operation": "push"}, "operation: got 'push', expected one of add, ablate, clamp"),
        ({"tokens": "first"}, "tokens: got 'first', expected all, prompt, generated, answer"),
        ({"tokens": "last:0"}, "tokens: got 'last:0'"),
        ({"tokens": "generated:8-3"}, "tokens: got 'generated:8-3'"),
        ({"dose": {3: 1.0}}, r"dose: got layers \[3\], expected some of \[1, 2\]"),
        ({"dose": float("nan")}, "dose: got nan, expected finite numbers"),
    ]:
        with pytest.raises(ValueError, match=message):
            Intervention(v, **given)
    with pytest.raises(ValueError, match="bake: got Intervention, expected a SteeringVector"):
        rt.bake(None, Intervention(v, tokens="prompt"))
    with pytest.raises(ValueError, match=r"when.layer: got 0, expected one of .*\[1, 2\]"):
        When(v, 0, 0.1)
    with pytest.raises(ValueError, match=r"when.above: got 2, expected a cosine from -1 to 1"):
        When(v, 1, 2)
    assert span("generated:8-") == (8, np.inf) and span("last:3") == (-3, 0)
