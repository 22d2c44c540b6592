"""Bounds of chat templates, which are programs that come with a model: on time, memory and text.

A template runs in jinja's sandbox, which keeps it from the machine but lets it loop and grow.
"""

import contextlib
import functools
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

SECONDS = 5.0  # for one chat, which takes a thousandth of one
TEXT = 1_000_000  # characters beyond twenty times those of the turns
_BYTES = 256 << 20  # of memory that a first rendering may take
_FACTOR = 10_000  # the largest number that a template multiplies by
_ADVICE = "Do not trust this model's files, or write another chat_template."
_LOOPING = ("<template>", "jinja2/filters.py", "jinja2/utils.py")  # a template's code, and helpers
_tried: set[str] = set()


class Unbounded(ValueError):
    """A template that does not end, or makes more than it should."""


@contextlib.contextmanager
def bounded(template: str) -> Iterator[None]:
    """What is rendered within ends in time; the first time also in little memory.

    Raises:
      Unbounded: it does not, or holds what could grow in a step that nobody can end.
    """
    check_source(template)
    with _in_memory(template), _in_time():
        yield


def check_text(text: str, given: int) -> str:
    """The rendered text of turns of `given` characters, if it is not far longer.

    Raises:
      Unbounded: it is.
    """
    if len(text) > TEXT + 20 * given:
        raise Unbounded(
            f"chat_template: made {len(text):,} characters of {given:,}, expected at most "
            f"{TEXT + 20 * given:,}. {_ADVICE}"
        )
    return text


@functools.lru_cache(64)
def check_source(template: str) -> None:
    """Raises Unbounded for powers, and products of which neither side is a small number.

    Numbers and texts that grow by them take longer in one step than all of a chat should.
    """
    import jinja2
    from jinja2 import nodes

    plain = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template)  # not jinja's
    try:
        syntax = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except (jinja2.TemplateError, RecursionError):
        return  # said when it is rendered
    small = [
        any(isinstance(side, nodes.Const) and _small(side.value) for side in (mul.left, mul.right))
        for mul in syntax.find_all(nodes.Mul)
    ]
    if next(syntax.find_all(nodes.Pow), None) or not all(small):
        raise Unbounded(
            "chat_template: has a power, or a product with no number up to "
            f"{_FACTOR:,} in it, expected none: it could grow without end. {_ADVICE}"
        )


def _small(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= _FACTOR


@contextlib.contextmanager
def _in_time() -> Iterator[None]:
    """Looks at the clock at every line of a template's code, as a debugger would."""
    end, before = time.monotonic() + SECONDS, sys.gettrace()

    def line(frame: FrameType, event: str, arg: Any) -> Any:
        if time.monotonic() > end:
            raise Unbounded(
                f"chat_template: runs for more than {SECONDS:g} s, expected an end. {_ADVICE}"
            )
        return line

    def call(frame: FrameType, event: str, arg: Any) -> Any:
        return line if frame.f_code.co_filename.endswith(_LOOPING) else None

    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(before)


@contextlib.contextmanager
def _in_memory(template: str) -> Iterator[None]:
    """The first time only: a limit holds for all threads, and later others compute."""
    statm = Path("/proc/self/statm")  # Linux's; elsewhere time and text are what is limited
    if template in _tried or not statm.exists():
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(statm.read_text().split()[0])
    limit = pages * resource.getpagesize() + _BYTES
    known = [value for value in (limit, soft, hard) if value != resource.RLIM_INFINITY]
    try:
        resource.setrlimit(resource.RLIMIT_AS, (min(known), hard))
        yield
    except MemoryError:
        raise Unbounded(
            f"chat_template: takes more than {_BYTES >> 20} MiB, expected next to none. {_ADVICE}"
        ) from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    _tried.add(template)
