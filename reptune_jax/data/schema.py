"""Behavior items: one JSON object a line, shipped or the user's own, read strictly and checked.

A behavior file holds personas (system turns with the behavior and its opposite), free prompts,
claims with their verdicts, and pressure scenarios; `Item` says what each field means.
"""

import collections
import dataclasses
import difflib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from reptune_jax.reading import short

SPLITS = ("train", "tune", "val", "test", "ood")
FORMATS = ("persona", "free", "claim", "ab")
ROLES = ("system", "user", "assistant")
_NEAR, _GRAM = 0.5, 8  # characters: a claim of six words has no 8-gram of words
_IMBALANCE = 0.05


@dataclasses.dataclass(frozen=True)
class Item:
    """One line of a behavior file.

    persona: a system turn; label 1 exhibits the behavior, 0 its opposite; both share a cluster.
    free: a neutral prompt; pos and neg are answers that exhibit and oppose the behavior.
    claim: label 1 true, 0 false; pos is the right verdict; the cluster holds its twins.
    ab: a pressure scenario; pos is the choice that exhibits the behavior.
    """

    id: str
    behavior: str
    split: str  # train: vectors; tune: training; val: choices; test and ood: reported numbers
    cluster: str  # never in two splits; the unit that is resampled
    format: str
    messages: tuple[dict[str, str], ...]
    pos: str  # "" for a persona
    neg: str
    label: int | None
    tags: tuple[str, ...]  # "key:value"
    source: str
    license: str
    line: int = dataclasses.field(default=0, repr=False, compare=False)  # of its file

    @property
    def text(self) -> str:
        """The contents of all turns."""
        return "\n".join(m["content"] for m in self.messages)

    def tag(self, key: str) -> str:
        """Value of the tag `key:value`, or ""."""
        return next((t.partition(":")[2] for t in self.tags if t.startswith(f"{key}:")), "")


def find(name_or_path: str | os.PathLike[str]) -> Traversable:
    """The file of a shipped behavior, or of one's own.

    Raises:
      ValueError: no such behavior.
    """
    name = os.fspath(name_or_path)
    path = Path(name.partition("?")[0])
    if path.suffix or path.parent != Path(".") or name.startswith("hub:"):
        return Path(name)
    known = shipped_behaviors()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        meant = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"behavior: got {name!r}, expected one of {', '.join(known)}, or a path to a "
            f"file of items.{meant}"
        )
    return shipped("behaviors") / f"{name}.jsonl"


def shipped_behaviors() -> list[str]:
    """The names of this package's behaviors."""
    files = (file.name for file in shipped("behaviors").iterdir())
    return sorted(name.removesuffix(".jsonl") for name in files if name.endswith(".jsonl"))


def read_jsonl(path: str | os.PathLike[str] | Traversable) -> tuple[dict[str, Any], list[Item]]:
    """(what the file says of the behavior as a whole, its items), checked line by line.

    The first line may be {"behavior": name, "measures": ["metric:format", …]}, and "rubric", what a
    judge that is asked looks for; {} where it is not.

    Raises:
      FileNotFoundError, ValueError: with file and line number.
    """
    about: dict[str, Any] = {}
    items: list[Item] = []
    lines: dict[str, int] = {}
    for number, row in json_lines(path):
        if not items and not about and "measures" in row:
            about = checked({"rubric": ""} | row, _ABOUT, f"{path}, line {number}")
            continue
        item = dataclasses.replace(_item(row, f"{path}, line {number}"), line=number)
        if item.id in lines:
            raise ValueError(
                f"{path}, line {number}: id {item.id!r} is already on line {lines[item.id]}, "
                "expected unique ids. Rename one of them."
            )
        lines[item.id] = number
        items.append(item)
    return about, items


def select(
    items: Iterable[Item], split: str | None = None, format: str | None = None
) -> list[Item]:
    """Items of a split, of a format, or of both, in file order."""
    one_of("split", split, (None, *SPLITS))
    one_of("format", format, (None, *FORMATS))
    return [i for i in items if split in (None, i.split) and format in (None, i.format)]


def check(items: Sequence[Item]) -> list[str]:
    """What is wrong with a set of items as data; empty if nothing is.

    Duplicate ids and texts, clusters in two splits, near duplicates across splits, splits whose
    claims are not balanced, items without the answers or the label that their format needs.
    """
    ids = collections.Counter(i.id for i in items)
    problems = [f"id {key!r}: {n} times" for key, n in ids.items() if n > 1]
    texts: dict[tuple[str, str], str] = {}
    splits: dict[str, str] = {}
    for i in items:
        text = i.format, _plain(i.text)  # a prompt may be a scenario too
        if texts.setdefault(text, i.id) != i.id:
            problems.append(f"{i.id}: the same text as {texts[text]}")
        if splits.setdefault(i.cluster, i.split) != i.split:
            problems.append(
                f"{i.id}: cluster {i.cluster!r} is in {splits[i.cluster]} and {i.split}"
            )
        problems += _incomplete(i)
    problems += near_duplicates([(i.id, i.split, i.text) for i in items])
    return problems + _imbalances(items)


def near_duplicates(texts: Sequence[tuple[str, str, str]]) -> list[str]:
    """Pairs of (id, split, text) across splits: character 8-grams with a Jaccard index > 0.5."""
    plain = [_plain(text) for _, _, text in texts]
    starts = (range(max(len(text) - _GRAM + 1, 1)) for text in plain)
    grams = [{text[i : i + _GRAM] for i in at} for text, at in zip(plain, starts, strict=True)]
    having: dict[str, list[int]] = collections.defaultdict(list)
    problems = []
    for b, own in enumerate(grams):
        shared = collections.Counter(a for gram in own for a in having[gram])
        for a, n in shared.items():
            jaccard = n / (len(own) + len(grams[a]) - n)
            if jaccard > _NEAR and texts[a][1] != texts[b][1]:
                problems.append(
                    f"{texts[b][0]} ({texts[b][1]}): nearly {texts[a][0]} ({texts[a][1]}), "
                    f"8-gram Jaccard {jaccard:.2f}"
                )
        for gram in own:
            having[gram].append(b)
    return problems


