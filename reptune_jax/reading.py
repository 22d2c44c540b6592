"""Reading files that others made: whatever is wrong in one is refused in one line, by its name."""

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

_AGAIN = "Download it again."


@contextlib.contextmanager
def reading(name: str | os.PathLike[str], advice: str = _AGAIN) -> Iterator[None]:
    """Any error of the block is the file's fault: parsers meet it in as many ways as it is wrong.

    So keep the block to what looks into the file. What the system says of a file stays as it is.

    Raises:
      ValueError: with the file's name in front, for every other kind of error.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.filename:
            raise  # the system's
        what = " ".join(str(error).split())[:500]
        if isinstance(error, ValueError) and what.startswith(os.fspath(name)):
            raise
        if isinstance(error, RecursionError):
            what = "it is nested too deeply"
        elif not isinstance(error, ValueError):
            what = f"it is not what it should be ({type(error).__name__}: {what})"
        end = "" if what.endswith(".") else "."
        more = f" {advice}" if advice not in what and not what.endswith(".") else ""
        raise ValueError(f"{os.fspath(name)}: {what}{end}{more}") from error


def parse_json(text: str | bytes, name: str | os.PathLike[str], advice: str = _AGAIN) -> Any:
    """The JSON object in a text.

    Raises:
      ValueError: it is none, or nested too deeply.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{os.fspath(name)}: is not valid JSON ({why}). {advice}") from None
    if not isinstance(value, dict):
        raise ValueError(
            f"{os.fspath(name)}: got a JSON {type(value).__name__}, expected an object. {advice}"
        )
    return value


def short(value: Any) -> str:
    """A value as an error shows it: files hold values of any length."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
