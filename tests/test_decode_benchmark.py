"""`benchmarks.decode` on a tiny shape: a row of its table, and the bytes it divides by."""

import jax
import pytest

from benchmarks import decode

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
