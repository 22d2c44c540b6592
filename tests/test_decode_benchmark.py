"""`benchmarks.decode` on a tiny shape: its table, and the bytes it divides by."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import decode
from reptune_jax.model import families


@pytest.fixture
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_both_forms_are_in_the_table(capsys, quick_compilation):
    decode.main(["--shape=tiny", "--batches=2", "--prompt=5", "--tokens=4", "--rounds=1"])
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "apart |" in line]
    rows += [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "scan |" in line]
    assert [row[:2] for row in rows] == [["2", "apart"], ["2", "scan"]]
    assert len({row[3] for row in rows}) == 1 and all(float(row[6]) > 0 for row in rows)


def test_bytes_read_for_a_token_by_hand():
    arch = families.from_config(decode.SHAPES["tiny"])
    params = decode.random_params(arch, jnp.bfloat16)
    D, F, H, K, Dh, V, N = 64, 96, 4, 2, 16, 320, 2
    layer = 2 * D * H * Dh + 2 * D * K * Dh + 3 * D * F + 2 * D
    cache = 2 * N * 3 * K * 10 * Dh
    want = 2 * (N * layer + D + V * D + cache)  # the head, not the embedding
    assert decode.read_bytes(arch, params, 3, 10, jnp.bfloat16) == want
    kernel = params["blocks"]["mlp"]["up"]["kernel"].astype(jnp.float32)
    assert float(kernel.std()) == pytest.approx(0.02, rel=0.1)
    assert not bool((kernel[0] == kernel[1]).all())
    assert bool((params["blocks"]["mlp_norm"]["scale"] == 1).all())
