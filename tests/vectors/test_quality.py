"""What extraction says of a vector, on residuals with a direction and on residuals without one."""

import numpy as np
import pytest

import reptune_jax as rt
from reptune_jax import config
from reptune_jax.data.behavior import Behavior
from reptune_jax.data.schema import Item
from reptune_jax.evals.stats import auroc
from reptune_jax.folder import Study
from reptune_jax.model.padding import pad
from reptune_jax.vectors import capture, claims, extraction, quality
from reptune_jax.vectors.capture import Span
from reptune_jax.vectors.methods import METHODS
from tests.support import steering_case, tiny, tiny_behavior
from tests.support.vector_case import cosines, folded, planted

PAIRS = [(f"I love {w}. So", f"I hate {w}. So") for w in ("rain", "snow", "food")]


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return rt.load(str(tiny.make_llama(tmp_path_factory.mktemp("llama"))))


@pytest.fixture
def no_lens(monkeypatch):
    """For residuals that are no model's."""
    monkeypatch.setattr(quality, "_lens_scores", lambda *_: np.empty(0))


def measured(positive, negative, method="mean_diff", clusters=None):
    vector, rows = folded(method, positive, negative)
    clusters = list(range(positive.shape[1])) if clusters is None else clusters
    return quality.measure(None, vector, ((), ()), rows, clusters), vector


@pytest.mark.parametrize("method", ["mean_diff", "pca", "whitened"])
def test_a_direction_is_told_from_none_and_from_permuted_labels(method, no_lens):
    positive, negative, _ = planted(P=200, strength=4.0)
    there, vector = measured(positive, negative, method)
    assert min(there["auroc"]) > 0.75 and min(there["stability"]) > 0.95
    want_N = np.linalg.norm(vector.directions_NxD, axis=1) / vector.residual_norm_N
    np.testing.assert_allclose(there["length"], want_N, atol=1e-4)

    swap_P = np.random.default_rng(3).random(200) < 0.5
    mixed = [
        np.where(swap_P[:, None], *sides) for sides in ((negative, positive), (positive, negative))
    ]
    for sides in (planted(P=200, strength=0.0)[:2], mixed):
        absent, vector = measured(*sides, method)
        assert np.abs(np.subtract(absent["auroc"], 0.5)).max() < 0.1
        assert np.abs(np.subtract(absent["stability"], np.sqrt(0.5))).max() < 0.12
        assert np.abs(vector.meta["agreement"]).max() < 0.03


def test_auroc_is_of_pairs_that_the_direction_has_not_seen(no_lens):
    positive, negative, _ = planted(N=1, P=23, strength=2.0)
    got = measured(positive, negative, "lda")[0]["auroc"][0]
    fold_P, by_fold, weights = np.arange(23) % 5, [], []
    for fold in range(5):
        out, rest = fold_P == fold, fold_P != fold
        sides = [side[0].astype(np.float64) for side in (positive, negative)]
        direction_D = METHODS["lda"].direction(*(side[rest] for side in sides))
        scores = np.concatenate([side[out] @ direction_D for side in sides])
        by_fold.append(auroc(scores, [1] * out.sum() + [0] * out.sum()))
        weights.append(out.sum())
    np.testing.assert_allclose(got, np.average(by_fold, weights=weights), atol=1e-4)


def test_twins_of_a_cluster_are_held_out_together(no_lens):
    """Of noise in more coordinates than pairs, a twin in the training rows gives it all away."""
    sides = np.random.default_rng(0).standard_normal((2, 1, 80, 2000)).astype(np.float32)
    twins = np.repeat(sides, 2, axis=2)
    together = measured(*twins, clusters=[f"c{p // 2}" for p in range(160)])[0]
    apart = measured(*twins)[0]
    assert apart["auroc"][0] > 0.9 and abs(together["auroc"][0] - 0.5) < 0.15


def test_stability_draws_whole_clusters(no_lens):
    """Of two clusters along two axes a resample has both (half of the time), or one alone."""
    difference = np.zeros((1, 6, 4), np.float32)
    difference[0, :3, 0] = difference[0, 3:, 1] = 1
    clusters = list("aaabbb")
    found, _ = measured(difference, np.zeros_like(difference), clusters=clusters)
    assert abs(found["stability"][0] - (0.5 + 0.5 * np.sqrt(0.5))) < 0.05
    same = np.ones((1, 6, 4), np.float32)
    assert measured(same, np.zeros_like(same))[0]["stability"] == [1.0]
    alone, _ = measured(same, np.zeros_like(same), clusters=list("aaaaaa"))
    assert alone["stability"] == alone["auroc"] == [None]


