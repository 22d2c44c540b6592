"""The whole chain on a tiny model: extract, train, evaluate, report, export; then once more."""

import collections
import itertools
import json

import jax
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from reptune_jax import lm, relearn, study
from reptune_jax.config import also_behavior
from reptune_jax.evals import arms, attack, capability, dial, results, specificity, sweep
from reptune_jax.evals.bench import Bench, prepare
from reptune_jax.folder import Study
from reptune_jax.report import markdown
from reptune_jax.report.study import read
from reptune_jax.vectors.steering_vector import SteeringVector
from tests.support import suites, tiny, tiny_behavior

TUNED = ("token", "vector", "dual", "random", "out")
NO_SIGN = ("out", -1)  # tuning out is the same for both signs, and runs once


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(config, folder) of a study of every arm but those that are other programs to compile."""
    with pytest.MonkeyPatch.context() as patch:
        tiny_behavior.patch_neutral(patch)
        folder = tmp_path_factory.mktemp("study")
        c = tiny_behavior.settings(
            tiny.make_llama(folder / "model"),
            tiny_behavior.write(folder),
            train__steps=4,
            loss__retain=0.5,
            study__arms=("base", "prompt", "steer", "bake", "weights", *TUNED),
            dial__arms=("token",),
            dial__scales=(1.0, 2.0),
        )
        study.run(c, folder / "runs")
        return c, folder / "runs"


def files(folder):
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*") if p.is_file()}


def table(folder):
    parts = [pq.read_table(p).to_pylist() for p in folder.glob("**/results/*.parquet")]
    return [row for part in parts for row in part]


def test_the_study_folder_is_as_documented(done):
    c, folder = done
    names = [f"{arm}{sign}_s0" for arm in TUNED for sign in "+-" if (arm, sign) != ("out", "-")]
    assert not (folder / "out-_s0").exists()
    for name in names:
        for file in ("config.json", "metrics.jsonl", "done.json", "results/tuned.parquet"):
            assert (folder / name / file).exists(), f"{name}/{file}"
        assert list((folder / name).glob("events*"))
    for file in ("config.json", "vector.safetensors", "targets.jsonl", "report/index.html"):
        assert (folder / file).exists(), file
    assert not list(folder.rglob("*.tmp"))
    vector = SteeringVector.load(folder / "vector.safetensors")
    assert vector.meta["pairs"] == c.vector.pairs and (vector.directions_NxD != 0).any(1).all()
    targets = [json.loads(line) for line in (folder / "targets.jsonl").read_text().splitlines()]
    assert collections.Counter((t["split"], t["sign"]) for t in targets) == {
        (split, sign): 4 for split in ("tune", "val") for sign in (1, -1)
    }


def test_every_arm_is_measured_in_every_way(done):
    _, folder = done
    rows = table(folder)
    found = collections.defaultdict(set)
    for row in rows:
        found[row["arm"], row["sign"]].add((row["metric"], row["split"]))
    expected = {("base", 0)} | {
        (arm, sign) for arm in ("prompt", "steer", "bake", "weights", *TUNED) for sign in (1, -1)
    }
    assert set(found) == expected - {NO_SIGN}
    for condition, measured in found.items():
        for metric in ("vader", "logodds"):
            assert {(metric, "test"), (metric, "ood")} <= measured, condition
        assert {("kl", "chats"), ("nll", "chats"), ("own_ce", "chats")} <= measured, condition
        assert ("cos", "test") in measured, condition
    finite = [r["value"] for r in rows if r["metric"] != "auroc"]
    assert np.isfinite(finite).all()


def of(rows, arm, metric, sign=1):
    return {
        (r["split"], r["item_id"]): r["value"]
        for r in rows
        if (r["arm"], r["metric"]) == (arm, metric) and r["sign"] in (sign, 0)
    }


def test_the_base_costs_nothing_and_tuning_does(done):
    rows = table(done[1])
    assert max(of(rows, "base", "kl").values()) == pytest.approx(0, abs=1e-5)
    assert min(of(rows, "dual", "kl").values()) > 1e-5
    assert of(rows, "dual", "logodds") != of(rows, "token", "logodds")


def test_baking_is_steering(done):
    rows = [r for r in table(done[1]) if r["split"] != "val" and r["metric"] != "cos"]

    def values(arm):
        keep = ("metric", "split", "item_id", "sign", "k", "layer")
        return {tuple(r[k] for k in keep): r["value"] for r in rows if r["arm"] == arm}

    steered, baked = values("steer"), values("bake")
    assert baked and baked.keys() <= steered.keys()
    for key, value in baked.items():
        assert value == pytest.approx(steered[key], rel=1e-3, abs=1e-4), key


@pytest.mark.parametrize("arm", ["token", "weights"])
def test_the_dial_is_swept_on_validation_and_one_scale_is_tested(done, arm):
    rows = [r for r in table(done[1]) if r["arm"] == arm and r["k"]]
    for sign in (1, -1):
        at = {(r["split"], r["k"]) for r in rows if (r["sign"], r["metric"]) == (sign, "vader")}
        swept, tested = ({k for split, k in at if split == name} for name in ("val", "test"))
        assert swept == {1.0, 2.0} and len(tested) == 1 and max(tested) <= 2.0


def test_what_costs_the_kl_of_dual_is_measured_on_the_documents_that_are_swept(done, monkeypatch):
    """So dual itself, scaled to the KL of dual, is dual; on the test's documents KL is another."""
    c, folder = done
    bench = prepare(c, Study(folder))
    budget = sweep.dual_kl(bench, Study(folder), 1)
    monkeypatch.setattr(Bench, "rows", lambda self, cond: [cond.k])
    assert dial.measure(bench, Study(folder), "dual", 1, [0], budget)[-1] == 1.0
    rows = [r for r in table(folder) if (r["arm"], r["sign"], r["k"]) == ("dual", 1, 0)]
    tested = [r["value"] for r in rows if (r["metric"], r["split"]) == ("kl", "neutral")]
    assert abs(np.mean(tested) / budget - 1) > 0.01


