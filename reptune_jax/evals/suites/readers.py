"""The suites' rows as questions with choices, worded as lm-evaluation-harness words them.

A suite is an entry of `READERS`: the name of its file, where it is on the hub, and what a row asks.
Rows come through `datasets`, from a folder or from the hub, in the hub's columns.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from reptune_jax.reading import reading

Row = dict[str, Any]


class Question(NamedTuple):
    """One test of one row: which of the choices are right, and what each of them follows."""

    test: str  # the suite, or one of the tests that a suite is made of
    contexts: tuple[str, ...]  # one for each choice; alike but in winogrande
    choices: tuple[str, ...]  # scored after a space
    gold: frozenset[int]
    id: str = ""  # of the row


class Reader(NamedTuple):
    """Where a suite's rows are, and what they ask."""

    file: re.Pattern[str]  # of its path in the folder
    hub: tuple[str, str, str]  # id, configuration, split
    ask: Callable[[Row], list[Question]]


def read(name: str, data: str, items: int = 0) -> list[Question]:
    """A suite's questions; at most `items` of its rows, drawn with a fixed seed.

    Raises:
      ValueError: no such file in the folder `data`, more than one, or rows of another shape.
    """
    reader = READERS[name]
    source, rows = _rows(name, reader, data)
    chosen = [*range(len(rows))]
    if 0 < items < len(rows):
        chosen = sorted(np.random.default_rng(0).choice(len(rows), items, replace=False).tolist())
    found = []
    for i in chosen:
        with reading(source, f"Row {i} is not one of {name}: use the columns of {reader.hub[0]}."):
            asked = reader.ask({k: v for k, v in rows[i].items() if v is not None})
            if not all(one.gold and max(one.gold) < len(one.choices) for one in asked):
                raise ValueError(f"row {i} has no right choice")
            found += [one._replace(id=f"{name}-{i}") for one in asked]
    return found


def _rows(name: str, reader: Reader, data: str) -> tuple[str, Sequence[Row]]:
    """Where the rows come from, and the rows."""
    import datasets  # takes seconds

    datasets.disable_progress_bars()
    if not data:
        path, configuration, split = reader.hub
        with reading(path, f"Set suites.data to a folder with the file of {name}."):
            return path, datasets.load_dataset(path, configuration or None, split=split)
    folder = Path(data)
    paths = sorted(p for p in folder.rglob("*.json*") if p.is_file())
    fits = [p for p in paths if reader.file.search(p.relative_to(folder).as_posix().lower())]
    if len(fits) != 1:
        there = ", ".join(str(p.relative_to(folder)) for p in fits) or "none"
        raise ValueError(
            f"suites.data {folder}: got {there} for {name}, expected one .json or .jsonl file "
            f"whose path fits {reader.file.pattern!r}. Add it, or leave {name} out of suites.names."
        )
    with reading(fits[0]):
        rows = datasets.load_dataset("json", data_files=str(fits[0]), split="train")
    return str(fits[0]), rows


def _one(test: str, context: str, choices: Sequence[str], gold: int) -> list[Question]:
    return [Question(test, (context,) * len(choices), tuple(choices), frozenset([gold]))]


def _science(test: str, row: Row) -> list[Question]:
    context = f"Question: {row['question']}\nAnswer:"
    return _lettered(test, context, row)


def _lettered(test: str, context: str, row: Row) -> list[Question]:
    """The answer is named by its label."""
    choices = row["choices"]
    return _one(test, context, choices["text"], choices["label"].index(row["answerKey"].strip()))


def _hellaswag(row: Row) -> list[Question]:
    begun = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    endings = [_unmarked(ending) for ending in row["endings"]]
    return _one("hellaswag", _unmarked(begun), endings, int(row["label"]))


def _unmarked(text: str) -> str:
    """Without the marks that WikiHow's articles are left with."""
    plain = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return plain.replace("  ", " ")


