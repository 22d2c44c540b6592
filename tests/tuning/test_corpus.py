"""What a run learns from, and that nothing of it is missing."""

import numpy as np
import pytest

from reptune_jax.data import behavior as behaviors
from reptune_jax.data.tuning import Answer
from reptune_jax.folder import Study
from reptune_jax.tuning import corpus
from reptune_jax.vectors import extraction
from tests.support import tiny_behavior


@pytest.mark.parametrize(
    "lines,said",
    [
        (slice(2, None), "got 4 answers of split 'tune', 4 of them to its prompts, expected 6"),
        (slice(6, None), "got 0 answers of split 'tune'"),
        (slice(0, 9), "got 3 answers of split 'val', 3 of them to its prompts, expected 8"),
        ([*range(14), 13], "got 9 answers of split 'val', 8 of them to its prompts, expected 8"),
    ],
)
def test_targets_that_were_cut_between_two_lines_are_refused(lines, said, tmp_path):
    path = tiny_behavior.write(tmp_path)  # 4 prompts a split
    behavior, study = behaviors.load(path), Study(tmp_path)
    c = tiny_behavior.settings(tmp_path, path, targets__prompts=3)
    every = [
        Answer(f"{split}{i}", split, sign, "?", "!", [5], 0.0)
        for split, n in (("tune", 3), ("val", 4))
        for sign in (1, -1)
        for i in range(n)
    ]
    extraction.write_targets(study.targets, every)
    for split in ("tune", "val"):
        found = corpus._answers(c, study, behavior, split)
        assert found == [a for a in every if a.split == split]
    cut = every[lines] if isinstance(lines, slice) else [every[i] for i in lines]
    extraction.write_targets(study.targets, cut)
    with pytest.raises(ValueError, match=f"targets.jsonl: {said}"):
        for split in ("tune", "val"):
            corpus._answers(c, study, behavior, split)


@pytest.mark.parametrize("steps,held", [(2, 6 + 2), (3, 9 + 3), (9, 20 + 5)])
def test_only_the_examples_of_its_steps_are_held(steps, held):
    each = [[corpus.Example([i, i], [0], [[(1, 1.0)]], (0, 1)) for i in at]
            for at in (range(20), range(20, 25))]  # fmt: skip
    rows = corpus._stack(each, 0, 2)
    whole = corpus.Corpus(rows, rows, None, None, (20, 5), (3, 1))
    less = whole.of_steps(7, steps)
    assert len(less.train.tokens_BxT) == held
    for step in range(steps):
        batches = (one.batch(7, step, 0).examples for one in (whole, less))
        tokens, of = zip(*((e.tokens_BxT.tolist(), e.of_B.tolist()) for e in batches), strict=True)
        assert tokens[0] == tokens[1] and of[0] == of[1]


class Drawn(list):
    """Texts of which the base model has nothing to say."""

    def take(self, at):
        return np.array(self)[at]


@pytest.mark.parametrize("steps,held", [(2, 4), (5, 10), (9, 10)])
def test_only_the_texts_of_its_steps_and_validations_are_read(steps, held):
    rows = corpus._stack([[corpus.Example([i], [0], [[(1, 1.0)]], (0, 1)) for i in range(7)]], 0, 1)
    whole = corpus.Corpus(rows, rows, None, None, (7,), (3,))
    less = whole.retaining(Drawn(range(10)), Drawn(range(20, 30)), 7, steps, 2)
    assert len(less.retention) == held and less.retention_val.tolist() == [*range(20, 26)]
    for step in range(steps):
        got = less.batch(7, step, 2).retention
        assert got.tolist() == corpus.choose(10, 2, 7, step).tolist()


def test_few_rows_are_drawn_by_the_seed(tmp_path):
    found = [corpus.Example([i], [0], [[(1, 1.0)]], (0, 1)) for i in range(9)]
    c = tiny_behavior.settings(tmp_path, tmp_path / "b.jsonl", train__rows=4)
    drawn = {}
    for c.seed in (0, 1, 0):
        some = [e.ids[0] for e in corpus._some(found, c)]
        assert len(set(some)) == 4 and drawn.setdefault(c.seed, some) == some
    assert set(drawn[0]) != set(drawn[1])
    c.train.rows = 0
    assert corpus._some(found, c) == found
    c.train.rows = 10
    with pytest.raises(ValueError, match=r"train.rows: got 10, expected at most the 9 tuning rows"):
        corpus._some(found, c)


def test_the_share_of_real_tokens_weighs_rows_as_steps_take_them():
    def rows(*lengths, T=8):
        each = [corpus.Example([1] * n, [0], [[(1, 1.0)]], (0, 1)) for n in lengths]
        return corpus._stack([each], 0, T)

    whole = corpus.Corpus(rows(8, 4), rows(1), None, None, (2,), (3,))
    assert whole.real_share(5) == 0.75
    assert whole._replace(retention=rows(2, 2)).real_share(1) == (3 * 0.75 + 0.25) / 4
