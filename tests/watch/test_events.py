"""What a run leaves for TensorBoard, read back by TensorBoard's own code."""

import contextlib
import io
import json

import jax
import numpy as np
import pytest
from matplotlib import image
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams import metadata as hparams

from reptune_jax import config, distributed, lm, train
from reptune_jax.tuning.corpus import make_corpus
from reptune_jax.tuning.run import Run
from reptune_jax.watch import cosines, events, heatmap
from reptune_jax.watch import log as logs
from reptune_jax.watch.events import flat_settings
from tests.support import event_files, tiny, tiny_behavior


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model and a behavior; what tests share of them is patched in by `run`."""
    model = lm.load(str(tiny.make_llama(tmp_path_factory.mktemp("llama"))), "float32")
    return model, tiny_behavior.write(tmp_path_factory.mktemp("behavior"))


def settings(made, **changes):
    model, behavior = made
    changes = {"train__layers": (1, 3), "loss__layers": (2, 4), "loss__retain": 0.5, **changes}
    return tiny_behavior.settings(model.name, behavior, **changes)


@pytest.fixture(scope="module")
def finished(made, tmp_path_factory):
    """(config, folder, what was printed) of a run that was cut at step 3 and resumed."""
    folder, batch = tmp_path_factory.mktemp("study"), Run.batch
    with pytest.MonkeyPatch.context() as patch:
        tiny_behavior.patch_neutral(patch)
        c = settings(made)
        with patch.context() as cut:
            cut.setattr(Run, "batch", lambda self, i: batch(self, i if i < 3 else None))
            with pytest.raises(TypeError):
                train.run(c, folder, made[0])
        return c, train.run(c, folder, made[0])


def corpus_of(made, finished, monkeypatch):
    tiny_behavior.patch_neutral(monkeypatch)
    c, folder = finished
    return make_corpus(config.armed(c), folder.parent, made[0])


def test_scalars_are_those_of_the_metrics_file_once_each(finished):
    _, folder = finished
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = {(r["step"], k): v for r in rows for k, v in r.items() if k != "step"}
    found = event_files.of_plugin(folder, "scalars")
    assert len(list(folder.glob("events.*"))) == 2
    assert found.keys() == logged.keys()
    for key, value in logged.items():
        assert found[key] == pytest.approx(value, rel=1e-6), key


def test_histograms_hold_every_chosen_token_of_validation(finished, made, monkeypatch):
    _, folder = finished
    found = event_files.of_plugin(folder, "histograms")
    layers = [f"val/cosines/layer_{n:02d}" for n in (1, 2, 3)]  # trained, or in the loss
    assert set(found) == {(step, tag) for step in (0, 2, 4, 6) for tag in layers}
    tokens = corpus_of(made, finished, monkeypatch).val.cosine_BxT.sum()
    means = {
        step: value for (step, tag), value in event_files.of_plugin(folder, "scalars").items()
        if tag == "val/cosine"
    }  # fmt: skip
    for step, mean in means.items():
        rows = [found[step, tag] for tag in layers]
        assert all(r[:, 2].sum() == tokens for r in rows)
        assert all((r[:-1, 1] == r[1:, 0]).all() for r in rows)  # no gaps
        middles = [(r[:, :2].mean(1) * r[:, 2]).sum() / tokens for r in rows[1:]]
        assert np.mean(middles) == pytest.approx(float(mean), abs=1 / cosines.BINS)
    assert found[0, layers[1]][:, 0].min() != found[6, layers[1]][:, 0].min()


def test_an_evaluations_picture_decodes_to_its_size(finished):
    _, folder = finished
    found = event_files.of_plugin(folder, "images")
    assert set(found) == {(step, "val/cosines/map") for step in (0, 2, 4, 6)}
    for width, height, png in found.values():
        pixels_HxWxC = image.imread(io.BytesIO(png))
        assert pixels_HxWxC.shape == (int(height), int(width), 4) == (400, 700, 4)
    assert found[0, "val/cosines/map"][2] != found[6, "val/cosines/map"][2]


def test_the_run_is_a_row_of_the_hparams_tab(finished):
    c, folder = finished
    start = event_files.hparams_of(folder, hparams.SESSION_START_INFO_TAG)
    assert start.group_name == "dual+_s0"
    values = start.hparams
    assert values["arm"].string_value == "dual" and values["sign"].number_value == 1
    assert values["train.lr"].number_value == c.train.lr
    assert values["train.flash"].bool_value is True
    assert values["train.layers"].string_value == "(1, 3)"
    assert set(values) == set(flat_settings(c.to_dict()))
    assert not [k for k in values if k.startswith(("study.", "chat.", "eval.", "steer."))]

    about = event_files.hparams_of(folder, hparams.EXPERIMENT_TAG)
    assert {info.name for info in about.hparam_infos} == set(values)
    metrics = {info.name.tag for info in about.metric_infos}
    assert {"val/best", "val/loss", "val/cosine", "val/token_loss"} <= metrics
    scalars = event_files.of_plugin(folder, "scalars")
    assert metrics <= {tag for _, tag in scalars}
    best = min(v for (_, tag), v in scalars.items() if tag == "val/loss")
    assert scalars[6, "val/best"] == best

    end = event_files.hparams_of(folder, hparams.SESSION_END_INFO_TAG)
    assert end.status == api_pb2.STATUS_SUCCESS and end.end_time_secs >= start.start_time_secs


def test_the_runs_of_a_study_stand_side_by_side_in_the_hparams_tab(finished, made, monkeypatch):
    c, folder = finished
    tiny_behavior.patch_neutral(monkeypatch)
    other = c.copy_and_resolve_references()
    other.arm = "token"
    train.run(other, folder.parent, made[0])
    rows = {row.name: row for row in event_files.hparams_tab(folder.parent)}
    assert {row.hparams["arm"].string_value for row in rows.values()} == {"dual", "token"}
    for name, row in rows.items():
        assert [s.status for s in row.sessions] == [api_pb2.STATUS_SUCCESS]
        shown = {m.name.tag: m.value for m in row.metric_values}
        lines = (folder.parent / name / "metrics.jsonl").read_text().splitlines()
        last = [r for r in map(json.loads, lines) if "val/loss" in r][-1]
        for tag in ("val/loss", "val/best", "val/cosine"):
            assert shown[tag] == pytest.approx(last[tag], rel=1e-6)


# ---------------------------------------------------------------- the pieces


def test_the_spread_is_numpys_histogram_and_means_by_place():
    rng = np.random.default_rng(0)
    cosine_NxBxT = rng.uniform(-1, 1, (3, 4, 7)).astype(np.float32)
    cosine_NxBxT[0, 1, 2], cosine_NxBxT[0, 1, 3] = 1.0, -1.0  # the ends belong to it
    weight_BxT = np.zeros((4, 7), np.float32)
    for b, (start, stop) in enumerate([(0, 7), (2, 4), (3, 4)]):  # and a row without any
        weight_BxT[b, start:stop] = 1
    found = jax.jit(cosines.spread)(cosine_NxBxT, weight_BxT)
    chosen = weight_BxT > 0
    for n in range(3):
        values = cosine_NxBxT[n][chosen]
        expected_K, _ = np.histogram(values, bins=cosines.BINS, range=(-1, 1))
        np.testing.assert_array_equal(found.count_NxK[n], expected_K)
        first = cosine_NxBxT[n][[0, 1, 2], [0, 2, 3]].mean()
        second = cosine_NxBxT[n][[0, 1], [1, 3]].mean()
        place_P = cosines.by_place(found)[n]
        np.testing.assert_allclose(place_P[:2], [first, second], rtol=1e-6)
        np.testing.assert_allclose(place_P[2:], cosine_NxBxT[n, 0, 2:], rtol=1e-6)
    assert np.asarray(found.count_P).tolist() == [3, 2, 1, 1, 1, 1, 1]


def test_buckets_keep_what_is_between_the_first_and_the_last():
    rows = cosines.buckets(np.array([0, 2, 0, 5, 0, 0, 0, 0]))
    np.testing.assert_allclose(rows, [[-0.75, -0.5, 2], [-0.5, -0.25, 0], [-0.25, 0, 5]])
    assert cosines.buckets(np.zeros(8)).shape == (0, 3)


def test_a_map_is_red_toward_the_vector_and_blue_away_from_it_on_one_scale():
    def corner(value):
        """RGB in the middle of the first cell of a map of one value."""
        pixels = image.imread(io.BytesIO(heatmap.draw(np.full((2, 3), value), "x")))
        return pixels[200, 150, :3]

    (red, _, blue), (other_red, _, other_blue) = corner(0.1), corner(-0.1)
    assert red > blue + 0.2 and other_blue > other_red + 0.2
    assert corner(0.0).min() > 0.95
    assert (corner(0.11) > corner(0.1)).any()  # the next scale: paler


def test_rates_count_training_steps_only(tmp_path, monkeypatch):
    """100 s of clock, of which an evaluation takes 60."""
    times = iter([0.0, 10.0, 70.0, 100.0])
    monkeypatch.setattr(logs.time, "monotonic", lambda: next(times))
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    with contextlib.closing(logs.Log(tmp_path, 40)) as log:
        assert log.rates(1, examples=2, tokens=64) == {}
        with log.aside():
            pass
        assert log.rates(5, examples=2, tokens=64) == {"examples_per_s": 0.2, "tokens_per_s": 6.4}


def test_a_clock_that_was_set_back_hides_nothing(tmp_path, monkeypatch):
    """The second start, which goes on after step 2, has an earlier clock than the first."""
    for now, since, steps in ((2_000_000_000, 0, (1, 2, 3)), (1_000_000_000, 2, (3, 4))):
        monkeypatch.setattr(events.time, "time", lambda now=now: float(now))
        made = events.Events(tmp_path, since)
        for step in steps:
            made.scalars(step, {"loss": step + now / 1e10})
        made.close()
    found = event_files.of_plugin(tmp_path, "scalars")
    want = {(1, "loss"): 1.2, (2, "loss"): 2.2, (3, "loss"): 3.1, (4, "loss"): 4.1}
    assert {key: round(float(value), 4) for key, value in found.items()} == want
    times = [e.wall_time for e in event_files.read(tmp_path).Tensors("loss")]
    assert times == sorted(times)
