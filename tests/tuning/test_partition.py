"""A model is cut for tuning without a second copy of it, and put together again."""

import gc
import weakref

import jax
import numpy as np
import pytest

import reptune_jax as rt
from reptune_jax.tuning import partition
from tests.support import tiny


@pytest.fixture
def params(tmp_path):
    return rt.load(str(tiny.make_llama(tmp_path)), "float32").params


@pytest.mark.parametrize("layers", [(1, 3), (0, 4), (0, 1), (3, 4)])
def test_what_is_lent_is_there_once_and_comes_back(layers, params):
    """Bit for bit, where the wholes and then the parts are gone; also when training fails."""
    before = jax.tree.map(np.array, params)
    trained, frozen = partition.split(params, layers, ("attn/v",))
    wholes = [weakref.ref(leaf) for leaf in jax.tree.leaves(params["blocks"])]
    held: list[weakref.ref] = []
    alone = layers == (0, 4)  # the one part is the whole

    def fails(tree):
        own, rest = partition.split(tree, layers, ("attn/v",))
        for mine, theirs in ((trained, own), (frozen, rest)):
            jax.tree.map(np.testing.assert_array_equal, mine, theirs)
        held.extend(weakref.ref(leaf) for leaf in jax.tree.leaves(tree["tuned"]))
        raise RuntimeError("diverged")

    with pytest.raises(RuntimeError), partition.lent(params, layers) as tree:
        gc.collect()
        assert "blocks" not in params
        assert alone or all(ref() is None for ref in wholes)
        assert {name for name, _ in partition.segments(4, layers)} <= tree.keys()
        fails(tree)
    gc.collect()
    assert held and (alone or all(ref() is None for ref in held))
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_a_leaf_that_cannot_be_cut_is_not_lost(params, monkeypatch):
    """As where memory ends between two of them."""
    before, cuts = jax.tree.map(np.array, params), partition._cuts

    def second(N, layers):
        found, asked = cuts(N, layers), []

        class Fails(dict):
            def items(self):
                asked.append(1)
                if len(asked) == 2:
                    raise MemoryError
                return super().items()

        return Fails(found)

    monkeypatch.setattr(partition, "_cuts", second)
    with pytest.raises(MemoryError), partition.lent(params, (1, 3)):
        raise AssertionError
    jax.tree.map(np.testing.assert_array_equal, params, before)