def test_the_lens_is_of_the_answers_tokens_after_the_final_norm(ours):
    sides = ("good good day", "bad day"), ("well", "no"), ("fine", "grim")
    pairs = [(("Say it. ", positive), ("Say it. ", negative)) for positive, negative in sides]
    vector = rt.extract(ours, pairs, position="response")
    params = ours.params
    table_VxD = np.asarray(params["head" if "head" in params else "embed"]["embedding"], np.float64)
    scale_D = np.asarray(params["final_norm"]["scale"], np.float64)
    for l in range(4):
        v_D = vector.directions_NxD[l].astype(np.float64)
        logits_V = table_VxD @ (v_D / np.sqrt(np.square(v_D).mean()) * scale_D)
        gaps = []
        for sides in pairs:
            ids = [ours.tokenizer(s[1], add_special_tokens=False)["input_ids"] for s in sides]
            gaps.append(logits_V[ids[0]].mean() - logits_V[ids[1]].mean())
        want = np.mean(gaps) / logits_V.std()
        np.testing.assert_allclose(vector.meta["quality"]["lens"][l], want, atol=2e-3)
    same = [(("Say it. ", " day"), ("Tell it. ", " day"))]
    assert rt.extract(ours, same, position="response").meta["quality"]["lens"] == [None] * 4


def test_rows_that_are_too_many_are_not_kept_for_their_quality(ours, monkeypatch, capsys):
    whole = rt.extract(ours, PAIRS)
    assert None not in whole.meta["quality"]["auroc"] + whole.meta["sign"]["share"]
    monkeypatch.setattr(capture, "_MOST_BYTES", 1000)
    vector = rt.extract(ours, PAIRS)
    assert vector.digest == whole.digest
    unknown = [None] * 4
    assert vector.meta["quality"]["auroc"] == vector.meta["quality"]["stability"] == unknown
    assert vector.meta["sign"]["share"] == unknown and None not in vector.meta["quality"]["lens"]
    assert "stability and AUROC are not computed" in capsys.readouterr().out
    assert "best by AUROC, then agreement: layers" in quality.table(vector)
    assert rt.extract(ours, PAIRS, "pca").layers == (0, 1, 2, 3)  # which needs them all the same


def test_extract_takes_a_method_and_a_vector_to_project_out(ours):
    plain = rt.extract(ours, PAIRS)
    vector = rt.extract(ours, PAIRS, method="whitened")
    assert vector.meta["method"] == "whitened" and vector.digest != plain.digest
    norms = [np.linalg.norm(v.directions_NxD, axis=1) for v in (plain, vector)]
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-4)
    again = rt.extract(ours, PAIRS, method="pca", project_out=vector.at([2]))
    assert abs(cosines(again.directions_NxD, vector.directions_NxD)[2]) < 1e-6
    assert again.meta["project_out"] == vector.at([2]).digest
    other = rt.SteeringVector(
        plain.directions_NxD, plain.residual_norm_N, plain.mean_NxD, (0,), {"model_sha": "x"}
    )
    with pytest.raises(ValueError, match="vector: got one made on None"):
        rt.extract(ours, PAIRS, project_out=other)


def table_of(N, auroc, agreement):
    known = {key: [0.5] * N for key in ("stability", "length", "lens")}
    meta = {"agreement": agreement, "sign": {"share": [1.0] * N}}
    meta["quality"] = {**known, "auroc": auroc}
    return quality.table(steering_case.make_vector(N=N, layers=range(N), **meta)).splitlines()


def test_the_table_has_a_line_per_layer_and_names_the_best():
    lines = table_of(4, [0.9, 1.0, None, 1.0], [0.1, 0.2, 0.9, 0.25])
    assert lines[0].split() == [
        "layer", "agreement", "stability", "AUROC", "|v|/|h|", "pairs", "+", "lens",
    ]  # fmt: skip
    assert lines[2].split() == ["1", "0.20", "0.50", "1.00", "0.500", "1.00", "0.50"]
    assert lines[3].split() == ["2", "0.90", "0.50", "-", "0.500", "1.00", "0.50"]
    assert lines[5].startswith("best by AUROC, then agreement: layers 3, 1, 0;") and len(lines) == 6
    many = table_of(40, [l / 40 for l in range(40)], [0.0] * 40)
    assert [int(line.split()[0]) for line in many[1:-1]] == list(range(28, 40))


CLAIMS = [("The moon is a mountain.", 0), ("A river is water.", 1), ("Food is a train.", 0)]


def claim_behavior():
    def item(id, format, text, label, split="train"):
        role = "system" if format == "persona" else "user"
        answers = ("", "") if format == "persona" else ("True", "False")
        messages = ({"role": role, "content": text},)
        return Item(
            id,
            "h",
            split,
            "p" if format == "persona" else id,
            format,
            messages,
            *answers,
            label,
            (),
            "own",
            "Apache-2.0",
        )

    personas = [item(f"p{y}", "persona", f"You {t}.", y) for y, t in ((1, "know"), (0, "lie"))]
    rows = [item(f"c{i}", "claim", text, y) for i, (text, y) in enumerate(CLAIMS)]
    return Behavior("h", (*personas, *rows), ("logodds:claim",))


