"""Which collectives a compiled program runs, over which mesh axes, and how many bytes they move.

Read from the optimized HLO text. The body of a layer scan stands there once and runs once a layer,
so every computation is weighed by how often it runs. The TPU compiler writes one collective that
runs beside others' arithmetic several times, as its beginning, middle and end: same channel, one
collective. Branches of conditionals count as not taken: the only one in a step is for measuring,
which few steps do.
"""

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_BYTES |= {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
_KINDS = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all"
_OP = re.compile(rf"= (.*?) ({_KINDS})(-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+\d+)(?:e\d+m\d+\w*)?\[([\d,]*)\]|\b(pred)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_CALLED = re.compile(r"(?:to_apply|calls|called_computations)=\{?%?([\w.\-]+)")
_WHILE = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
# mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}: along a; devices in an order of their own
_BY_AXES = re.compile(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
_TRIPS = re.compile(r"known_trip_count[^\d]*(\d+)")

_CONSTANT = re.compile(r"= [su]32\[\][^ ]* constant\((\d+)\)")
_NAMED = re.compile(r"%([\w.\-]+) = [su]32\[\][^ ]* constant\((\d+)\)")
_ELEMENT = re.compile(r"%([\w.\-]+) = [su]32\[\][^ ]* get-tuple-element\([^)]*\), index=(\d+)")
_ADD = re.compile(r" add\(%([\w.\-]+), %([\w.\-]+)\)")


class Traffic(NamedTuple):
    """Per device and step: how many of a kind run, and the bytes a device sends for them."""

    times: int
    bytes_sent: float


def traffic(hlo: str, mesh: Mesh) -> dict[tuple[str, str], Traffic]:
    """(kind, axes) -> Traffic, e.g. ("all-gather", "fsdp"), ring algorithms assumed."""
    computations, entry = _computations(hlo)
    runs = _runs(computations, entry)
    each: dict[str, tuple[int, float, str, str]] = {}  # by channel, of which there is one each
    for name, lines in computations.items():
        for channel, kind, axes, size in _collectives(lines, mesh) if runs[name] else ():
            key = channel or f"{name} {len(each)}"
            each[key] = max(each.get(key, (0, 0.0, "", "")), (runs[name], size, kind, axes))
    found: dict[tuple[str, str], Traffic] = collections.defaultdict(lambda: Traffic(0, 0.0))
    for times, size, kind, axes in each.values():
        was = found[kind, axes]
        found[kind, axes] = Traffic(was.times + times, was.bytes_sent + times * size)
    return dict(sorted(found.items()))


def lines(found: dict[tuple[str, str], Traffic], unit: str = "MiB") -> list[str]:
    """One line by kind and axes: how many, and what a device sends for them, in `unit`."""
    if not found:
        return ["collectives a step: none"]
    size = {"MiB": 2**20, "GiB": 2**30}[unit]
    out = [f"collectives a step: kind, mesh axes, how many, {unit} sent per device"]
    for (kind, axes), t in found.items():
        out.append(f"  {kind:<20}{axes:<14}{t.times:>6}{t.bytes_sent / size:>9.2f}")
    return out


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    out: dict[str, list[str]] = {}
    entry = name = ""
    for line in hlo.splitlines():
        if (head := _COMPUTATION.match(line)) is not None:
            name = head[2]
            out[name] = []
            entry = name if head[1] else entry
        elif name:
            out[name].append(line)
    return out, entry


def _runs(computations: dict[str, list[str]], entry: str) -> dict[str, int]:
    """How often each computation runs in one step; callers come after their callees in the text."""
    runs: dict[str, int] = collections.defaultdict(int)
    runs[entry] = 1
    for name in reversed(list(computations)):
        for line in computations[name] if runs[name] else ():
            if (loop := _WHILE.search(line)) is not None:
                condition, body = (computations.get(part, []) for part in loop.groups())
                runs[loop[2]] += runs[name] * _trips(line, condition, body)
            elif " conditional(" not in line:
                for callee in _CALLED.findall(line):
                    runs[callee] += runs[name]
    return runs


def _trips(line: str, condition: list[str], body: list[str]) -> int:
    """How often a loop runs: as the compiler notes it, else from its counter, limit and step.

    The TPU compiler sends a weight around piece by piece in such loops, beside the products with
    the pieces that are there, and unrolls them.
    """
    if (noted := _TRIPS.search(line)) is not None:
        return int(noted[1])
    limits = [int(n) for text in condition for n in _CONSTANT.findall(text)]
    counters = [index for text in condition for index in _ELEMENT.findall(text)]
    steps = [n for index in counters[:1] for n in _steps(body, index[1])]
    return -(-max(limits, default=1) // max(steps, default=1))


def _steps(body: list[str], index: str) -> list[int]:
    """The constants that a loop's body adds to this element of what it carries."""
    constants = {name: int(n) for text in body for name, n in _NAMED.findall(text)}
    of_index = {name for text in body for name, at in _ELEMENT.findall(text) if at == index}
    added = (pair for text in body for pair in _ADD.findall(text))
    return [constants[b] for a, b in added if a in of_index and b in constants]


def _collectives(lines: list[str], mesh: Mesh) -> Iterator[tuple[str, str, str, float]]:
    """(channel or "", kind, axes, bytes sent) of each."""
    for line in lines:
        if (op := _OP.search(line)) is None:
            continue
        shape, kind, start = op[1], op[2], bool(op[3])
        group = _group(line, mesh.size)
        if len(group) < 2:
            continue
        sizes = [_size(m) for m in _ARRAY.finditer(shape)]
        if not sizes:
            continue
        # A start's tuple holds operand and result; the larger one is the whole array.
        whole = max(sizes) if start and kind != "all-reduce" else sum(sizes)
        found = _CHANNEL.search(line)
        channel, sent = found[1] if found else "", _sent(kind, whole, len(group))
        yield channel, kind, axes_of(group, mesh), sent


def _sent(kind: str, size: float, n: int) -> float:
    share = (n - 1) / n
    if kind == "all-reduce":
        return 2 * size * share
    if kind == "reduce-scatter":
        return size * n * share
    return size if kind == "collective-permute" else size * share


def _size(match: re.Match) -> float:
    kind, dims = (match[1], match[2]) if match[1] else (match[3], match[4])
    return _BYTES.get(kind, 4) * math.prod(int(d) for d in dims.split(",") if d)


def _group(line: str, devices: int) -> list[int]:
    """The devices of the first group, or of a permute's first pair that is not a device's own."""
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        groups, dims = ([int(d) for d in iota[i].split(",")] for i in (1, 2))
        order = [int(d) for d in iota[3].split(",")] if iota[3] else list(range(len(dims)))
        ids = np.arange(math.prod(dims)).reshape(dims).transpose(order)
        return ids.reshape(groups[0], -1)[0].tolist()
    if named := _BY_AXES.search(line):
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", named[1])}
        along = re.findall(r"'(\w+)'", named[4])
        dims = [int(d) for d in named[2].split(",")] if named[2] else list(sizes.values())
        order = [int(d) for d in named[3].split(",")] if named[3] else list(range(len(dims)))
        ids = np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(*sizes.values())
        return ids[tuple(slice(None) if name in along else 0 for name in sizes)].ravel().tolist()
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return [int(d) for d in listed[1].split(",")]
    if listed := re.search(r"source_target_pairs=\{([{}\d,]+)\}", line):
        pairs = [[int(d) for d in pair] for pair in re.findall(r"\{(\d+),(\d+)\}", listed[0])]
        return next((pair for pair in pairs if pair[0] != pair[1]), [0])
    return list(range(devices))  # no groups: all of them


def axes_of(group: list[int], mesh: Mesh) -> str:
    """The mesh axes along which a group's devices differ: "fsdp", "data+fsdp"."""
    at = np.stack(np.unravel_index(group, mesh.devices.shape))
    names = [n for n, row in zip(mesh.axis_names, at, strict=True) if len(set(row.tolist())) > 1]
    return "+".join(names) or "none"