@pytest.mark.parametrize("sign", "+-")
def test_transformers_loads_the_export_and_says_the_same(sign, done):
    c, folder = done
    out = folder / "export" / f"dual{sign}_s0"
    hf, info = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    base = lm.load(c.model, "float32")
    tuned = arms.tuned(base, folder / out.name).model
    ids = AutoTokenizer.from_pretrained(out)("Tell me of the weather.", return_tensors="pt")
    with torch.no_grad():
        theirs = hf(ids["input_ids"]).logits.numpy()
    ours = np.asarray(tuned.forward(ids["input_ids"].numpy()).logits_BxTxV)
    plain = np.asarray(base.forward(ids["input_ids"].numpy()).logits_BxTxV)
    np.testing.assert_allclose(theirs, ours, atol=1e-4, rtol=1e-4)
    assert np.abs(ours - plain).max() > 1e-2
    assert (out / "README.md").read_text().strip()


def test_the_report_names_every_arm(done):
    page = (done[1] / "report" / "index.html").read_text()
    assert all(arm in page for arm in ("base", "prompt", "steer", *TUNED))
    assert "http://" not in page.replace("http://www.w3.org", "")  # self-contained
    vector = (done[1] / "vector.safetensors").read_bytes()
    for path in (done[0].model, done[0].behavior, str(done[1])):  # nothing of this machine's
        assert path not in page
        assert path.encode() not in vector


def test_run_again_the_study_does_nothing(done, monkeypatch):
    c, folder = done
    tiny_behavior.patch_neutral(monkeypatch)
    # The page is made anew each time, and takes most of the time here.
    monkeypatch.setattr("reptune_jax.report.html.write", lambda known: None)
    before = files(folder)
    study.run(c, folder)
    assert files(folder) == before


