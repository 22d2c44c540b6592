"""Products of float32 are asked for in float32, everywhere, unless JAX was told otherwise."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.lax import Precision

from reptune_jax import config, program
from reptune_jax.model.arch import Arch, Rope
from reptune_jax.model.intervene import Probe, steer_all
from reptune_jax.model.read import read
from reptune_jax.model.transformer import unembed, whole

B, T, N, D = 2, 5, 3, 16
ARCH = Arch("llama", 32, D, N, 4, 2, 4, 24, Rope(1e4), 1e-5, False)


def products(jaxpr: Any) -> Iterator[Any]:
    """(type, precision) of every product, in loops and calls too."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn.invars[0].aval.dtype, eqn.params["precision"]
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from products(inner)


def asked(dtype: Any) -> set[Any]:
    """Of a forward that is steered, probed, read and unembedded, and of its gradient."""
    decoder, tokens = whole(ARCH, dtype), jnp.ones((B, T), jnp.int32)
    params = jax.eval_shape(decoder.init, jax.random.key(0), tokens, tokens)["params"]
    v_NxD = jnp.ones((N, D))

    def loss(params: Any) -> jax.Array:
        found = read(
            decoder,
            {"params": params},
            tokens,
            tokens,
            probe=Probe(v_NxD, v_NxD),
            read_BxPxT=jnp.ones((B, 1, T)),
            steer=steer_all(v_NxD, jnp.ones(N), B, T),
        )
        logits = unembed(decoder, params, found.hidden_BxTxD)
        return logits.sum() + found.cosine_NxBxT.sum() + found.mean_NxBxPxD.sum()

    found = list(products(jax.make_jaxpr(jax.grad(loss))(params).jaxpr))
    assert len(found) > 20
    return set(found)


FULL = jnp.dtype("float32"), (Precision.HIGHEST, Precision.HIGHEST)


def test_every_product_is_asked_for_in_full():
    assert asked(jnp.float32) == {FULL}


def test_in_16_bits_only_what_is_computed_in_float32_is():
    found = asked(jnp.bfloat16)
    assert FULL in found and {how for kind, how in found if kind == jnp.bfloat16} == {None}


def test_who_asks_jax_for_less_gets_less():
    with jax.default_matmul_precision("tensorfloat32"):
        assert asked(jnp.float32) == {(FULL[0], (Precision.HIGH, Precision.HIGH))}


def test_a_config_asks_for_less_when_its_model_is_loaded(tmp_path):
    c = config.default()
    c.model = str(tmp_path / "none")
    before = jax.config.jax_default_matmul_precision
    try:
        for c.tf32, precision in ((False, before), (True, "tensorfloat32")):
            with pytest.raises(ValueError, match="does not exist"):
                program.load_model(c)
            assert jax.config.jax_default_matmul_precision == precision
    finally:
        jax.config.update("jax_default_matmul_precision", before)