def _piqa(row: Row) -> list[Question]:
    context = f"Question: {row['goal']}\nAnswer:"
    return _one("piqa", context, (row["sol1"], row["sol2"]), int(row["label"]))


def _winogrande(row: Row) -> list[Question]:
    """Partial scoring: how likely the rest of the sentence is after either name."""
    before, _, after = row["sentence"].partition("_")
    contexts = tuple(before + row[key] for key in ("option1", "option2"))
    gold = frozenset([int(row["answer"]) - 1])
    return [Question("winogrande", contexts, (after.strip(),) * 2, gold)]


def _mmlu(row: Row) -> list[Question]:
    """Only the letters are scored."""
    letters = "ABCD"
    subject = row["subject"].replace("_", " ")
    lines = [f"{letter}. {choice}" for letter, choice in zip(letters, row["choices"], strict=True)]
    context = "\n".join(
        [
            f"The following are multiple choice questions (with answers) about {subject}.\n",
            row["question"].strip(),
            *lines,
            "Answer:",
        ]
    )
    return _one("mmlu", context, letters, int(row["answer"]))


def _truthfulqa(row: Row) -> list[Question]:
    """MC0: the best answer or the first wrong one; MC1: it or any wrong one; MC2: all of both."""
    context = f"Q: {row['question']}\nA:"
    best, many = (_marked(row[key]) for key in ("mc1_targets", "mc2_targets"))
    right = [choice for choice, mark in best if mark]
    wrong = [choice for choice, mark in best if not mark]
    gold = frozenset(i for i, (_, mark) in enumerate(many) if mark)
    return [
        *_one("truthfulqa_mc0", context, (right[0], wrong[0]), 0),
        *_one("truthfulqa_mc1", context, (right[0], *wrong), 0),
        Question(MC2, (context,) * len(many), tuple(choice for choice, _ in many), gold),
    ]


def _marked(targets: dict[str, Any]) -> list[tuple[str, bool]]:
    """(answer, whether it is true): the hub has two lists, the authors' file one mapping."""
    if isinstance(targets.get("choices"), list):
        targets = dict(zip(targets["choices"], targets["labels"], strict=True))
    return [(choice, bool(mark)) for choice, mark in targets.items() if mark is not None]


MC2 = "truthfulqa_mc2"  # whose number is a share of probability
# Of these the harness's usual number is acc_norm, of the others acc.
NORMED = ("arc_challenge", "hellaswag", "openbookqa")

READERS: dict[str, Reader] = {
    "truthfulqa": Reader(
        re.compile(r"mc_task|truthful.*multiple_choice"),
        ("truthfulqa/truthful_qa", "multiple_choice", "validation"),
        _truthfulqa,
    ),
    "arc_easy": Reader(
        re.compile(r"arc[-_]easy"),
        ("allenai/ai2_arc", "ARC-Easy", "test"),
        lambda row: _science("arc_easy", row),
    ),
    "arc_challenge": Reader(
        re.compile(r"arc[-_]challenge"),
        ("allenai/ai2_arc", "ARC-Challenge", "test"),
        lambda row: _science("arc_challenge", row),
    ),
    "hellaswag": Reader(
        re.compile("hellaswag"), ("Rowan/hellaswag", "default", "validation"), _hellaswag
    ),
    "piqa": Reader(re.compile("piqa"), ("baber/piqa", "default", "validation"), _piqa),
    "winogrande": Reader(
        re.compile("winogrande"),
        ("allenai/winogrande", "winogrande_xl", "validation"),
        _winogrande,
    ),
    "openbookqa": Reader(
        re.compile("openbookqa"),
        ("allenai/openbookqa", "main", "test"),
        lambda row: _lettered("openbookqa", row["question_stem"], row),
    ),
    "mmlu": Reader(re.compile(r"mmlu.*test"), ("cais/mmlu", "all", "test"), _mmlu),
}