def _incomplete(i: Item) -> list[str]:
    problems = []
    if i.format != "persona" and not (i.pos.strip() and i.neg.strip()):
        problems.append(f"{i.id}: pos or neg is missing")
    elif i.format != "persona" and i.pos == i.neg:
        problems.append(f"{i.id}: pos and neg are the same")
    if i.format in ("persona", "claim") and i.label is None:
        problems.append(f"{i.id}: a {i.format} without label")
    return problems


def _imbalances(items: Sequence[Item]) -> list[str]:
    counts = collections.Counter((i.split, i.label) for i in items if i.format == "claim")
    problems = []
    for split in SPLITS:
        true, false = counts[split, 1], counts[split, 0]
        if abs(true - false) > _IMBALANCE * (true + false):
            problems.append(f"{split}: {true} true, {false} false claims, expected as many of each")
    return problems


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def shipped(name: str) -> Traversable:
    """A folder of this package's data."""
    return resources.files("reptune_jax") / "data" / name


def json_lines(path: str | os.PathLike[str] | Traversable) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that is not blank."""
    file: Traversable = Path(path) if isinstance(path, str | os.PathLike) else path
    if not file.is_file():
        raise FileNotFoundError(f"{path}: not a file, expected a .jsonl file.")
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # JSON may hold other line separators
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {error}, expected UTF-8. Save it in that encoding.") from None
    empty = True
    for number, line in enumerate(lines, 1):
        if line.strip():
            empty = False
            yield number, _object(line, f"{path}, line {number}")
    if empty:
        raise ValueError(f"{path}: got an empty file, expected one JSON object a line.")


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: malformed JSON at column {error.colno}: {error.msg}. "
            "Write one object a line."
        ) from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, lists in lists
        why = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{where}: malformed JSON: {why}. Write one object a line.") from None
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        found = error.object[error.start]
        raise ValueError(
            f"{where}: got {found!r}, half of a character, expected whole ones. Write the "
            "character itself, or both halves."
        ) from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: got {type(row).__name__}, expected a JSON object.")
    return row


def _item(row: dict[str, Any], where: str) -> Item:
    values = checked(row, _FIELDS, where)
    values["messages"] = tuple(values["messages"])
    values["tags"] = tuple(values["tags"])
    values |= {key: values[key] or "" for key in ("pos", "neg")}
    return Item(**values)


def checked(row: dict[str, Any], fields: dict[str, Any], where: str) -> dict[str, Any]:
    """The row, if it has these fields and each is what its test expects."""
    if missing := sorted(fields.keys() - row.keys()):
        raise ValueError(f"{where}: missing {', '.join(missing)}; expected {', '.join(fields)}.")
    if unknown := sorted(row.keys() - fields.keys()):
        close = difflib.get_close_matches(unknown[0], fields, n=1)
        meant = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"{where}: unknown {', '.join(unknown)}; expected only {', '.join(fields)}.{meant}"
        )
    for name, expected in fields.items():
        if problem := expected(row[name]):
            raise ValueError(f"{where}: {name}: got {short(row[name])}, expected {problem}.")
    return row


def one_of(name: str, value: str | None, allowed: Sequence[str | None]) -> None:
    """Raises ValueError where `name` has another value, with the likely one."""
    if value not in allowed:
        close = difflib.get_close_matches(str(value), [a for a in allowed if a], n=1)
        meant = f" Did you mean {close[0]!r}?" if close else ""
        names = ", ".join(a for a in allowed if a)
        raise ValueError(f"{name}: got {value!r}, expected one of {names}.{meant}")


# What is expected instead, or "" if the value is as it should be.


def string(value: Any) -> str:
    """A text with something in it."""
    return "" if isinstance(value, str) and value.strip() else "a string that is not empty"


def text(value: Any) -> str:
    """Any text, no characters included."""
    return "" if isinstance(value, str) else "a string"


def _answer(value: Any) -> str:
    return "" if value is None or isinstance(value, str) else "a string or null"


def among(names: Sequence[str]) -> Callable[[Any], str]:
    """One of these."""
    return lambda value: "" if value in names else f"one of {', '.join(names)}"


def _label(value: Any) -> str:
    fits = value is None or (type(value) is int and value in (0, 1))
    return "" if fits else "0, 1 or null"


def _strings(value: Any) -> str:
    fits = isinstance(value, list) and all(isinstance(v, str) for v in value)
    return "" if fits else "a list of strings"


def turns(value: Any) -> str:
    """Chat messages."""
    fits = isinstance(value, list) and len(value) > 0 and all(_is_turn(turn) for turn in value)
    return "" if fits else f'a list of {{"role": {"|".join(ROLES)}, "content": "…"}}'


def _is_turn(turn: Any) -> bool:
    return (
        isinstance(turn, dict)
        and turn.keys() == {"role", "content"}
        and turn["role"] in ROLES
        and isinstance(turn["content"], str)
    )


_FIELDS = {
    "id": string,
    "behavior": string,
    "split": among(SPLITS),
    "cluster": string,
    "format": among(FORMATS),
    "messages": turns,
    "pos": _answer,
    "neg": _answer,
    "label": _label,
    "tags": _strings,
    "source": string,
    "license": string,
}
_ABOUT = {"behavior": string, "measures": _strings, "rubric": text}