def test_the_suites_are_asked_of_every_condition_that_the_folder_has(
    done, tmp_path, monkeypatch, capsys
):
    tiny_behavior.patch_neutral(monkeypatch)
    c, folder = done
    c = c.copy_and_resolve_references()
    c.suites.data, c.suites.names = str(suites.write(tmp_path, times=2)), ("piqa",)
    paths = capability.run(c, folder, lm.load(c.model, "float32"))
    try:
        rows = pd.concat([results.read(path) for path in paths])
        rows = rows[rows.metric == "acc"].drop_duplicates(["arm", "sign", "seed"])
        found = {(r.arm, r.sign): r for r in rows.itertuples()}
        signed = ("prompt", "steer", "weights", "token", "dual", "random")
        assert set(found) == {("base", 0)} | {(arm, sign) for arm in signed for sign in (1, -1)}
        every = table(folder)
        for arm in ("steer", "weights"):  # at the dose and scale that was tested
            own = found[arm, 1]
            assert (own.k, own.layer) in {
                (r["k"], r["layer"])
                for r in every
                if (r["arm"], r["sign"], r["split"]) == (arm, 1, "test")
            }
        assert len({r.logp_pos for r in rows.itertuples()}) == len(rows)  # each its own model
        page = markdown.render(read(folder))
        assert "Accuracy on public suites" in page and "| dual + |" in page
        assert "dual +" in capsys.readouterr().out
    finally:
        for path in paths:
            path.unlink()


def test_other_behaviors_are_asked_of_every_condition(done, monkeypatch, capsys):
    tiny_behavior.patch_neutral(monkeypatch)
    c, folder = done
    c = c.copy_and_resolve_references()
    c.specificity.behaviors = (c.behavior, "honesty", "refusal")
    c.specificity.prompts, c.specificity.arms = 2, ("base", "prompt", "dual")
    model = lm.load(c.model, "float32")
    paths = specificity.run(c, folder, model)
    try:
        said = capsys.readouterr().out
        assert "8 prompts of sentiment, honesty, refusal:harmful, refusal:harmless" in said
        rows = pd.concat([results.read(path) for path in paths])
        assert set(rows.template) == {"sentiment", "honesty", *specificity.REFUSALS}
        of_dual = rows[(rows.arm == "dual") & (rows.sign == 1)]
        at = of_dual[of_dual.template == "sentiment"].set_index("item_id").value
        tested = pd.DataFrame(table(folder / "dual+_s0"))
        own = tested[(tested.metric == "logodds") & (tested.split == "test")]
        known = own.set_index("item_id").value
        np.testing.assert_allclose(at, known[at.index], atol=1e-4)  # as the study measured it
        found = specificity.frame(rows)
        assert len(found) == 4 * 4 and specificity.tests(found, "honesty")[0] == "honesty"
        one = found[(found.arm == "dual") & (found.sign == 1) & (found.test == "honesty")]
        of_base = rows[rows.arm == "base"].set_index("item_id").value
        of_one = of_dual[of_dual.template == "honesty"].set_index("item_id").value
        mean = (of_one - of_base[of_one.index]).mean()
        assert one.change.item().estimate == pytest.approx(mean)
        page = markdown.render(read(folder))
        assert "Other behaviors" in page and "refusal:harmless" in page
        monkeypatch.setattr(specificity, "rows", None)
        specificity.run(c, folder, model)  # nothing is asked again
    finally:
        for path in paths:
            path.unlink()
    c.specificity.behaviors = ("honestly",)
    with pytest.raises(ValueError, match="Did you mean 'honesty'"):
        specificity.run(c, folder, model)


