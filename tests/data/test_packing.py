"""Texts that share rows: where each lies, and that nothing of it is lost or doubled."""

import dataclasses

import numpy as np

from reptune_jax.data import packing
from reptune_jax.data.batches import Example, Retention, stack_examples

PAD = 99


def test_the_longest_come_first_and_each_lies_in_the_first_row_with_room():
    assert packing.fit([3, 7, 5, 3, 2], [0] * 5, 10) == [[1, 0], [2, 3, 4]]
    assert packing.fit([3, 7, 5, 3, 2], [0, 0, 1, 1, 0], 10) == [[1, 0], [2, 3], [4]]  # of one kind
    assert packing.fit([4, 4, 4], [0] * 3, 4) == [[0], [1], [2]]


def test_any_texts_lie_in_one_row_each_and_no_row_holds_too_much():
    rng = np.random.default_rng(0)
    for _ in range(50):
        n, room = int(rng.integers(1, 20)), int(rng.integers(10, 40))
        lengths, of = rng.integers(1, 11, n).tolist(), rng.integers(0, 3, n).tolist()
        rows = packing.fit(lengths, of, room)
        assert sorted(i for row in rows for i in row) == [*range(n)]
        assert all(sum(lengths[i] for i in row) <= room for row in rows)
        assert all(len({of[i] for i in row}) == 1 for row in rows)


def test_what_belongs_to_a_text_moves_with_it():
    examples = [
        Example([5, 6, 7], [0, 1], [[(8, 1.0)], [(9, 0.5), (4, 0.5)]], (1, 3)),
        Example([10, 11], [0], [[(12, 1.0)]], (0, 1)),
        Example([13, 14, 15, 16], [3], [[(17, 0.0)]], (3, 4)),  # no weight: no label
    ]
    side = stack_examples(examples, PAD, 6, of=[1, 1, 0])
    base_BxNxT = np.arange(3 * 2 * 6, dtype=np.float32).reshape(3, 2, 6)
    side = dataclasses.replace(side, base_BxNxT=base_BxNxT)
    rows = packing.arrange(side, np.array([2, 0, 1]), 6)
    assert rows == [[2], [0, 1]]
    got = packing.pack(side, rows, packing.Shape(3, 6, 3))
    assert got.text_BxT.tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 2, 2, 0], [0] * 6]
    assert got.mask_BxT.tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [0] * 6]
    assert got.tokens_BxT[1, :5].tolist() == [5, 6, 7, 10, 11]
    assert got.tokens_BxT[0, :4].tolist() == [13, 14, 15, 16]
    assert got.of_B.tolist() == [0, 1, 0]
    assert got.at_BxL[1].tolist() == [0, 1, 3]  # the second text begins at 3
    assert got.target_BxLxC[1].tolist() == [[8, 0], [9, 4], [12, 0]]
    assert got.weight_BxLxC[1].tolist() == [[1, 0], [0.5, 0.5], [1, 0]]
    assert not got.weight_BxLxC[[0, 2]].any()
    assert got.cosine_BxT.tolist() == [[0, 0, 0, 1, 0, 0], [0, 1, 1, 1, 0, 0], [0] * 6]
    assert got.base_BxNxT[1, :, :5].tolist() == [
        [*base_BxNxT[0, n, :3], *base_BxNxT[1, n, :2]] for n in range(2)
    ]


def test_retention_text_moves_with_what_the_base_says_of_it():
    hidden_BxLxD = np.arange(2 * 2 * 3, dtype=np.float32).reshape(2, 2, 3)
    side = Retention(
        tokens_BxT=np.array([[5, 6, 7, PAD], [8, 9, PAD, PAD]]),
        mask_BxT=np.array([[1, 1, 1, 0], [1, 1, 0, 0]]),
        at_BxL=np.array([[2, 0], [1, 0]]),
        weight_BxL=np.array([[1, 1], [1, 0]], np.float32),
        hidden_BxLxD=hidden_BxLxD,
        next_BxL=np.array([[0, 6], [9, 0]]),
        own_BxL=np.array([[0, 1], [0, 0]], np.float32),
        residual_BxMxLxD=hidden_BxLxD[:, None],
    )
    got = packing.pack(side, [[0, 1]], packing.Shape(1, 5, 3))
    assert got.tokens_BxT.tolist() == [[5, 6, 7, 8, 9]]
    assert got.at_BxL.tolist() == [[2, 0, 4]] and got.weight_BxL.tolist() == [[1, 1, 1]]
    assert got.next_BxL.tolist() == [[0, 6, 9]] and got.own_BxL.tolist() == [[0, 1, 0]]
    want_LxD = [*hidden_BxLxD[0].tolist(), hidden_BxLxD[1, 0].tolist()]
    assert got.hidden_BxLxD[0].tolist() == got.residual_BxMxLxD[0, 0].tolist() == want_LxD
