"""The suites' rows as questions with choices, worded as lm-evaluation-harness words them.

A suite is an entry of `READERS`: the name of its file, where it is on the hub, and what a row asks.
Rows come through `datasets`, from a folder or from the hub, in the hub's columns.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    ask: Callable[[Row], list[Any]]  # Questions, or Tasks of `tasks`
    parts: tuple[str, ...] = ()  # files and configurations, by name, where it has several


def read(name: str, data: str, items: int = 0) -> list[Question]:
    """A suite's questions; at most `items` of its rows, drawn with a fixed seed.

    Raises:
      ValueError: no such file in the folder `data`, more than one, or rows of another shape.
    """
    return [one for asked in each_row(name, READERS[name], data, items) for one in asked]


def each_row(name: str, reader: Reader, data: str, items: int) -> Iterator[list[Any]]:
    """What every row that is drawn asks, with its id."""
    sources = [_rows(name, reader, data, part) for part in reader.parts or ("",)]
    places = [(s, i) for s, (_, rows) in enumerate(sources) for i in range(len(rows))]
    for s, i in drawn(places, items):
        (source, rows), part = sources[s], reader.parts[s] if reader.parts else ""
        with reading(source, f"Row {i} is not one of {name}: use the columns of {reader.hub[0]}."):
            row = {k: v for k, v in rows[i].items() if v is not None}
            asked = reader.ask({**row, "part": part} if part else row)
        yield [one._replace(id="-".join(filter(None, (name, part, str(i))))) for one in asked]


def drawn(all_of_them: Sequence[Any], items: int) -> list[Any]:
    """At most so many of them, always the same, in their order; 0 = all."""
    chosen = [*range(len(all_of_them))]
    if 0 < items < len(chosen):
        chosen = sorted(np.random.default_rng(0).choice(len(chosen), items, replace=False).tolist())
    return [all_of_them[i] for i in chosen]


def _rows(name: str, reader: Reader, data: str, part: str) -> tuple[str, Sequence[Row]]:
    """Where the rows come from, and the rows."""
    import datasets  # takes seconds

    datasets.disable_progress_bars()
    if not data:
        path, configuration, split = reader.hub
        with reading(path, f"Set suites.data to a folder with the file of {name}."):
            return path, datasets.load_dataset(path, part or configuration or None, split=split)
    folder, fits = Path(data), reader.file
    if part:
        fits = re.compile(rf"{fits.pattern}.*\b{part}\.json")
    paths = sorted(p for p in folder.rglob("*.json*") if p.is_file())
    found = [p for p in paths if fits.search(p.relative_to(folder).as_posix().lower())]
    if len(found) != 1:
        there = ", ".join(str(p.relative_to(folder)) for p in found) or "none"
        raise ValueError(
            f"suites.data {folder}: got {there} for {name}, expected one .json or .jsonl file "
            f"whose path fits {fits.pattern!r}. Add it, or leave {name} out of suites.names."
        )
    field = "examples" if part and found[0].suffix == ".json" else None
    with reading(found[0]):
        files = str(found[0])
        rows = datasets.load_dataset("json", data_files=files, split="train", field=field)
    return str(found[0]), rows


def _one(test: str, context: str, choices: Sequence[str], gold: int) -> list[Question]:
    return [_question(test, (context,) * len(choices), choices, {gold})]


def _question(
    test: str, contexts: tuple[str, ...], choices: Sequence[str], gold: Iterable[int]
) -> Question:
    right = frozenset(gold)
    if not right or max(right) >= len(choices):
        raise ValueError(f"no right choice of {test}")
    return Question(test, contexts, tuple(choices), right)


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
    return [_question("winogrande", contexts, (after.strip(),) * 2, {int(row["answer"]) - 1})]


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


def _bbh(row: Row) -> list[Question]:
    """The letter or the word of an option; nothing where the row's own target is none of them."""
    _, _, options = row["input"].partition("\nOptions:\n")
    lettered = re.findall(r"^\([A-Z]\)", options, re.MULTILINE)
    words = [line.removeprefix("- ").strip() for line in options.splitlines()]
    choices = lettered or words or _BBH[row["part"]]
    if row["target"] not in choices:  # three rows of the published files
        return []
    return _one("bbh", f"Q: {row['input']}\nA:", choices, choices.index(row["target"]))


def _truthfulqa(row: Row) -> list[Question]:
    """MC0: the best answer or the first wrong one; MC1: it or any wrong one; MC2: all of both."""
    context = f"Q: {row['question']}\nA:"
    best, many = (_marked(row[key]) for key in ("mc1_targets", "mc2_targets"))
    right = [choice for choice, mark in best if mark]
    wrong = [choice for choice, mark in best if not mark]
    gold = {i for i, (_, mark) in enumerate(many) if mark}
    return [
        *_one("truthfulqa_mc0", context, (right[0], wrong[0]), 0),
        *_one("truthfulqa_mc1", context, (right[0], *wrong), 0),
        _question(MC2, (context,) * len(many), [choice for choice, _ in many], gold),
    ]


def _marked(targets: dict[str, Any]) -> list[tuple[str, bool]]:
    """(answer, whether it is true): the hub has two lists, the authors' file one mapping."""
    if isinstance(targets.get("choices"), list):
        targets = dict(zip(targets["choices"], targets["labels"], strict=True))
    return [(choice, bool(mark)) for choice, mark in targets.items() if mark is not None]


MC2 = "truthfulqa_mc2"  # whose number is a share of probability
# Of these the harness's usual number is acc_norm, of the others acc.
NORMED = ("arc_challenge", "hellaswag", "openbookqa")

_BBH: dict[str, Sequence[str]] = {  # choices of the parts whose rows do not list them
    "boolean_expressions": ("False", "True"),
    "sports_understanding": ("no", "yes"),
    "web_of_lies": ("No", "Yes"),
    "object_counting": [str(n) for n in range(19)],
}
_BBH_PARTS = (
    *_BBH, "causal_judgement", "date_understanding", "disambiguation_qa", "formal_fallacies",
    "geometric_shapes", "hyperbaton", "logical_deduction_three_objects",
    "logical_deduction_five_objects", "logical_deduction_seven_objects", "movie_recommendation",
    "navigate", "penguins_in_a_table", "reasoning_about_colored_objects", "ruin_names",
    "salient_translation_error_detection", "snarks", "temporal_sequences",
    "tracking_shuffled_objects_three_objects", "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects",
)  # fmt: skip

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
    "bbh": Reader(re.compile("bbh"), ("lukaemon/bbh", "", "test"), _bbh, _BBH_PARTS),
}
