"""Rows that others made: of a JSON, JSON lines, CSV, TSV or Parquet file, or of a hub data set.

One text names them: a path, or `hub:` and a data set's id, then `?column=name&…` where columns have
names of their own: `hub:org/name?split=train&prompt=question&positive=chosen&negative=rejected`.
"""

import difflib
import itertools
import json
import os
import urllib.parse
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from reptune_jax.data import schema
from reptune_jax.reading import reading

COLUMNS = ("prompt", "positive", "negative", "statement", "label")
ENDINGS = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
_HUB = "hub:"
_OPTIONS = (*COLUMNS, "split", "config", "limit")


class Place(NamedTuple):
    """Where rows are, and which of them."""

    path: str  # or a data set's id
    hub: bool
    columns: dict[str, str]  # of COLUMNS -> what it is called there
    split: str = "train"  # of a data set
    config: str = ""  # of a data set
    limit: int = 0  # the first rows alone; 0 = all

    @property
    def name(self) -> str:
        """A short name for what is made of them."""
        return self.path.split("/")[-1] if self.hub else Path(self.path).stem


def place(name: str | os.PathLike[str]) -> Place:
    """The reverse of what is written above.

    Raises:
      ValueError: an unknown option, or a limit that is no number.
    """
    text = os.fspath(name)
    if Path(text).is_file():
        return Place(text, False, {})
    path, _, query = text.partition("?")
    with reading(text, "Write name=value, with & between them."):
        given = dict(urllib.parse.parse_qsl(query, strict_parsing=True)) if query else {}
    for key in given:
        schema.one_of(f"{text}: option", key, _OPTIONS)
    limit = given.pop("limit", "0")
    if not limit.isdecimal():
        raise ValueError(f"{text}: got limit={limit!r}, expected a number of rows, or 0 for all.")
    columns = {key: value for key, value in given.items() if key in COLUMNS}
    rest = {key: value for key, value in given.items() if key not in COLUMNS}
    return Place(path.removeprefix(_HUB), path.startswith(_HUB), columns, limit=int(limit), **rest)


def read(at: Place) -> Any:
    """A list of rows, each what the file has there; or the one object of a JSON file.

    Of the hub no more is downloaded than is read.

    Raises:
      FileNotFoundError, ValueError: no such file, an ending that is not known, a damaged file.
    """
    if at.hub:
        with reading(at.path, "Give a data set's id, and its split and config, as in hub:org/a?…"):
            import datasets  # takes seconds

            where = {"split": at.split, "streaming": True}
            return _first(at, datasets.load_dataset(at.path, at.config or None, **where))
    path = Path(at.path)
    if path.suffix not in ENDINGS:
        raise ValueError(
            f"{path}: got the ending {path.suffix!r}, expected one of {', '.join(ENDINGS)}, or "
            f"{_HUB}ORG/NAME for a data set of the hub."
        )
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not a file, expected contrastive data.")
    if path.suffix == ".jsonl":
        return _first(at, (row for _, row in schema.json_lines(path)))
    if path.suffix == ".json":
        with reading(path, "Write one JSON list, or one object."):
            found = json.loads(path.read_bytes())
        return _first(at, found) if isinstance(found, list) else found
    with reading(path):
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            return _first(at, pq.read_table(path).to_pylist())
        import pandas as pd  # a second, at every start of every program

        how = {"sep": "\t" if path.suffix == ".tsv" else ",", "nrows": at.limit or None}
        table = pd.read_csv(path, dtype=str, keep_default_na=False, **how)  # "None" is a text
        return table.to_dict("records")


def check(at: Place, row: dict[str, Any]) -> None:
    """Raises ValueError where a column that was named is not there."""
    for key, column in at.columns.items():
        if column not in row:
            close = difflib.get_close_matches(column, row, n=1)
            meant = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"{at.path}: got {key}={column}, expected one of its columns, which are "
                f"{', '.join(row)}.{meant}"
            )


def _first(at: Place, rows: Iterable[Any]) -> list[Any]:
    return list(itertools.islice(rows, at.limit or None))
