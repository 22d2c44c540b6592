"""What is asked of a chat and answered in words: arithmetic, instructions that can be checked.

A task is right or wrong by its own check, an exact match or a few lines of code; no judge. Chance
is 0. Arithmetic and instructions are this package's own and need no data.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from reptune_jax.evals.arms import Condition
from reptune_jax.evals.results import Row, sha
from reptune_jax.evals.suites.readers import Reader, drawn, each_row
from reptune_jax.hub.endings import said
from reptune_jax.model.decode import MISSING


class Task(NamedTuple):
    """One question, and whether an answer to it is right."""

    test: str
    question: str
    right: Callable[[str], bool]  # of the answer without space around it
    new: int  # tokens of an answer
    id: str = ""
    gold: str = ""  # what is right, where that is one text


def read(name: str, data: str, items: int = 0) -> list[Task]:
    """A suite's tasks; at most `items` of them, drawn with a fixed seed.

    Raises:
      ValueError: no such file in the folder `data`, more than one, or rows of another shape.
    """
    if name == "gsm8k":
        return [task for asked in each_row(name, _GSM8K, data, items) for task in asked]
    made = drawn([*_OWN[name]()], items)
    return [task._replace(id=f"{name}-{task.id}") for task in made]


def rows(cond: Condition, labels: dict[str, Any], tasks: Sequence[Task], batch: int) -> list[Row]:
    """`acc` and `chance` of every task, with the answer; NaN where its logits were not finite."""
    found = []
    for new in dict.fromkeys(task.new for task in tasks):
        asked = [task for task in tasks if task.new == new]
        turns = ([{"role": "user", "content": task.question}] for task in asked)
        prompts = [cond.model.encode_prompt(cond.under_persona(turn)) for turn in turns]
        how = new, 0.0, cond.steer, batch
        answers = cond.model.generate_each(prompts, *how, missing=True)
        for task, prompt, ids in zip(asked, prompts, answers, strict=True):
            text = said(cond.model.tokenizer, ids) if ids[-1] != MISSING else ""
            about: dict[str, Any] = {"split": "suites", "item_id": task.id, "cluster": task.id}
            about |= {"template": task.test, "format": "answer", "prompt_sha": sha(prompt)}
            acc = np.nan if ids[-1] == MISSING else float(task.right(text.strip()))
            found.append(Row(**labels, **about, metric="acc", value=acc, text=text))
            found.append(Row(**labels, **about, metric="chance", value=0.0))
    return found


def last_number(text: str) -> str:
    """The number that an answer ends with, as GSM8K is read; "" where there is none."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text.replace("\u2212", "-"))
    return numbers[-1].replace(",", "").removesuffix(".0") if numbers else ""


def _arithmetic() -> Iterator[Task]:
    """200 sums, differences and products of numbers with one or two digits, none twice."""
    rng, ways = np.random.default_rng(0), {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    asked: dict[tuple[str, int, int], None] = {}
    while len(asked) < 200:
        sign, most = ("+", "-", "*", "+", "-")[len(asked) % 5], (10, 100)[len(asked) % 2]
        a, b = rng.integers(1, 10 if sign == "*" else most, 2).tolist()
        asked[sign, a, b] = None
    for i, (sign, a, b) in enumerate(asked):
        right = _is_number(str(ways[sign](a, b)))
        question = f"What is {a} {sign} {b}? Answer with the number only."
        yield Task("arithmetic", question, right, 16, str(i))


def _is_number(want: str) -> Callable[[str], bool]:
    return lambda text: last_number(text) == want


def _gsm8k(row: dict[str, Any]) -> list[Task]:
    want = last_number(row["answer"].rpartition("####")[2])
    if not want:
        raise ValueError("no number behind ####")
    return [Task("gsm8k", row["question"], _is_number(want), 256, gold=want)]


_GSM8K = Reader(re.compile("gsm8k.*test"), ("openai/gsm8k", "main", "test"), _gsm8k)

_SUBJECTS = (
    "the sea", "a busy kitchen", "trains", "an old library", "rain", "gardening", "chess",
    "a mountain village", "baking bread", "the stars", "bicycles", "learning to swim",
)  # fmt: skip


def _has_keys(text: str) -> bool:
    text = re.sub(r"^```(?:json)?|```$", "", text.strip()).strip()
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return isinstance(found, dict) and found.keys() == {"subject", "note"}


def _items(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(("* ", "- "))]


# After IFEval (arXiv 2311.07911): what is asked of the form of an answer, and its check.
_FORMS: dict[str, tuple[str, Callable[[str], bool]]] = {
    "lowercase": (
        "Write one sentence about {}. Use no capital letters at all.",
        lambda text: any(map(str.isalpha, text)) and text == text.lower(),
    ),
    "capitals": (
        "Write one sentence about {} in capital letters only.",
        lambda text: any(map(str.isalpha, text)) and text == text.upper(),
    ),
    "no comma": (
        "Write two sentences about {} without using any comma.",
        lambda text: len(text.split()) > 5 and "," not in text,
    ),
    "three points": (
        'Write exactly three bullet points about {}. Begin each of them with "* ".',
        lambda text: len(_items(text)) == 3,
    ),
    "short": (
        "Say something about {} in fewer than 12 words.",
        lambda text: 0 < len(text.split()) < 12,
    ),
    "long": ("Write at least 40 words about {}.", lambda text: len(text.split()) >= 40),
    "quoted": (
        "Write one sentence about {}, and put your whole answer in double quotation marks.",
        lambda text: len(text) > 2 and text[0] + text[-1] in ('""', "\u201c\u201d"),
    ),
    "ending": (
        'Write one sentence about {} that ends with the words "and that is all".',
        lambda text: text.lower().rstrip(' .!"').endswith("and that is all"),
    ),
    "twice": (
        'Write two sentences about {}. Use the word "green" at least twice.',
        lambda text: len(re.findall(r"\bgreen\b", text.lower())) >= 2,
    ),
    "keys": (
        'Answer with a JSON object that has the keys "subject" and "note", about {}.',
        _has_keys,
    ),
}


def _instructions() -> Iterator[Task]:
    """Every form of every subject."""
    for form, (order, check) in _FORMS.items():
        for i, subject in enumerate(_SUBJECTS):
            yield Task("instructions", order.format(subject), check, 80, f"{form}-{i}")


_OWN = {"arithmetic": _arithmetic, "instructions": _instructions}
TASKS = (*_OWN, "gsm8k")
