"""Benchmarks on tiny shapes: that they run, and what their numbers are made of."""

import itertools

import jax
import numpy as np
import pytest

from benchmarks import choices, decode, precision
from tests.support import tiny, tiny_behavior

B, PROMPT, TOKENS = 2, 5, 4


def test_a_row_has_the_bytes_of_weights_and_cache(capsys, monkeypatch):
    monkeypatch.setattr(decode, "FORMS", {"apart": decode.FORMS["apart"]})  # compiling is the cost
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        sizes = [f"--batches={B}", f"--prompt={PROMPT}", f"--tokens={TOKENS}", "--rounds=1"]
        decode.main(["--shape=tiny", *sizes])
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    row = capsys.readouterr().out.splitlines()[-1]
    rows, form, _, read_gb, _, _, peak_gib, _ = (cell.strip() for cell in row.split("|")[1:-1])
    assert (rows, form) == (str(B), "apart")
    D, F, H, K, Dh, V, N = 64, 96, 4, 2, 16, 320, 2
    layer = 2 * D * H * Dh + 2 * D * K * Dh + 3 * D * F + 2 * D
    cache = 2 * N * B * K * (PROMPT + TOKENS + 1) * Dh
    read = 2 * (N * layer + D + V * D + cache)  # the head, not the embedding
    assert float(read_gb) == pytest.approx(read / 1e9, rel=1e-3)
    assert float(peak_gib) * 2**30 > read + 2 * (V * D + N * layer)  # and the loop's copy


def test_precision_tells_a_wrong_window_from_rounding():
    lines = list(itertools.islice(precision.attentions(), 2))
    assert [line.what for line in lines] == [
        "attention, xla, 96 tokens",
        "attention, xla, 7 tokens, window 8",
    ]
    assert all(line.fine and line.ours < 1e-6 for line in lines)
    rng = np.random.default_rng(1)
    q, k, v = rng.normal(size=(1, 9, 4, 8)), *rng.normal(size=(2, 1, 2, 9, 8))
    one_more = precision.error(precision.exact(q, k, v, 9), precision.exact(q, k, v, 8))
    assert one_more > 10 * precision.ATTENTION["bfloat16"]


def test_precision_holds_a_whole_model_against_float64(tmp_path):
    lines = list(precision.models(tiny.make_llama(tmp_path)))
    assert len(lines) == 9 and all(line.fine for line in lines)
    assert {line.dtype for line in lines} == set(precision.MODEL)
    for line in lines:  # each type errs, and by about as much as it must
        low, high = {"float32": (1e-8, 1e-6), "bfloat16": (1e-3, 2e-2), "float16": (1e-4, 3e-3)}[
            line.dtype
        ]
        assert low < line.ours < high and low < line.torch < high, line


def test_fixed_choices_are_held_against_what_was_selected(tmp_path, monkeypatch, capsys):
    """Every layer, the zone and the depth, each at a dose of its own within the budget."""
    tiny_behavior.patch_neutral(monkeypatch)
    c = tiny_behavior.settings(
        tiny.make_llama(tmp_path / "model"),
        tiny_behavior.write(tmp_path),
        study__primary="logodds:free",
        select__methods=("mean_diff", "pca_center"),
        select__layers=("0", "1"),
        select__widths=(1,),
        select__operations=("add", "rotate"),
        select__keep=1,
        select__max_kl=0.5,
        select__broken=1.0,
    )
    lines = choices.compare(c, tmp_path / "choices", 3)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    names = [row[0] for row in rows[2:]]
    assert names[:3] == ["select", "repeng's zone", "the paper's depth"]
    assert [name.split(", ")[1] for name in names[3:]] == [
        f"the {which} of all" for which in ("best", "median", "worst")
    ]
    assert all(0 < float(row[3]) < 5 for row in rows[2:]) and rows[2][-1] == ""
    printed = capsys.readouterr().out
    assert all(f"  layer {layer}: " in printed for layer in range(4))
    assert lines[-1].endswith("of 4.")
