"""Short texts that share rows: the same examples, the same losses and gradients, fewer tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reptune_jax import config, lm
from reptune_jax.data import packing as rows_of
from reptune_jax.data.batches import Batch, Example, stack_examples
from reptune_jax.mesh import make_mesh
from reptune_jax.model import attention
from reptune_jax.model.arch import Arch, Rope
from reptune_jax.model.read import read_at_once
from reptune_jax.tuning import base_cache, corpus, packing, retention
from reptune_jax.tuning import step as steps
from tests.support import tiny, tuning_case

ARCH = Arch("llama", 320, 64, 4, 4, 2, 16, 96, Rope(1e4), 1e-5, False)
T, OF = 32, (0, 1, 0, 0, 1, 0)  # rows of 32 tokens; the behavior of each example


def examples(V, lengths):
    """(prompt, answer) lengths to texts whose answers are labels and have cosines."""
    rng, out = np.random.default_rng(0), []
    for P, n in lengths:
        ids = rng.integers(4, V, P + n).tolist()
        targets = [[(t, 0.7), ((t + 1) % V, 0.3)] for t in ids[P:]]
        out.append(Example(ids, [*range(P - 1, P + n - 1)], targets, (P, P + n)))
    return out


def sides(model, c, case):
    """Examples of two behaviors and retention text, with all that any loss asks of the base."""
    # Longer than the window of the families that have one, 12.
    found = examples(model.arch.V, [(20, 9), (3, 4), (8, 7), (2, 3), (9, 16), (4, 4)])
    side = stack_examples(found, model.pad_id, T, OF)
    side = base_cache.add_cosines(side, model, case.objective.probe, 6)
    side = base_cache.add_endings(side, model, 6)
    side = base_cache.add_goals(side, model, tuple(c.train.layers), 6)
    rng = np.random.default_rng(1)
    pieces = [
        retention.Piece(rng.integers(4, model.arch.V, n).tolist(), 1, own=n % 2 == 1)
        for n in (27, 6, 9, 14)
    ]
    texts = retention.Texts(model, pieces, T, 5, batch=4, layers=tuple(c.train.layers))
    return side, texts.take(np.arange(4))


def in_rows(side, shape):
    """All texts of a side, packed."""
    at = np.arange(len(side.tokens_BxT))
    return rows_of.pack(side, rows_of.arrange(side, at, shape.tokens), shape)


@functools.partial(jax.jit, static_argnums=(0, 4))
def gradient(decoder, trained, objective, batch, accumulate):
    return steps.gradient(decoder, trained, objective, batch, objective.weight_J, accumulate)


def test_packed_rows_have_the_losses_and_gradient_of_padded_ones(tmp_path):
    """All losses, from kept states, of adapters; windows in some layers, and two rotations."""
    model = lm.load(str(tiny.make_family(tmp_path, "gemma3_text")), "float32")
    c = tuning_case.settings(
        train__layers=(1, 3), loss__layers=(0, 3), train__lora__rank=2, train__remat="none"
    )
    c.loss.mode, c.loss.goal, c.loss.match = "shift", "displaced", 1.0
    c.loss.retain = c.loss.l2 = c.loss.own = c.loss.ending = 0.5
    c.loss.also.second = config.also_behavior("unused")
    c.loss.also.second.layers = (0, 3)
    case = tuning_case.case(model, c, also={"second": tuning_case.vector(model, seed=1)})
    parts = [
        base_cache.add_below(side, model, case.decoder, case.objective, 2)
        for side in sides(model, c, case)
    ]
    moved = {  # else the losses that hold to the base have no gradient
        path: leaf + 0.05 * jax.random.normal(jax.random.key(1), leaf.shape)
        for path, leaf in case.state.trained.items()
    }
    grads, padded = gradient(case.decoder, moved, case.objective, Batch(*parts), 1)
    assert (np.asarray(padded[0]) > 1e-3).all()  # every loss has something to lose
    # Three of the examples' rows are empty, as devices may need; and there are 3 micro-batches.
    shapes = rows_of.Shape(6, 40, 24), rows_of.Shape(3, 40, 15)
    batch = Batch(*map(in_rows, parts, shapes))
    assert (batch.examples.text_BxT.max(1) > 0).sum() == 3 and batch.retention.text_BxT.max() == 2
    ours, packed = gradient(case.decoder, moved, case.objective, batch, 3)
    for name, got, want in zip(("losses", "cosines"), packed, padded, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6, err_msg=name)
    for path, g in grads.items():
        scale = float(jnp.abs(g).max())
        np.testing.assert_allclose(ours[path], g, rtol=0, atol=1e-5 * scale, err_msg=path)


def test_learned_positions_begin_anew_with_each_text(tmp_path):
    model = lm.load(str(tiny.make_family(tmp_path, "gpt2")), "float32")
    side = stack_examples(examples(model.arch.V, [(9, 2), (3, 4), (8, 7)]), model.pad_id, 16)
    rows, shape = [[2, 1], [0]], rows_of.Shape(2, 24, 12)
    packed = rows_of.pack(side, rows, shape)
    asked = {"text_BxT": packed.text_BxT}
    inputs = model.decoder, model.params
    got = read_at_once(*inputs, packed.tokens_BxT, packed.mask_BxT, **asked).hidden_BxTxD
    want = read_at_once(*inputs, side.tokens_BxT, side.mask_BxT).hidden_BxTxD
    for p, begin, i, n in ((0, 0, 2, 15), (0, 15, 1, 7), (1, 0, 0, 11)):
        np.testing.assert_allclose(got[p, begin : begin + n], want[i, :n], rtol=1e-5, atol=1e-5)


def made(lengths, batch, retained=(), L=3):
    """A corpus of texts of these lengths, of which a step takes `batch`."""

    def side(lengths):
        found = [Example([1] * n, [n - 1] * L, [[(i, 1.0)]] * L, (0, 1)) for i, n in
                 enumerate(lengths, 4)]  # fmt: skip
        return stack_examples(found, 0, 64)

    whole = corpus.Corpus(side(lengths), side(lengths[:1]), None, None, (len(lengths),), (batch,))
    if not retained:
        return whole
    return whole._replace(retention=side(retained), place_R=np.arange(len(retained)))


def settings(**changes):
    return tuning_case.settings(
        **{"train__pack": "on", "train__steps": 12, "train__retain_batch": 4} | changes
    )


def test_every_step_has_its_examples_in_rows_of_one_shape(capsys):
    rng = np.random.default_rng(3)
    whole = made(rng.integers(5, 50, 24).tolist(), 8, rng.integers(20, 64, 12).tolist())
    c = settings(train__accumulate=2)
    got = packing.packed(c, whole, ARCH, attention.XLA, None)
    shapes, fullest = set(), 0
    for step in range(12):
        ours, theirs = got.batch(0, step, 4), whole.batch(0, step, 4)
        for a, b in ((ours.examples, theirs.examples), (ours.retention, theirs.retention)):
            shapes.add((a.tokens_BxT.shape, a.at_BxL.shape))
            assert a.mask_BxT.sum() == b.mask_BxT.sum()
            labels = [side.target_BxLxC[side.weight_BxLxC > 0].tolist() for side in (a, b)]
            assert sorted(labels[0]) == sorted(labels[1])
        fullest = max(fullest, (ours.examples.text_BxT > 0).any(1).sum())
    assert len(shapes) == 2 and got.packing[0].rows == fullest + fullest % 2  # two micro-batches
    assert {shape.tokens for shape in got.packing} == {got.packing[0].tokens}
    # 12 steps are 4 epochs of examples and of texts, so that means over rows are those over steps.
    real = np.mean([sum(side.mask_BxT.sum() for side in (b.examples, b.retention))
                    for b in (got.batch(0, step, 4) for step in range(12))])  # fmt: skip
    tokens = sum(shape.rows * shape.tokens for shape in got.packing)
    assert got.step_size(4) == (8, tokens) and tokens < 12 * 64
    assert got.real_share(4) == pytest.approx(real / tokens)
    saved = 1 - tokens / (12 * 64)
    assert f"of {got.packing[0].tokens} tokens a step, {saved:.0%} of the tokens saved" in (
        capsys.readouterr().out
    )


def test_auto_packs_where_that_saves_tokens_and_one_text_a_row_is_not_asked_for(capsys):
    auto, cudnn = settings(train__pack="auto"), attention.Kernel("cudnn")
    short, full = made([20] * 12, 4), made([60] * 12, 4)
    assert packing.packed(auto, full, ARCH, attention.XLA, None).packing == ()
    assert packing.packed(auto, short, ARCH, cudnn, None).packing == ()
    many = settings(train__accumulate=8)  # of 8 rows, of which at least half would be empty
    assert packing.packed(many, short, ARCH, attention.XLA, None).packing == ()
    said = capsys.readouterr().out.splitlines()
    assert "not packed: rows would have 100% of the tokens that one text a row has" in said[0]
    assert "but cudnn takes one text a row" in said[1]
    assert "not packed: rows would have" in said[2] and len(said) == 3
    assert packing.packed(auto, short, ARCH, attention.XLA, None).packing
    assert packing.packed(settings(), short, ARCH, cudnn, None).packing  # asked for
    off = packing.packed(settings(train__pack="off"), short, ARCH, attention.XLA, None)
    assert off.packing == ()


def test_rows_are_shared_out_and_no_longer_than_what_a_model_has_positions_for():
    rng = np.random.default_rng(0)
    whole = made(rng.integers(5, 50, 32).tolist(), 16)
    mesh = jax.sharding.AbstractMesh((2, 4, 1), ("data", "fsdp", "tensor"))
    assert packing.packed(settings(), whole, ARCH, attention.XLA, mesh).packing[0].rows == 8
    learned = Arch("gpt2", 320, 64, 4, 4, 4, 16, 96, None, 1e-5, True, positions=64)
    assert packing.packed(settings(), whole, learned, attention.XLA, None).packing[0].tokens <= 64
    assert packing.packed(settings(), whole, ARCH, attention.XLA, make_mesh()).packing[0].rows < 8