def claim_settings(**changes):
    c = config.default()
    c.model, c.behavior, c.vector.position, c.loss.position = "m", "honesty", "last", "last"
    for key, value in changes.items():
        c.vector[key] = value
    return c


def test_the_letter_is_projected_out_of_claims(ours):
    behavior = claim_behavior()
    pairs = claims.read_pairs(claim_settings().vector, ours, behavior)
    found_NxD = claims.letter(ours, pairs, 16)
    cells = {}
    for side, messages, answer in [
        *((0, p.positive, p.positive_answer) for p in pairs),
        *((1, p.negative, p.negative_answer) for p in pairs),
    ]:
        ids = ours.encode_prompt(messages)
        ids = ids + ours.tokenizer.encode(answer, add_special_tokens=False)
        tokens, mask = pad([ids], 0, left=False, bucket=256)
        residual = ours.forward(tokens, mask, capture=True).residual_NxBxTxD
        cells.setdefault((side, answer), []).append(np.asarray(residual)[:, 0, len(ids) - 1])
    mean = {cell: np.mean(rows, 0) for cell, rows in cells.items()}
    want = (mean[0, "A"] + mean[1, "A"] - mean[0, "B"] - mean[1, "B"]) / 2
    np.testing.assert_allclose(found_NxD, want, atol=1e-4)

    vector = extraction.read_vector(claim_settings(project_out="letter"), ours, behavior)
    assert vector.meta["project_out"] == "letter"
    assert np.abs(cosines(vector.directions_NxD, found_NxD)).max() < 1e-6


def test_a_file_is_projected_out_too_and_what_cannot_be_is_refused(ours, tmp_path):
    behavior, path = claim_behavior(), tmp_path / "v.safetensors"
    steering_case.make_vector(3).save(path)
    vector = extraction.read_vector(claim_settings(project_out=str(path)), ours, behavior)
    given = rt.SteeringVector.load(path)
    assert vector.meta["project_out"] == given.digest
    assert np.abs(cosines(vector.directions_NxD, given.directions_NxD)).max() < 1e-6
    steering_case.make_vector(D=8).save(path)
    with pytest.raises(ValueError, match=r"expected \[4, 64\]"):
        extraction.read_vector(claim_settings(project_out=str(path)), ours, behavior)
    one_letter = claims.read_pairs(claim_settings().vector, ours, behavior)[1:2]
    with pytest.raises(ValueError, match="got no B and no A as an answer of a side"):
        claims.letter(ours, one_letter, 4)


def test_a_file_that_is_not_there_is_refused_before_the_model_is_loaded(tmp_path):
    c = tiny_behavior.settings("m", tiny_behavior.write(tmp_path), vector__project_out="leter")
    with pytest.raises(ValueError, match=r"project_out: got 'leter', expected '', 'letter' or a "):
        extraction.run(c, Study(tmp_path / "w"), lambda: pytest.fail("the weights were read"))
    assert not (tmp_path / "w").exists()


def test_an_extraction_prints_the_table(ours, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(extraction.behaviors, "load", lambda _: claim_behavior())
    c = claim_settings()
    vector = extraction.run(c, Study(tmp_path / "w"), lambda: ours)
    assert quality.table(vector) in capsys.readouterr().out
    assert vector.meta["quality"].keys() == {"stability", "auroc", "length", "lens"}


@pytest.mark.parametrize(
    "changes",
    [
        {"quality": {"auroc": [0.5, "high"]}},
        {"quality": [0.5]},
        {"quality": {"lens": [np.inf]}},
        {"sign": {"share": 0.5}},
        {"sign": "pairs"},
        {"agreement": [3.0]},
    ],
)
def test_a_file_whose_quality_is_not_numbers_is_refused(changes, tmp_path):
    steering_case.make_vector(**changes).save(tmp_path / "v.safetensors")
    with pytest.raises(ValueError, match=f"other values of {next(iter(changes))} in its meta"):
        rt.SteeringVector.load(tmp_path / "v.safetensors")


def test_a_pass_takes_the_cluster_from_the_positive_side(ours, monkeypatch):
    given = []
    monkeypatch.setattr(quality, "measure", lambda *a: given.extend(a[4]) or {})
    spans = [Span([5, 6 + i], 1, 2, 0, name) for i, name in enumerate(("x", "", "x"))]
    capture.make_vector(ours, spans, [Span([5, 20], 1, 2)] * 3, "mean_diff", {})
    assert given == ["x", 1, "x"]
