"""Errors beside the main thread: held back while a program runs, shown unless it says why it ends.

A save that fails is traced by every thread and library that it touches: by threads, callbacks of
native code, what is collected later, and in the logs of Orbax and asyncio. To the user it is one
fault, and the program's own line names it.
"""

import logging
import sys
import threading
from collections.abc import Callable
from typing import Any

_LOGGERS = ("absl", "asyncio")  # where Orbax and Python's event loops log


class Held:
    """Holds them back from now on, to the end of the process unless `show` is called."""

    def __init__(self) -> None:
        self._told: list[Callable[[], object]] = []
        self._hooks = threading.excepthook, sys.unraisablehook, sys.excepthook
        self._set(*(self._later(hook) for hook in self._hooks))
        for name in _LOGGERS:
            logging.getLogger(name).addFilter(self._passes)

    def show(self) -> None:
        """Ends it, and shows what was held back."""
        self._set(*self._hooks)
        for name in _LOGGERS:
            logging.getLogger(name).removeFilter(self._passes)
        while self._told:
            self._told.pop(0)()

    @staticmethod
    def _set(*hooks: Callable[..., Any]) -> None:
        threading.excepthook, sys.unraisablehook, sys.excepthook = hooks

    def _later(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: self._told.append(lambda: hook(*args))

    def _passes(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            self._told.append(lambda: logging.getLogger(record.name).handle(record))
        return record.levelno < logging.ERROR
