"""Each format of a user's file, damaged: what is changed in it, and what of that is wrong."""

import json
import struct
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.support.damage import (
    GONE,
    ODD,
    Case,
    Rule,
    dumped,
    joined,
    json_cases,
    lines_cases,
    pieces,
    safetensors_cases,
    split_safetensors,
)

_SIZES = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
_SIZES |= {"vocab_size", "num_key_value_heads"}


def config(folder: Path) -> st.SearchStrategy[Case]:
    """config.json: a size that is not that of the weights is wrong; so is what breaks numbers."""

    def wrong(path: tuple[Any, ...], new: Any) -> bool:
        return path[-1] in _SIZES or (path[-1] == "model_type")

    return json_cases("config", "config.json", _json(folder / "config.json"), wrong)


def index(folder: Path) -> st.SearchStrategy[Case]:
    """The index of shards: every name has to be in the file that it says."""
    file = "model.safetensors.index.json"
    return json_cases("index", file, _json(folder / file), lambda path, _: path[0] == "weight_map")


def header(folder: Path) -> st.SearchStrategy[Case]:
    """A safetensors header, its length, and the bytes behind it."""
    return safetensors_cases(
        "header", folder / "model.safetensors", lambda path, new: path[0] != "__metadata__"
    )


def vector(folder: Path) -> st.SearchStrategy[Case]:
    """A vector: its header, and the JSON in its metadata."""
    path = folder / "vector.safetensors"
    value, data = split_safetensors(path)
    about = value["__metadata__"]

    def wrong(at: tuple[Any, ...], new: Any) -> bool:
        return at[0] != "__metadata__" or at[-1] in ("format", "layers")

    def inner(key: str) -> st.SearchStrategy[Case]:
        def whole(case: Case) -> Case:
            text = (case.files["x"] or b"").decode("utf-8", "surrogateescape")
            bad = {**value, "__metadata__": {**about, key: text}}
            raw = json.dumps(bad).encode()
            return Case("vector", f"{key}: {case.what}", {path.name: joined(raw, data)}, case.wrong)

        def rule(at: tuple[Any, ...], new: Any) -> bool:
            return key == "layers" and new is not GONE  # one less is a vector at fewer layers

        return json_cases("vector", "x", json.loads(about[key]), rule).map(whole)

    numbers = st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e38])

    def poisoned(number: float) -> Case:
        raw = bytearray(data)
        start, _ = value["directions"]["data_offsets"]
        raw[start : start + 4] = struct.pack("<f", number)
        files: dict[str, bytes | None] = {path.name: joined(json.dumps(value).encode(), bytes(raw))}
        return Case("vector", f"a direction of {number}", files, True)

    return st.one_of(
        safetensors_cases("vector", path, wrong),
        inner("layers"),
        inner("meta"),
        numbers.map(poisoned),
    )


def adapter(folder: Path) -> st.SearchStrategy[Case]:
    """adapter_config.json of PEFT, and the header of its weights."""
    file = "adapter_config.json"
    value = {**_json(folder / file), "rank_pattern": {"v_proj": 4}, "alpha_pattern": {"v_proj": 8}}
    needs = {"r", "peft_type", "rank_pattern", "use_dora", "bias"}

    def wrong(path: tuple[Any, ...], new: Any) -> bool:
        if path[-1] == "rank_pattern":
            return new is not GONE and new not in (None, {}, False, "", [])
        if path[-1] == "use_dora":
            return new is not GONE and bool(new)
        if path[-1] == "bias":
            return new is not GONE and bool(new)
        return path[-1] in needs and path[0] in needs

    expressions = st.sampled_from(
        ["(a+)+$", ".*" * 30 + "x", "(v|v_)+proj", "[", "v_proj|q", "x" * 10**6]
    )

    def pattern(text: str) -> Case:
        bad = {**value, "rank_pattern": {text: 4}}
        return Case(
            "adapter", f"rank_pattern {text[:40]}", {file: dumped(bad)}, "x" not in text[:1]
        )

    return st.one_of(
        json_cases("adapter", file, value, wrong),
        safetensors_cases(
            "adapter", folder / "adapter_model.safetensors", lambda p, _: p[0] != "__metadata__"
        ),
        expressions.map(pattern),
    )


def targets(folder: Path) -> st.SearchStrategy[Case]:
    """targets.jsonl: a line damaged, or the file cut short."""

    def wrong(path: tuple[Any, ...], new: Any) -> bool:
        whole = type(new) is int and 0 <= new < 2**31
        if path[0] == "ids":  # one that is gone cannot be known
            return new != [1] if len(path) == 1 else new is not GONE and not whole
        if path[0] == "sign":
            return not (type(new) is int and new in (1, -1))
        if path[0] == "odds":
            return new is GONE or isinstance(new, str | list | dict | bool)
        return not isinstance(new, str)

    return lines_cases("targets", folder / "targets.jsonl", wrong)


