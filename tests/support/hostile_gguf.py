"""GGUF files, damaged: metadata of other types and sizes, tensors elsewhere, bytes gone."""

import struct
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.support.damage import Case

_STRING, _ARRAY = 8, 9
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
Field = tuple[str, int, Any]  # key, type, value; of an array (type of its items, items)


def gguf(folder: Path) -> st.SearchStrategy[Case]:
    """The file with one thing changed."""
    path = folder / "model.gguf"
    fields, tensors, data = _parsed(path.read_bytes())
    sizes = ("_length", "count", "count_kv")

    def case(what: str, raw: bytes, wrong: bool) -> Case:
        return Case("gguf", what, {path.name: raw}, wrong)

    def put(at: int, odd: tuple[int, Any]) -> Case:
        key, _, value = fields[at]
        bad = [*fields[:at], (key, *odd), *fields[at + 1 :]]
        wrong = key.endswith(sizes) and "context" not in key and odd[1] != value
        return case(f"{key} = {odd!r}"[:90], _written(bad, tensors, data), wrong)

    def take(at: int) -> Case:
        key = fields[at][0]
        wrong = key.endswith(("_length", ".block_count", "tokens", "architecture"))
        raw = _written(fields[:at] + fields[at + 1 :], tensors, data)
        return case(f"without {key}", raw, wrong)

    def items(at: int, many: tuple[int, list[Any]]) -> Case:
        key, _, (_, had) = fields[at]
        bad = [*fields[:at], (key, _ARRAY, many), *fields[at + 1 :]]
        return case(f"{key} of {len(had)} = {many!r}"[:90], _written(bad, tensors, data), False)

    def place(at: int, new: tuple[int, Any]) -> Case:
        bad = list(tensors[at])
        bad[new[0]] = new[1]
        raw = _written(fields, [*tensors[:at], tuple(bad), *tensors[at + 1 :]], data)
        return case(f"{tensors[at][0]}: {new!r}"[:90], raw, new[1] != tensors[at][new[0]])

    whole = path.read_bytes()

    def counts(where: int, n: int) -> Case:
        raw = whole[:where] + struct.pack("<Q", n) + whole[where + 8 :]
        return case(f"count at {where} = {n}", raw, True)

    def flip(at: int, byte: int) -> Case:
        raw = whole[:at] + bytes([byte]) + whole[at + 1 :]
        return case(f"byte {at} = {byte}", raw, False)

    odd = st.sampled_from(
        [(4, 0), (4, 2**31), (4, 2**32 - 1), (5, -1), (10, 2**63), (6, float("nan")), (12, 1e39)]
        + [(7, True), (8, "text"), (8, ""), (8, "x" * 10**5), (_ARRAY, (4, [1, 2])), (4, 3)]
        + [(_ARRAY, (8, [])), (6, 0.0), (6, -1.0), (11, -(2**62)), (6, float("inf"))]
    )
    arrays = [i for i, (_, kind, _) in enumerate(fields) if kind == _ARRAY]
    many = st.sampled_from(
        [(8, []), (8, ["a"]), (8, ["a b"] * 400), (4, [2**31]), (5, [-1] * 400), (8, ["\x00"])]
        + [(8, ["a"] * 400), (4, [1] * 300), (6, [1.0] * 300), (8, ["zz yy"]), (8, ["nospace"])]
    )
    news = st.sampled_from(
        [(1, []), (1, [0]), (1, [2**40, 2**40]), (1, [2**63, 2]), (1, [1] * 9), (1, [32]), (2, 99)]
        + [
            (2, 2),
            (2, 1),
            (3, 2**63),
            (3, 2**40),
            (0, "x"),
            (0, ""),
            (0, "blk.9999999.attn_q.weight"),
        ]
        + [(3, 1), (0, "token_embd.weight")]
    )
    of_field = st.sampled_from(range(len(fields)))
    return st.one_of(
        st.builds(put, of_field, odd),
        st.builds(put, of_field, odd),
        of_field.map(take),
        st.builds(items, st.sampled_from(arrays), many),
        st.builds(place, st.sampled_from(range(len(tensors))), news),
        st.builds(
            counts, st.sampled_from([8, 16]), st.sampled_from([0, 1, 2**31, 2**62, 2**64 - 1])
        ),
        st.floats(0, 0.99).map(
            lambda part: case(f"{part:.3f} of it", whole[: int(part * len(whole))], True)
        ),
        st.builds(flip, st.integers(0, 400), st.integers(0, 255)),
    )


def _parsed(raw: bytes) -> tuple[list[Field], list[tuple[str, list[int], int, int]], bytes]:
    at = 8

    def take(code: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from("<" + code, raw, at)
        at += struct.calcsize("<" + code)
        return value

    def value(kind: int) -> Any:
        nonlocal at
        if kind == _STRING:
            length = take("Q")
            at += length
            return raw[at - length : at].decode()
        if kind == _ARRAY:
            of = take("I")
            return of, [value(of) for _ in range(take("Q"))]
        return take(_CODES[kind])

    n_tensors, n_fields = take("Q"), take("Q")
    fields = []
    for _ in range(n_fields):
        key, kind = value(_STRING), take("I")
        fields.append((key, kind, value(kind)))
    tensors = []
    for _ in range(n_tensors):
        name, dims = value(_STRING), take("I")
        tensors.append((name, [take("Q") for _ in range(dims)], take("I"), take("Q")))
    return fields, tensors, raw[-(-at // 32) * 32 :]


def _written(fields: list[Field], tensors: Any, data: bytes) -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def plain(kind: int, value: Any) -> bytes:
        if kind == _STRING:
            return text(value)
        if kind == _ARRAY:
            of, items = value
            return struct.pack("<IQ", of, len(items)) + b"".join(plain(of, v) for v in items)
        return struct.pack("<" + _CODES[kind], value)

    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    for key, kind, value in fields:
        out += text(key) + struct.pack("<I", kind) + plain(kind, value)
    for name, dims, kind, at in tensors:
        out += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, at)
    return out + b"\0" * (-len(out) % 32) + data
