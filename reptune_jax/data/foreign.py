"""Contrastive data of other tools, in one form: which tool's it is, its columns say.

A format is an entry of FORMATS: whose it is, and the columns that hold prompt, positive and
negative text, or a statement and its label. Personas with questions, and our own items, are read
too.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from reptune_jax.data import rows, schema
from reptune_jax.reading import short

Turns = tuple[dict[str, str], ...]


class Given(NamedTuple):
    """A prompt with an answer that shows the behavior and one that opposes it."""

    prompt: Turns  # () where both texts stand for themselves
    positive: str
    negative: str


@dataclasses.dataclass(frozen=True)
class Foreign:
    """What a file holds; of the four, those that its format has."""

    name: str  # for people
    format: str
    given: tuple[Given, ...] = ()
    claims: tuple[tuple[str, int], ...] = ()  # (statement, 1 true or 0 false)
    personas: tuple[tuple[str, str], ...] = ()  # (with the behavior, with its opposite)
    questions: tuple[str, ...] = ()  # to ask under them


class Format(NamedTuple):
    """Columns by what is in them; "" where there is none."""

    whose: str
    prompt: str = ""
    positive: str = ""
    negative: str = ""
    statement: str = ""
    label: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(filter(None, self[1:]))


# The first whose columns are all there.
FORMATS = (
    Format(
        "CAA's A/B items, Anthropic's evals",
        "question",
        "answer_matching_behavior",
        "answer_not_matching_behavior",
    ),
    Format("CAA's TruthfulQA", "prompt", "correct", "incorrect"),
    Format("EasyEdit2", "prompt", "matching", "not_matching"),
    Format("SteerEval", "question", "matching", "not_matching"),
    Format("preferences", "prompt", "chosen", "rejected"),
    Format("preferences as dialogues", "", "chosen", "rejected"),
    Format("steering-vectors", "", "positive_str", "negative_str"),
    Format("pairs with their prompt", "prompt", "positive", "negative"),
    Format("repeng", "", "positive", "negative"),
    Format("RepE's facts", statement="statement", label="label"),
    Format("claims", statement="claim", label="label"),
)
_LISTED = "pairs as lists of two"  # repeng's and steering-vectors' tuples
_TRAIT = "personas and questions of persona_vectors"
_OWN = "items of reptune_jax"
_TRUTH = {"1": 1, "true": 1, "0": 0, "false": 0}


def read(name: str | os.PathLike[str]) -> Foreign:
    """The contrastive data of a file, or of a hub data set (`rows.place`).

    Raises:
      FileNotFoundError, ValueError: with what was found, and what is expected.
    """
    at = rows.place(name)
    found = rows.read(at)
    if isinstance(found, dict):
        return _trait(at, found)
    if not found:
        raise ValueError(f"{at.path}: got no rows, expected contrastive data.")
    if all(_is_two_texts(row) for row in found):
        return Foreign(at.name, _LISTED, tuple(Given((), *row) for row in found))
    if not isinstance(found[0], dict):
        raise ValueError(f"{at.path}: got {short(found[0])} as its first row, {_expected()}")
    if not at.columns and is_own(found[0]):
        return _own(at)
    form = recognized(at, found[0])
    read_row: Callable[[Any, Format], Any] = _claim if form.statement else _given
    out = []
    for number, row in enumerate(found):
        try:
            out.append(read_row(row, form))
        except (KeyError, TypeError, ValueError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else error
            raise ValueError(
                f"{at.path}, row {number}, from 0: got {what}, expected the columns of "
                f"{form.whose}: {', '.join(form.columns)}."
            ) from None
    parts = {"claims" if form.statement else "given": tuple(out)}
    return Foreign(at.name, form.whose, **parts)


def is_own(row: dict[str, Any]) -> bool:
    """Whether a file that begins with it is one of our behavior files."""
    return "measures" in row or {"id", "format", "messages"} <= row.keys()


def recognized(at: rows.Place, row: dict[str, Any]) -> Format:
    """The format that a row's columns are of, or that the name spells out.

    Raises:
      ValueError: none, with what was found and what is known.
    """
    rows.check(at, row)
    if at.columns:
        form = Format("those named", **at.columns)
        contrast, claim = form[2:4], form[4:]
        if not (all(contrast) and not any(claim)) and not (all(claim) and not any(form[1:4])):
            raise ValueError(
                f"{at.path}: got columns for {', '.join(at.columns)}, expected positive and "
                "negative, and prompt where there is one; or statement and label."
            )
        return form
    for form in FORMATS:
        if set(form.columns) <= row.keys():
            return form
    raise ValueError(f"{at.path}: got columns {', '.join(map(str, row))}; {_expected()}")


def _expected() -> str:
    known = "; ".join(f"{form.whose}: {', '.join(form.columns)}" for form in FORMATS)
    return (
        f"expected those of one of these: {known}; or {_LISTED}. Or say which are which: "
        "FILE?prompt=a&positive=b&negative=c, FILE?statement=a&label=b."
    )


def _given(row: dict[str, Any], form: Format) -> Given:
    """Answers are texts, or whole dialogues that end in one."""
    positive, negative = row[form.positive], row[form.negative]
    prompt = row[form.prompt] if form.prompt else None
    if isinstance(positive, list) and isinstance(negative, list):
        for turns in (positive, negative):
            if problem := schema.turns(turns):
                raise ValueError(f"{short(turns)}, not {problem}")
        if len(positive) > 1:
            prompt = positive[:-1]
        positive, negative = positive[-1]["content"], negative[-1]["content"]
    for name, value in ((form.positive, positive), (form.negative, negative)):
        if problem := schema.string(value):
            raise ValueError(f"{name}: {short(value)}, not {problem}")
    if isinstance(prompt, list):
        if problem := schema.turns(prompt):
            raise ValueError(f"{form.prompt}: {short(prompt)}, not {problem}")
        return Given(tuple(prompt), positive, negative)
    if not form.prompt:
        return Given((), positive, negative)
    if not isinstance(prompt, str) or schema.string(prompt):
        raise ValueError(f"{form.prompt}: {short(prompt)}, not {schema.string(prompt)}")
    return Given(({"role": "user", "content": prompt},), positive, negative)


def _claim(row: dict[str, Any], form: Format) -> tuple[str, int]:
    statement, label = row[form.statement], row[form.label]
    if problem := schema.string(statement):
        raise ValueError(f"{form.statement}: {short(statement)}, not {problem}")
    text = str(label).strip().lower().removesuffix(".0")
    if text not in _TRUTH:
        raise ValueError(f"{form.label}: {short(label)}, not 0, 1, true or false")
    return statement, _TRUTH[text]


def _trait(at: rows.Place, found: dict[str, Any]) -> Foreign:
    """`{"instruction": [{"pos": …, "neg": …}, …], "questions": […]}`."""
    if not {"instruction", "questions"} <= found.keys():
        keys = ", ".join(found)
        raise ValueError(
            f"{at.path}: got one JSON object with {keys}, expected a list of rows, or an object "
            f"with instruction and questions, as {_TRAIT}."
        )
    personas, questions = found["instruction"], found["questions"]
    fits = isinstance(personas, list) and all(
        isinstance(one, dict) and not any(schema.string(one.get(side)) for side in ("pos", "neg"))
        for one in personas
    )
    if not (fits and personas):
        raise ValueError(
            f"{at.path}: got instruction {short(personas)}, expected a list of objects, each with "
            "texts pos and neg."
        )
    if not (isinstance(questions, list) and questions and not any(map(schema.string, questions))):
        raise ValueError(
            f"{at.path}: got questions {short(questions)}, expected a list of texts, some at least."
        )
    both = tuple((one["pos"], one["neg"]) for one in personas)
    asked = tuple(questions[: at.limit or None])
    return Foreign(at.name, _TRAIT, personas=both, questions=asked)


def _own(at: rows.Place) -> Foreign:
    """Prompts with both answers, or claims, of the train split."""
    _, items = schema.read_jsonl(at.path)
    free = [i for i in schema.select(items, "train", "free") if i.pos and i.neg]
    claims = schema.select(items, "train", "claim")
    if not free and not claims:
        raise ValueError(
            f"{at.path}: got no free prompts with answers and no claims in split 'train', expected "
            "some. Add some."
        )
    return Foreign(
        at.name,
        _OWN,
        tuple(Given(i.messages, i.pos, i.neg) for i in free),
        () if free else tuple((i.text, int(i.label or 0)) for i in claims),
    )


def _is_two_texts(row: Any) -> bool:
    texts = isinstance(row, Sequence) and not isinstance(row, str) and len(row) == 2
    return texts and not any(map(schema.string, row))
