"""The command line as people type it, before absl's and ml_collections' flags read it.

--config=sentiment:quick             a shipped config by name; a path works as before
--config.study.arms=base,steer       tuples as plain lists
--version, --help                    end with exit code 0
--debug                              shows tracebacks (REPTUNE_DEBUG=1 is the same)
no --config, but --workdir=DIR       where a program allows it: the config of that study
"""

import ast
import difflib
import functools
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from flax import traverse_util

from reptune_jax import config as configs
from reptune_jax.folder import version

_STORED = Path(__file__).parent / "stored_config.py"


def run(
    entry: Callable[[list[str]], Any], doc: str | None, shown: Sequence[str], of_study: bool = False
) -> None:
    """Parses the flags that are defined, then calls entry(arguments that are no flags).

    --help says `doc` and the flags in `shown`. `of_study`: without --config, take that of the study
    in --workdir.

    Raises:
      ValueError: a flag that is missing, unknown or malformed; a config that is not there.
    """
    given = [arg for arg in sys.argv[1:] if arg != "--debug"]
    sys.modules["__main__"].__doc__ = doc
    for name in shown:
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])
    if "--version" in given:
        print(f"reptune_jax {version()}")
        return
    asks = [arg for arg in given if arg in ("-h", "-?", "--help", "--helpshort", "--helpfull")]
    try:
        # Not handed over: ml_collections looks for overrides here.
        sys.argv[1:] = asks or prepare(given, of_study)
        app.run(entry, flags_parser=_parse)
    except SystemExit as end:  # absl calls showing help a failure
        raise SystemExit(0 if asks else end.code) from None


def prepare(given: Sequence[str], of_study: bool = False) -> list[str]:
    """The arguments as the flag libraries take them.

    Raises:
      ValueError: no such config; a value that is no list of what its key holds.
    """
    joined = [""]
    for arg in given:  # --config NAME is --config=NAME
        takes = joined[-1] in ("--config", "--workdir") or _tuple_of(joined[-1]) is not None
        if takes and not arg.startswith("--"):
            joined[-1] += f"={arg}"
        else:
            joined.append(arg)
    values = {k: v for k, _, v in (arg.partition("=") for arg in joined)}
    if of_study and "--config" not in values and "--workdir" in values:
        joined.insert(1, f"--config={_STORED}:{values['--workdir']}")  # before its overrides
    out = []
    for arg in joined[1:]:
        name, equals, value = arg.partition("=")
        if name == "--config":
            value = find_config(value)
        elif equals and (like := _tuple_of(name)) is not None:
            value = as_tuple(name.removeprefix("--config."), value, like)
        out.append(f"{name}{equals}{value}")
    return out


def find_config(given: str) -> str:
    """A shipped config's name, or a path, with its argument if it has one -> path[:argument].

    Raises:
      ValueError: neither; with the likely name.
    """
    name, colon, argument = given.partition(":")
    if name.endswith(".py") or "/" in name:
        if not Path(name).is_file():
            raise ValueError(f"--config: got {name!r}, which is not a file. {_expected(name)}")
        return given
    path = shipped_configs() / f"{name}.py"
    if not path.is_file():
        raise ValueError(f"--config: got {name!r}. {_expected(name)}")
    return f"{path}{colon}{argument}"


def shipped_configs() -> Path:
    """In a wheel they lie within the package, in a clone beside it."""
    here = Path(__file__).parent
    return here / "configs" if (here / "configs").is_dir() else here.parent / "configs"


def as_tuple(key: str, text: str, like: tuple[Any, ...]) -> str:
    """`a,b` as the literal of a tuple of what `like` holds; a literal stays as it is.

    Raises:
      ValueError: something else than such a list.
    """
    kind = type(like[0]) if like else str  # where nothing is the default, it is of names
    parts = (part.strip("'\" ") for part in text.strip("()[] ").split(","))
    words = tuple(part for part in parts if part)
    try:
        found = ast.literal_eval(text)
        found = tuple(found) if isinstance(found, tuple | list) else (found,)
    except (ValueError, SyntaxError):
        found = words
    if kind is str and all(type(value) in (int, float) for value in found):
        found = words  # which are meant to be names
    if kind is float:
        found = tuple(float(v) if type(v) is int else v for v in found)
    if not all(type(value) is kind for value in found):
        names = {int: "whole numbers", float: "numbers", str: "names"}
        raise ValueError(
            f"{key}: got {text!r}, expected {names[kind]} with commas between them. "
            f"Example: --config.{key}={','.join(map(str, like or ('token',)))}."
        )
    return repr(found)


def _tuple_of(flag: str) -> tuple[Any, ...] | None:
    """What `--config.KEY` holds by default, where that is a tuple."""
    key = flag.removeprefix("--config.")
    value = _tuples().get(re.sub(r"^loss\.also\.[^.]+", "loss.also.*", key))  # of any name
    return value if key != flag else None


@functools.cache
def _tuples() -> dict[str, tuple[Any, ...]]:
    c = configs.default()
    c.loss.also["*"] = configs.also_behavior("")
    values = traverse_util.flatten_dict(c.to_dict(), sep=".")
    return {key: value for key, value in values.items() if isinstance(value, tuple)}


def _expected(name: str) -> str:
    known = sorted(path.stem for path in shipped_configs().glob("*.py"))
    close = difflib.get_close_matches(Path(name).stem, known, n=1)
    meant = f" Did you mean {close[0]!r}?" if close else ""
    return f"Expected a path to a config file, or one of {', '.join(known)}.{meant}"


def _parse(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
        workdir = flags.FLAGS["workdir"].value if "workdir" in flags.FLAGS else None
        if workdir == "" or (workdir and Path(workdir).is_file()):
            what = "a file" if workdir else "nothing"
            raise ValueError(
                f"--workdir: got {workdir!r}, {what}, expected a folder, or a new one."
            )
        return rest
    except flags.Error as error:
        text = str(error).splitlines()[0].removeprefix("flag ")
        if missing := re.search(r"Flag (--\S+) must have a value", text):
            raise ValueError(f"{missing[1]}: got none, which this needs. See --help.") from None
        key = re.search(r"Unknown command line flag '(config\.\S+)'", text)
        if key and "config" in flags.FLAGS:  # whose keys are known only once it is
            raise ValueError(
                f"--config: got none, which --{key[1]} is a key of. Example: --config=sentiment."
            ) from None
        flag, failed, _ = text.partition(": Error whilst parsing config file")
        if failed and error.__context__:  # which is the config's own error, told by ml_collections
            own = error.__context__.__context__
            # A ValueError is written for who chose the config, others say not where they are from.
            raise ValueError(str(own) if isinstance(own, ValueError) else f"{flag}: {own}") from own
        raise ValueError(f"{text.rstrip('.')}. See --help.") from None
