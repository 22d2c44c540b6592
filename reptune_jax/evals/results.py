"""The one long results table: a row is one item x metric x condition, nothing averaged yet."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from reptune_jax import config, distributed, ending
from reptune_jax.console import say
from reptune_jax.data.schema import Item
from reptune_jax.evals.measures import METRICS
from reptune_jax.folder import Study
from reptune_jax.reading import reading

ARMS = tuple(config.ARMS)
SPLITS = ("train", "tune", "val", "test", "ood", "neutral", "chats", "suites", "attacks", "others")


@dataclasses.dataclass(frozen=True)
class Row:
    """One result. `layer` is where an arm steers, and for `cos` where the cosine was taken."""

    run_id: str
    behavior: str
    arm: str
    sign: int
    seed: int
    split: str
    item_id: str
    cluster: str
    metric: str
    value: float
    template: str = ""
    format: str = ""
    order: str = ""  # "" | "ab" | "ba"
    k: float = 0.0  # steering dose
    layer: int = -1
    position: str = ""
    label: float = math.nan
    logp_pos: float = math.nan
    logp_neg: float = math.nan
    mass: float = math.nan  # p(pos) + p(neg)
    n_tokens: int = 0
    n_bytes: int = 0
    text: str = ""
    prompt_sha: str = ""
    model_sha: str = ""
    config_sha: str = ""

    @classmethod
    def of(cls, item: Item, labels: dict[str, Any], **values: Any) -> "Row":
        """Of an item, under the columns that its condition's rows share."""
        about: dict[str, Any] = {"split": item.split, "item_id": item.id, "cluster": item.cluster}
        return cls(**labels, **about, format=item.format, **values)

    def __post_init__(self) -> None:
        for name, allowed in (("arm", ARMS), ("split", SPLITS), ("metric", tuple(METRICS))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {allowed}.")
        if self.sign not in (-1, 0, 1) or (self.sign == 0) != (self.arm == "base"):
            raise ValueError(
                f"sign: got {self.sign} for arm {self.arm}, expected +1/-1, 0 for base."
            )
        if math.isinf(self.value):
            raise ValueError(f"value: got {self.value} for {self.item_id} {self.metric}.")


_TYPES = {str: pa.string(), int: pa.int64(), float: pa.float64()}
SCHEMA = pa.schema([(f.name, _TYPES[f.type]) for f in dataclasses.fields(Row)])  # type: ignore[index]

# What one measurement is; two rows that agree on all of it are the same measurement twice.
_IDENTITY = (
    "behavior", "arm", "sign", "seed", "k", "layer", "position", "split", "item_id", "template",
    "format", "order", "metric", "label",
)  # fmt: skip
_MADE_FOR = b"reptune_jax.made_for"
_MAKE_ANEW = "Delete it: the program that wrote it makes it anew."
_PROMPT = ["split", "item_id", "metric", "template", "format", "order"]


def sha(ids: Sequence[int]) -> str:
    """Identifies a prompt as the model saw it."""
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()[:12]


def rows_to_table(rows: Iterable[Row]) -> pa.Table:
    """Rows as an arrow table with `SCHEMA`."""
    rows = list(rows)
    columns = {name: [getattr(row, name) for row in rows] for name in SCHEMA.names}
    return pa.table(columns, schema=SCHEMA)


def write_parquet(
    path: str | Path, rows: Iterable[Row], made_for: dict[str, Any] | None = None
) -> None:
    """Writes the rows to `path` at once: a reader sees the old file or the whole new one.

    `made_for` is what `to_make` said, or the digests of what was asked, by test.
    """
    distributed.once(lambda: _write(Path(path), rows, made_for))


def _write(path: Path, rows: Iterable[Row], made_for: dict[str, Any] | None) -> None:
    table = rows_to_table(rows)
    if made_for is not None:
        table = table.replace_schema_metadata({_MADE_FOR: json.dumps(made_for)})
    with ending.whole(path) as scratch:
        pq.write_table(table, scratch, compression="zstd")


def to_make(path: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """What a file is to be made for; None where it has all of it, which is said.

    A study grows: more seeds, signs, arms, and with its runs the KL that others are compared at.
    Lists in `asked` are such; a file that has more of them serves, and one that has less is made
    again with what it had and what is asked. Any other value has to be the same.
    """
    had: dict[str, Any] = {}
    if there := distributed.exists(path):
        noted = made_for(path)
        if noted is None:
            say(f"{path}: already there; it does not say of which runs it was made")
            return None
        had = noted
    whole = {
        key: sorted({*value, *had.get(key, ())}) if isinstance(value, list) else value
        for key, value in asked.items()
    }
    changed = [key for key, value in whole.items() if had.get(key) != value]
    if there and changed:
        news = "; ".join(f"{key} were {had.get(key)}, are {whole[key]}" for key in changed)
        say(f"{path}: {news}: measured again")
    elif there:
        say(f"{path}: already there")
    return None if there and not changed else whole


def made_for(path: Path) -> dict[str, Any] | None:
    """What a file says that it was made for; None where it says nothing."""
    with reading(path, _MAKE_ANEW):
        noted = (pq.read_schema(path).metadata or {}).get(_MADE_FOR)
        return None if noted is None else dict(json.loads(noted))


def read_study(folder: str | Path) -> pd.DataFrame:
    """All rows under folder/**/results/*.parquet.

    Raises:
      ValueError: a foreign schema, a measurement that is there twice, or an item shown to two arms
        with different prompts (the `prompt` arm excepted: its prompt is what differs).
    """
    paths = Study(Path(folder)).results()
    if not paths:
        raise ValueError(
            f"{folder}: holds no per-item results, expected those of a study or of its runs. "
            "Run python -m reptune_jax.evals.baseline first."
        )
    rows = pd.concat([read(path) for path in paths], ignore_index=True)
    _refuse_duplicates(rows)
    _refuse_mixed_prompts(rows)
    return rows.drop(columns="file")


def read(path: Path) -> pd.DataFrame:
    """One file's rows.

    Raises:
      ValueError: it is damaged, or has another schema.
    """
    with reading(path, _MAKE_ANEW):
        table = pq.read_table(path)
    schema = table.schema
    found = {field.name: str(field.type) for field in schema}
    expected = {field.name: str(field.type) for field in SCHEMA}
    if found != expected:
        wrong = sorted(set(found.items()) ^ set(expected.items()))
        raise ValueError(
            f"{path}: columns differ from the results schema in {wrong}. Write it with "
            "reptune_jax.evals.results.write_parquet."
        )
    return table.to_pandas().assign(file=str(path))


def _refuse_duplicates(rows: pd.DataFrame) -> None:
    again = rows.duplicated(list(_IDENTITY))
    if not again.any():
        return
    second = rows[again].iloc[0]
    same = (rows[list(_IDENTITY)].fillna(-1) == second[list(_IDENTITY)].fillna(-1)).all(axis=1)
    first = rows[same].iloc[0]
    raise ValueError(
        f"results: {second.arm} (sign {second['sign']}, seed {second.seed}) has {second.metric} of "
        f"{second.item_id} twice, in {first.file} (run {first.run_id}) and {second.file} "
        f"(run {second.run_id}). Keep one of the two."
    )


def _refuse_mixed_prompts(rows: pd.DataFrame) -> None:
    shown = rows[(rows.prompt_sha != "") & (rows.arm != "prompt")]
    kinds = shown.groupby(_PROMPT)["prompt_sha"].transform("nunique")
    mixed = shown[kinds > 1]
    if mixed.empty:
        return
    first = mixed.iloc[0]
    same = mixed[(mixed[_PROMPT] == first[_PROMPT]).all(axis=1)]
    other = same[same.prompt_sha != first.prompt_sha].iloc[0]
    raise ValueError(
        f"results: item {first.item_id} ({first.metric}, template {first.template!r}, order "
        f"{first.order!r}) has prompt_sha {first.prompt_sha} in {first.file} (arm {first.arm}) but "
        f"{other.prompt_sha} in {other.file} (arm {other.arm}). A difference would mix prompt "
        "and arm: re-run the older of the two."
    )
