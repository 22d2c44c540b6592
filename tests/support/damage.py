"""Strategies that damage whole files: JSON, lines of it, safetensors, folders.

A case is the bytes of a few files that are laid over whole ones. `wrong` says that it has to be
refused; others may be accepted, and then what was read must compute.
"""

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st


class Case(NamedTuple):
    """One damaged thing; None deletes a file."""

    format: str
    what: str
    files: dict[str, bytes | None]
    wrong: bool


def drawn(strategy: st.SearchStrategy[Case], count: int, start: int = 0) -> list[Case]:
    """Cases of a strategy, each once, the same every time."""
    found: dict[tuple[Any, ...], Case] = {}

    @seed(start)
    @settings(
        max_examples=4 * count,  # many are drawn twice
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(case: Case) -> None:
        found.setdefault((case.format, case.what), case)

    collect()
    return list(found.values())[:count]


# ---------------------------------------------------------------- JSON

_DIGITS, _DEEP = "@digits@", "@deep@"  # written as 6,000 digits, and as lists in lists
ODD: tuple[Any, ...] = (
    None, True, False, "text", "", -1, 0, 1, 1.5, 2**31, 10**9, 2**63, 10**30, float("nan"),
    float("inf"), -1e38, 1e39, [], {}, [1], ["a"], [None], {"a": 1}, [[[]]], "x" * 100_000, _DIGITS,
    _DEEP, "(a+)+$", "../../etc/passwd", "/etc/passwd", "\ud800", "\x00",
)  # fmt: skip
_TEXTS: tuple[bytes, ...] = (
    b"", b"null", b"[]", b'"x"', b"3", b"{", b"\xff\xfe{}", b"\x00" * 64, b"[" * 100_000,
    b'{"a":' * 100_000, b'{"a": ' + b"9" * 6000 + b"}", b"<html>404</html>",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n",
)  # fmt: skip


def dumped(value: Any) -> bytes:
    """JSON as hostile hands write it."""
    text = json.dumps(value).replace(f'"{_DIGITS}"', "9" * 6000)
    return text.replace(f'"{_DEEP}"', "[" * 50_000 + "]" * 50_000).encode()


def paths(value: Any, at: tuple[Any, ...] = (), widest: int = 3) -> Iterator[tuple[Any, ...]]:
    """Every place of a JSON value; of long lists the first few."""
    if isinstance(value, dict):
        keys: Sequence[Any] = list(value)
    else:
        keys = range(min(len(value), widest)) if isinstance(value, list) else ()
    for key in keys:
        yield (*at, key)
        yield from paths(value[key], (*at, key), widest)


def changed(value: Any, path: tuple[Any, ...], new: Any, drop: bool = False) -> Any:
    """A copy with one place changed, or gone."""
    out = copy.deepcopy(value)
    inside = out
    for key in path[:-1]:
        inside = inside[key]
    if drop:
        del inside[path[-1]]
    else:
        inside[path[-1]] = new
    return out


Rule = Callable[[tuple[Any, ...], Any], bool]  # (place, new value; the rule itself: gone) -> wrong
GONE = object()


def json_cases(
    format: str, file: str, value: Any, wrong: Rule, only: Callable[[tuple], bool] | None = None
) -> st.SearchStrategy[Case]:
    """Another value at a place, a place gone, or another text altogether."""
    places = [p for p in paths(value) if only is None or only(p)]

    def put(path: tuple[Any, ...], odd: Any) -> Case:
        same = type(_at(value, path)) is type(odd) and _at(value, path) == odd
        what = f"{'/'.join(map(str, path))} = {repr(odd)[:40]}"
        files = {file: dumped(changed(value, path, odd))}
        return Case(format, f"{file}: {what}", files, not same and wrong(path, odd))

    def take(path: tuple[Any, ...]) -> Case:
        files = {file: dumped(changed(value, path, None, drop=True))}
        what = f"{file}: without {'/'.join(map(str, path))}"
        return Case(format, what, files, wrong(path, GONE))

    whole = dumped(value)

    def text(raw: bytes) -> Case:
        return Case(format, f"{file}: {raw[:40]!r}…", {file: raw}, True)

    cut = st.floats(0.05, 0.95).map(lambda part: text(whole[: int(part * len(whole))]))
    place = st.sampled_from(places)
    put_cases = st.builds(put, place, st.sampled_from(ODD))
    return st.one_of(
        put_cases, put_cases, put_cases, place.map(take), st.sampled_from(_TEXTS).map(text), cut
    )


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


# ---------------------------------------------------------------- lines of JSON, safetensors


def lines_cases(format: str, path: Path, wrong: Rule) -> st.SearchStrategy[Case]:
    """One line of several damaged; or the file cut within a line."""
    lines = path.read_bytes().splitlines()

    def at(number: int) -> st.SearchStrategy[Case]:
        def whole(case: Case) -> Case:
            raw = b"\n".join([*lines[:number], case.files["x"] or b"", *lines[number + 1 :]])
            wrong = case.wrong and bool((case.files["x"] or b"").strip())
            return Case(format, f"line {number + 1}: {case.what}", {path.name: raw + b"\n"}, wrong)

        return json_cases(format, "x", json.loads(lines[number]), wrong).map(whole)

    whole = b"\n".join(lines)

    def cut(part: float) -> Case:
        raw = whole[: int(part * len(whole))]
        ends = raw.endswith(b"}") or whole[len(raw) :].startswith(b"\n")
        return Case(format, f"{len(raw)} of {len(whole)} bytes", {path.name: raw}, not ends)

    return st.one_of(st.sampled_from(range(len(lines))).flatmap(at), st.floats(0.0, 0.99).map(cut))


def split_safetensors(path: Path) -> tuple[dict[str, Any], bytes]:
    """(header, data)"""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def joined(text: bytes, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file of a header that need not be one."""
    text += b" " * (-len(text) % 8)
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def safetensors_cases(format: str, path: Path, wrong: Rule) -> st.SearchStrategy[Case]:
    """A header with something changed, another length, bytes that are missing."""
    value, data = split_safetensors(path)
    text, whole = json.dumps(value).encode(), path.read_bytes()

    def header(case: Case) -> Case:
        files: dict[str, bytes | None] = {path.name: joined(case.files["x"] or b"", data)}
        return Case(format, f"{path.name}: {case.what}", files, case.wrong)

    def length(n: int) -> Case:
        return Case(format, f"a header of {n}", {path.name: joined(text, data, n)}, True)

    def cut(part: float) -> Case:
        raw = whole[: int(part * len(whole))]
        return Case(format, f"{len(raw)} bytes of {path.name}", {path.name: raw}, True)

    return st.one_of(
        json_cases(format, "x", value, wrong).map(header),
        json_cases(format, "x", value, wrong).map(header),
        st.sampled_from([0, 1, 7, 2**31, 2**63, 2**64 - 1, 100_000_001]).map(length),
        st.floats(0.0, 0.99).map(cut),
    )


# ---------------------------------------------------------------- folders


def pieces(format: str, folder: Path, below: Path) -> st.SearchStrategy[Case]:
    """A file below a folder gone, cut, flipped, or with another's bytes."""
    files = sorted(p for p in below.rglob("*") if p.is_file())
    one = st.sampled_from(files)

    def gone(path: Path) -> Case:
        name = path.relative_to(folder).as_posix()
        return Case(format, f"without {name}", {name: None}, False)

    def cut(path: Path, part: float) -> Case:
        name, raw = path.relative_to(folder).as_posix(), path.read_bytes()
        return Case(format, f"{part:.2f} of {name}", {name: raw[: int(part * len(raw))]}, False)

    def swapped(a: Path, b: Path) -> Case:
        names = [p.relative_to(folder).as_posix() for p in (a, b)]
        raws = {names[0]: b.read_bytes(), names[1]: a.read_bytes()}
        return Case(format, f"{names[0]} and {names[1]} exchanged", {**raws}, False)

    return st.one_of(
        one.map(gone), st.builds(cut, one, st.floats(0, 0.95)), st.builds(swapped, one, one)
    )