def test_attacks_are_tried_on_every_run_and_not_again(done, monkeypatch, capsys):
    tiny_behavior.patch_neutral(monkeypatch)
    c, folder = done
    c, model = c.copy_and_resolve_references(), lm.load(c.model, "float32")
    c.attack.names, c.attack.arms, c.attack.prompts = ("weights", "scale"), ("dual", "random"), 2
    c.attack.scales = (0.0, 1.0)
    paths = attack.run(c, folder, model)
    try:
        rows = pd.concat([results.read(path) for path in paths])
        kl = rows[rows.metric == "kl"].set_index(["arm", "sign", "position", "k", "item_id"])
        kl = kl.value.sort_index()
        for run in itertools.product(("dual", "random"), (1, -1)):
            own = {at: kl[(*run, *at)].to_numpy() for at in (("intact", 0.0), ("scale", 1.0))}
            np.testing.assert_allclose(*own.values(), rtol=1e-3)
            assert min(own["intact", 0.0]) > 1e-5
            assert max(kl[(*run, "scale", 0.0)]) == pytest.approx(0, abs=1e-5)  # the base again
        judged = rows[rows.metric == "vader"].groupby(["arm", "sign", "seed", "position", "k"])
        assert len(judged) == 1 + 4 * 3 and set(judged.item_id.nunique()) == {2}
        found = set(rows[rows.metric == "aligned"].groupby("arm").position.unique().explode())
        assert {"weights:blind", "weights:blind:own", "weights:layer"} <= found
        assert not (rows[rows.arm == "dual"].position == "weights:blind:own").any()
        told = capsys.readouterr().out
        assert "finding the vector with the base's weights" in told
        assert "up to 13 measurements of 2 items, 6 of them of the control random" in told
        before = files(folder)
        attack.run(c, folder, model)
        assert files(folder) == before
        c.attack.scales = (1.0,)  # only what depends on it is done again
        attack.run(c, folder, model)
        changed = {path.name for path, at in files(folder).items() if before.get(path) != at}
        runs = [f"{arm}{sign}_s0" for arm in ("dual", "random") for sign in "+-"]
        assert changed == {f"attack_scale_{run}.parquet" for run in runs}
        before, looked = files(folder), attack.KNOWN["weights"]
        attack.run(c, folder, model, {"weights": looked._replace(tried=lambda *_: ("more",))})
        changed = {path.name for path, at in files(folder).items() if before.get(path) != at}
        assert changed == {f"attack_weights_{run}.parquet" for run in runs}
        assert "What broke" in markdown.render(read(folder))
    finally:
        for path in paths:
            path.unlink()


def test_a_run_is_trained_on_toward_the_other_sign_without_retention(done, monkeypatch):
    """Training is another test's: here a run that is there stands for what it gave."""
    tiny_behavior.patch_neutral(monkeypatch)
    c, folder = done
    c, model, asked = c.copy_and_resolve_references(), lm.load(c.model, "float32"), []

    def trained(c, own, start):
        assert (own / "targets.jsonl").exists() and (own / "vector.safetensors").exists()
        asked.append((c, start))
        return folder / f"token{'+' if c.sign > 0 else '-'}_s0"

    monkeypatch.setattr(relearn.train, "run", trained)
    c.attack.arms, c.attack.prompts, c.attack.lr, c.attack.steps = ("dual",), 2, (1e-2,), (3,)
    paths = relearn.run(c, folder, model)
    try:
        rows = pd.concat([results.read(path) for path in paths])
        kl = rows[rows.metric == "kl"].set_index(["sign", "position", "k", "item_id"])
        kl = kl.value.sort_index()
        for (one, start), sign in zip(asked, (1, -1), strict=True):
            assert (one.arm, one.sign, one.train.lr, one.train.steps) == ("token", -sign, 1e-2, 3)
            assert not (one.loss.retain or one.loss.own or one.loss.l2 or one.loss.ending)
            tuned = arms.tuned(model, folder / f"dual{'+' if sign > 0 else '-'}_s0").model
            for ours, theirs in zip(
                *map(jax.tree.leaves, (start.params, tuned.params)), strict=True
            ):
                np.testing.assert_array_equal(ours, theirs)  # it goes on from the tuned model
            own = folder / f"token{'-' if sign > 0 else '+'}_s0"
            want = results.read(own / "results/tuned.parquet")
            want = (
                want[(want.metric == "kl") & (want.split == "neutral")].set_index("item_id").value
            )
            got = kl[sign, "relearn:0.01", 3.0]
            np.testing.assert_allclose(got, want[got.index], rtol=1e-3)
        assert not list((folder / "trials").iterdir())
    finally:
        for path in paths:
            path.unlink()
        (folder / "trials").rmdir()
    c.loss.also["x"] = also_behavior("y")
    with pytest.raises(ValueError, match="expected one behavior"):
        relearn.run(c, folder)


def test_nothing_to_attack_is_said_before_a_model_is_loaded(done, tmp_path):
    c = done[0].copy_and_resolve_references()
    with pytest.raises(ValueError, match="expected something to attack"):
        attack.run(c, tmp_path)
    c.attack.names = ()
    with pytest.raises(ValueError, match=r"attack\.names: got none"):
        attack.run(c, tmp_path)
    assert not list(tmp_path.iterdir())
