"""A behavior: what it is called, how it is asked for, and what it is measured by."""

import dataclasses
import functools
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from reptune_jax.console import say
from reptune_jax.data import adopt, foreign, positions, rows, schema
from reptune_jax.data.contrast import has_personas, matched_personas
from reptune_jax.data.schema import Item, select

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedTokenizerBase

KINDS = ("free", "claim")  # open prompts that are answered in words; claims that are judged
_looked_through: set[str] = set()  # digests
_CALLED = {"free": "open prompts", "claim": "claims"}
_USE = {"train": "the vector", "tune": "tuning", "val": "validation", "test": "the results"}

LETTER = "letter"  # vector.project_out: that of a claim's answer

# Where a vector can be read, and a cosine taken, in each kind's texts.
_POSITIONS = {
    ("free", "vector.position"): ("response", "last", "all"),
    ("free", "loss.position"): ("response", "last", "all"),
    ("claim", "vector.position"): ("before_answer", "last", "response", "all"),
    ("claim", "loss.position"): ("before_answer", "last", "all"),  # the label is one token
}


@dataclasses.dataclass(frozen=True, eq=False)
class Behavior:
    """The items of a behavior file and what follows from them; read once, by `load`."""

    name: str
    items: tuple[Item, ...] = dataclasses.field(repr=False)
    measures: tuple[str, ...]  # "metric:format" of `evals.measures`, the first is the main one
    rubric: str = ""  # what a judge that is asked looks for in an answer

    @property
    def kind(self) -> str:
        """free, if it has open prompts; else claim."""
        return "free" if self.select(format="free") else "claim"

    @functools.cached_property
    def digest(self) -> str:
        """Identifies the items: processes with other data must not work together."""
        return hashlib.sha256(repr(list(self.items)).encode()).hexdigest()[:16]

    def select(self, split: str | None = None, format: str | None = None) -> list[Item]:
        """Items of a split, of a format, or of both, in file order."""
        return select(self.items, split, format)

    def check(self, c: ConfigDict, *splits: str) -> None:
        """That this config can be run on these items, before anything is.

        Raises:
          ValueError: personas that do not match, or none where some are needed, nothing in one of
            `splits`, or a position, or a letter to project out, that its texts do not have.
        """
        if self.digest not in _looked_through:  # the programs of a study need not say it again
            _looked_through.add(self.digest)
            if doubts := schema.check(self.items):
                say(f"behavior {self.name}: {len(doubts)} doubts, e.g. {doubts[0]}")
        self._check_personas(c)
        for split in splits:
            if not self.select(split, self.kind):
                had = ", ".join(s for s in schema.SPLITS if self.select(s, self.kind)) or "no split"
                raise ValueError(
                    f"behavior {self.name}: has no {_CALLED[self.kind]} in split {split!r}, only "
                    f"in {had}, expected some for {_USE[split]}. Add some."
                )
        if not c.vector.data:  # whose texts are others
            self._check_position("vector.position", c.vector.position)
        self._check_position("loss.position", c.loss.position)
        if c.vector.project_out == LETTER and c.vector.data:
            raise ValueError(
                f"vector.project_out: got {LETTER!r} with vector.data, expected '' or a vector "
                "file: pairs of a file have no verdicts. Set it to ''."
            )
        if c.vector.project_out == LETTER and self.kind == "free":
            raise ValueError(
                f"vector.project_out: got {LETTER!r}, expected '' or a vector file for "
                f"{self.name}, a behavior with {_CALLED[self.kind]}, which have none. Set it to ''."
            )

    def asked(self, answers: str) -> tuple[Item, ...]:
        """The items whose personas write answers; none of them are left where they are given."""
        return tuple(i for i in self.items if answers == "persona" or i.format != "persona")

    def _check_personas(self, c: ConfigDict) -> None:
        """Given answers are not asked for under personas, and say nothing of a model's odds."""
        personas = has_personas(self.items)
        if personas:
            matched_personas(self.items)
        claims, share = self.kind == "claim", c.targets.best_share
        read, written = (
            personas and (claims or of.answers == "persona") for of in (c.vector, c.targets)
        )
        goal = c.loss.match and c.loss.goal == "persona"
        # What takes personas: (key, its value, whether that does, whether there are some, else).
        needs = (
            ("vector.data", "", claims and not c.vector.data, personas, "a file with pairs"),
            ("vector.correct_only", True, c.vector.correct_only, read, "False"),
            ("targets.best_share", share, share < 1, written, "1"),
            ("targets.dose", c.targets.dose, c.targets.dose, written, "0"),
            ("loss.goal", c.loss.goal, goal, personas, "displaced"),
        )
        for key, found, takes, there, expected in needs:
            if takes and not there:
                raise ValueError(
                    f"{key}: got {found!r} for {self.name}, whose answers no persona writes, "
                    f"expected {expected}. Set it, or have answers written by personas, matched "
                    "ones with labels 1 and 0."
                )

    def check_lengths(self, tokenizer: "PreTrainedTokenizerBase", context: int | None) -> None:
        """That every prompt fits into a model's context, before anything is computed.

        Raises:
          ValueError: one that does not, with its item and line.
        """
        if context is None:
            return
        for item in self.items:
            if len(item.text.encode()) <= context:
                continue  # a token has a byte at least
            ids = tokenizer.encode(item.text, add_special_tokens=False)
            if len(ids) > context:
                raise ValueError(
                    f"behavior {self.name}, line {item.line}: item {item.id!r} has {len(ids):,} "
                    f"tokens, expected at most {context:,}, the model's context. Shorten it: "
                    "prompts are refused, never cut."
                )

    def _check_position(self, key: str, position: str) -> None:
        known = _POSITIONS[self.kind, key]
        if position in known:
            return
        if position in positions.NAMED:
            raise ValueError(
                f"{key}: got {position!r}, expected one of {', '.join(known)}, or a negative "
                f"offset from the end of the prompt, for {self.name}, a behavior with "
                f"{_CALLED[self.kind]}."
            )
        positions.offset(position)


def load(name_or_path: str | os.PathLike[str]) -> Behavior:
    """A shipped behavior, a .jsonl of one's own, or another tool's data (`foreign.read`).

    Raises:
      FileNotFoundError, ValueError: no such file or behavior; a line that is wrong, by number.
    """
    about: dict[str, Any] = {}
    if is_foreign(name_or_path):
        found = _read_once(os.fspath(name_or_path))
        name, items = found.name, adopt.items(found)
    else:
        about, items = schema.read_jsonl(schema.find(name_or_path))
        name = str(about.get("behavior") or Path(name_or_path).stem)
    formats = {item.format for item in items}
    default = [f"logodds:{form}" for form in ("free", "claim", "ab") if form in formats]
    measures = tuple(about.get("measures") or default)
    return Behavior(name, tuple(items), measures, str(about.get("rubric", "")))


@functools.lru_cache(maxsize=4)
def _read_once(name: str) -> foreign.Foreign:
    """Every program of a study asks for it, and the hub may be slow."""
    return foreign.read(name)


def is_foreign(name: str | os.PathLike[str]) -> bool:
    """Whether a behavior is another tool's: its name says so, or the first line of its file."""
    at = rows.place(name)
    if at.hub or at.columns or Path(at.path).suffix in (*rows.ENDINGS[2:], ".json"):
        return True
    if Path(at.path).suffix != ".jsonl" or not Path(at.path).is_file():
        return False
    try:
        first = next(row for _, row in schema.json_lines(at.path))
        return not foreign.is_own(first) and bool(foreign.recognized(at, first))
    except ValueError:
        return False  # a damaged file of ours: who reads it says what is wrong
