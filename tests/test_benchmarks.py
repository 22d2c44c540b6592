"""Benchmarks on tiny shapes: that they run, and what their numbers are made of."""

import itertools

import jax
import numpy as np
import pytest

from benchmarks import decode, precision
from tests.support import tiny

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