def behavior(folder: Path) -> st.SearchStrategy[Case]:
    """A behavior of one's own."""

    def wrong(path: tuple[Any, ...], new: Any) -> bool:
        return new is GONE or not isinstance(new, str | list | int | None)

    return lines_cases("behavior", folder / "sentiment.jsonl", wrong)


def tokenizer(folder: Path) -> st.SearchStrategy[Case]:
    """tokenizer.json and the two files beside it."""
    whole = _json(folder / "tokenizer.json")
    beside = _json(folder / "tokenizer_config.json")
    generation = _json(folder / "generation_config.json")
    never: Rule = lambda *_: False  # noqa: E731
    return st.one_of(
        json_cases("tokenizer", "tokenizer.json", whole, never),
        json_cases("tokenizer", "tokenizer_config.json", beside, never),
        json_cases("tokenizer", "generation_config.json", generation, never),
    )


_LOOPS = (
    "{% for i in range(1000000000) %}x{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99) %}yyyyyyyyyyyyyyyy{% endfor %}{% endfor %}",
    "{{ 'x' * 10000000000 }}",
    "{{ 'x' * 100000000 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "{% set n = namespace(s=9) %}{% for i in range(99) %}{% set n.s = n.s * n.s %}{% endfor %}",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:>1000000000}'.format('x') }}",
    "{{ 'x'.ljust(1000000000) }}",
    "{{ 'x'.center(1000000000) }}",
    "{{ range(1000000000) | list }}",
    "{{ range(10000000) | map('string') | join }}",
    "{{ messages | tojson(indent=1000000000) }}",
    "{{ 'a' | indent(1000000000, true) }}",
    "{{ lipsum(n=1000000) }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ messages.append(1) }}",
    "{{ undefined.x.y }}",
    "{{ 1 // 0 }}",
    "{{ messages[9]['content'] }}",
    "{{ messages + 1 }}",
    "{{ '1' + 1 }}",
    "{{ 'x' | no_such_filter }}",
    "{{ no_such_function() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% for m in messages %}{{ m['content'] }}",
    "{{ ",
    "{{ '" + "x" * 100_000 + "' }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ " + "-" * 5000 + "1 }}",
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "{{ raise_exception('no') }}",
    "{{ strftime_now('%' * 100000) }}",
    "{{ strftime_now(3) }}",
    "{% while true %}{% endwhile %}",
    "{{ [1] * 10000000000 }}",
    "{{ ('a' * 99999) | replace('a', 'a' * 99999) }}",
    "\x00\ud800",
)


def template(folder: Path) -> st.SearchStrategy[Case]:
    """A chat template: loops, growth, attributes of the interpreter, errors of every kind."""
    value = _json(folder / "tokenizer_config.json")
    value.pop("chat_template", None)

    def case(text: Any) -> Case:
        if isinstance(text, str) and "\ud800" not in text:
            files: dict[str, bytes | None] = {"chat_template.jinja": text.encode()}
        else:
            odd = dumped({**value, "chat_template": text})
            files = {"tokenizer_config.json": odd, "chat_template.jinja": None}
        return Case("template", f"{text!r}"[:70], files, False)

    wrapped = st.builds(
        lambda a, b: a + b + a, st.sampled_from(["", "Hi\n", "{# #}"]), st.sampled_from(_LOOPS)
    )
    odd = st.sampled_from([o for o in ODD if not isinstance(o, str)])
    return st.one_of(wrapped, wrapped, wrapped, odd).map(case)


def orbax(folder: Path) -> st.SearchStrategy[Case]:
    """An Orbax model folder: its index, pieces that are gone, cut, or another's."""
    file = "orbax_model.json"
    of_index = json_cases("orbax", file, _json(folder / file), lambda p, _: p[0] != "spelling")
    return st.one_of(of_index, pieces("orbax", folder, folder / "params"))


def run(folder: Path) -> st.SearchStrategy[Case]:
    """A tuned run's checkpoint: pieces that are gone, cut, or another's."""
    meta = next(folder.glob("checkpoints/*/meta/metadata"))
    name = meta.relative_to(folder).as_posix()
    of_meta = json_cases("run", name, _json(meta), lambda path, _: True)
    return st.one_of(of_meta, pieces("run", folder, folder / "checkpoints"))


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
