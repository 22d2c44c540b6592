"""Batches are a function of (seed, step); examples put labels and cosines where they belong."""

import numpy as np
import pytest

from reptune_jax.data.batches import Example, choose, stack_examples
from reptune_jax.data.tuning import (
    Answer,
    balanced,
    best_share,
    fluent,
    response_example,
    verdict_example,
)


@pytest.mark.parametrize("total,batch", [(10, 4), (7, 3), (5, 8), (8, 8), (3, 10)])
def test_every_epoch_is_a_permutation_across_batch_borders(total, batch):
    rows = np.concatenate([choose(total, batch, 3, step) for step in range(4 * total)])
    assert len(rows) == 4 * total * batch
    epochs = rows.reshape(-1, total)
    assert (np.sort(epochs, axis=1) == np.arange(total)).all()
    assert len({tuple(epoch) for epoch in epochs}) > 1  # not the same order every time


def test_rows_depend_on_seed_and_step_only():
    forward = [choose(20, 6, 1, step) for step in range(9)]
    for step in reversed(range(9)):  # asked in another order
        assert (choose(20, 6, 1, step) == forward[step]).all()
    other = [choose(20, 6, 2, step) for step in range(9)]
    assert any((a != b).any() for a, b in zip(forward, other, strict=True))


def test_examples_are_stacked_with_padding_that_weighs_nothing():
    examples = [
        Example([5, 6, 7, 8], [1, 2], [[(7, 1.0)], [(8, 1.0)]], (2, 4)),
        Example([9, 10], [1], [[(11, 0.5), (12, 0.5)]], (0, 1)),
    ]
    rows = stack_examples(examples, pad_id=99, T=6)
    assert rows.tokens_BxT.tolist() == [[5, 6, 7, 8, 99, 99], [9, 10, 99, 99, 99, 99]]
    assert rows.mask_BxT.tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]
    assert rows.at_BxL.tolist() == [[1, 2], [1, 0]]
    assert rows.target_BxLxC.tolist() == [[[7, 0], [8, 0]], [[11, 12], [0, 0]]]
    assert rows.weight_BxLxC.tolist() == [[[1, 0], [1, 0]], [[0.5, 0.5], [0, 0]]]
    assert rows.cosine_BxT.tolist() == [[0, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert rows.of_B.tolist() == [0, 0]
    assert stack_examples(examples, pad_id=99, T=6, of=[2, 1]).of_B.tolist() == [2, 1]


def test_no_examples_is_an_error():
    with pytest.raises(ValueError, match="examples: got none"):
        stack_examples([], 0, 8)


def test_every_answer_token_is_predicted_from_the_token_before_it():
    example = response_example([4, 5, 6], [7, 8], (3, 5))
    assert example.ids == [4, 5, 6, 7, 8] and example.cosine == (3, 5)
    assert example.at == [2, 3] and example.targets == [[(7, 1.0)], [(8, 1.0)]]
    assert [example.ids[t + 1] for t in example.at] == [t[0][0] for t in example.targets]


def test_a_verdict_is_predicted_at_the_end_of_the_prompt():
    told = verdict_example([4, 5, 6], 7, 8, (1, 2), neutral=False)
    assert told.ids == [4, 5, 6] and told.at == [2] and told.cosine == (1, 2)
    assert told.targets == [[(7, 1.0)]]
    neutral = verdict_example([4, 5, 6], 7, 8, (1, 2), neutral=True)
    assert neutral.targets == [[(7, 0.5), (8, 0.5)]]


def answer(item, sign, odds=0.0):
    return Answer(item, "tune", sign, "?", "!", [1], odds)


def test_the_best_share_is_taken_of_each_sign():
    answers = [answer("a", 1, 3.0), answer("a", -1, 0.0), answer("b", 1, 2.5), answer("b", -1, 2.0)]
    kept = best_share(answers, 0.5)
    assert [(a.item, a.sign) for a in kept] == [("a", 1), ("b", -1)]
    assert best_share(answers, 1.0) == answers
    assert len(best_share(answers, 0.01)) == 2


def test_label_neutral_targets_have_as_many_of_either_sign():
    answers = [answer("a", 1), answer("b", 1), answer("b", -1), answer("c", 1)]
    assert [(a.item, a.sign) for a in balanced(answers)] == [("a", 1), ("b", -1)]
    assert balanced(answers[:2]) == []


def test_answers_that_loop_are_not_targets():
    prose, loop = list(range(20)), [1, 2, 3, 4] * 5
    answers = [Answer(str(i), "tune", 1, "", "", ids, 0.0) for i, ids in enumerate((prose, loop))]
    assert [a.item for a in fluent(answers, 0.1)] == ["0"]
    assert fluent(answers, 1.0) == answers
