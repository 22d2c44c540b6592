"""What every program shares: flags, the work folder, loading the model, clear errors."""

import os
import sys
import time
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from reptune_jax import (
    background,
    command_line,
    depth,
    distributed,
    ending,
    frozen,
    lm,
    mesh,
    ranges,
)
from reptune_jax.console import say
from reptune_jax.data import behavior as behaviors
from reptune_jax.data import schema
from reptune_jax.hub import templates
from reptune_jax.hub.source import open_source
from reptune_jax.lm import Model
from reptune_jax.model import attention, families

_OF_CONFIG = (ValueError, AttributeError, KeyError, TypeError)
_PATIENCE = 5.0  # seconds for threads, and other processes, to end by themselves


def main(run: Callable[..., Any], doc: str | None, of_study: bool = False) -> None:
    """Parses `--config` and `--workdir`, then calls run(config, workdir).

    A program that is `of_study` needs no --config where --workdir is a study. A ValueError, or an
    error of the machine, ends it with its message and exit code 1: those messages are written for
    the user, a traceback would hide them.
    """
    flag = config_flags.DEFINE_config_file(
        "config", None, "name or path, [:arg], then --config.key=value", lock_config=True
    )
    workdir = flags.DEFINE_string("workdir", None, "folder of the study; made if absent")
    coordinator = flags.DEFINE_string("coordinator", "", "host:port of process 0, of many")
    processes = flags.DEFINE_integer("processes", 0, "how many, where that is not detected")
    process_id = flags.DEFINE_integer("process_id", -1, "which of them this is, from 0")
    flags.mark_flags_as_required(["workdir", "config"])  # which is the order they are asked for
    shown = ("config", "workdir", "coordinator", "processes", "process_id")

    def entry(argv: list[str]) -> None:
        if len(argv) > 1:
            raise ValueError(f"unexpected argument {argv[1]!r}; see --help.")
        c = ranges.check(flag.value)
        depth.settle(c)
        start()
        distributed.start(coordinator.value, processes.value, process_id.value)
        run(c, Path(str(workdir.value)))

    call(lambda: command_line.run(entry, doc, shown, of_study))


def is_also(function: Callable[..., Any], module: str) -> None:
    """Importing a program puts its module where the function of its name was: it becomes both."""

    class Both(types.ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

    sys.modules[module].__class__ = Both


def call(entry: Callable[[], Any]) -> None:
    """Runs a program; signals and the user's mistakes are a line each, not traced.

    REPTUNE_DEBUG=1, or --debug, shows all there is to see.
    """
    logging.set_verbosity(logging.WARNING)
    debug = "--debug" in sys.argv or bool(os.environ.get("REPTUNE_DEBUG"))
    held = None if debug else background.Held()
    try:
        with ending.heeded():
            entry()
    except SystemExit:
        raise
    except BaseException as e:
        asked, why = ending.asked(), "" if debug else for_user(e)
        status = ending.code() if asked else 1
        # Other processes must hear that this one is at its end, or they would wait for it.
        ending.no_later_than(_PATIENCE if distributed.is_shared() or not asked else 0.0, status)
        if asked:
            ending.say_why(ending.stopped_by(str(e) if isinstance(e, ending.Ended) else ""))
        elif why:
            print("error:", *filter(None, map(str.strip, why.splitlines())), file=sys.stderr)
        else:
            raise
        held = None  # to the end of the process: it has said why it ends
        ending.clean()
        sys.exit(status)
    finally:
        if held:
            held.show()


def start() -> None:
    """Compiled programs are kept between runs, in the user's cache folder."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", "~/.cache/reptune_jax/xla")
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def load_model(c: ConfigDict, for_tuning: bool = False) -> Model:
    """The config's model on the config's mesh; from then on float32 is what the config says.

    `for_tuning` as `train.base` holds it.
    """
    began = time.monotonic()
    if c.tf32:
        jax.config.update("jax_default_matmul_precision", "tensorfloat32")
    where = mesh.make_mesh(**c.mesh.to_dict())
    source = open_source(c.model)
    depth.settle(c, lambda: source.arch().N)
    depth.check(c, source.arch().N)
    if source.tokenizer is None:
        raise ValueError(f"{c.model}: has no tokenizer, expected a chat model. Add its files.")
    templates.use(source.tokenizer, templates.parse(c.template_arguments))
    if unset := templates.unset(source.tokenizer):
        say(f"chat template: reads {', '.join(unset)}, not set in template_arguments")
    if behaviors.is_foreign(c.behavior) or schema.find(c.behavior).is_file():  # else who needs it
        context = families.context(source.config)
        behaviors.load(c.behavior).check_lengths(source.tokenizer, context)
    many = where if where.size > 1 else None
    if for_tuning and c.train.base:
        model = frozen.load(source, c, many)
    else:
        model = lm.load(source, c.dtype or None, many)
    about = f"{model.arch.family}, {model.dtype}{model.held and f', kernels in {model.held}'}"
    say(f"model: {c.model} ({about}) in {time.monotonic() - began:.1f} s")
    training = model.kernel("right") if c.train.flash else attention.XLA
    say(f"attention: {training} in training, {model.kernel('any')} elsewhere")
    return model


def for_user(e: BaseException) -> str:
    """The message of an error that was raised for the user: by this package, or by the config."""
    frames = traceback.extract_tb(e.__traceback__)
    last = frames[-1].filename
    if isinstance(e, OSError):
        return _of_machine(e)
    if isinstance(e, ValueError) and any(frame.name == "get_config" for frame in frames):
        return str(e)  # raised by a config file, for who chose it
    if Path(last).is_relative_to(Path(__file__).parent):
        # Other kinds of error within this package are its own faults and keep their traceback.
        return str(e) if isinstance(e, ValueError) else ""
    if "ml_collections" in Path(last).parts and isinstance(e, _OF_CONFIG):
        reason = e.args[0] if e.args else e
        reason = reason.args[0] if isinstance(reason, KeyError) else reason
        return f"config: unknown key or wrong type: {reason}"
    return ""


def _of_machine(e: OSError) -> str:
    """What the machine refused, with the file it was about."""
    file = f"{e.filename}: " if e.filename else ""
    text = f"{file}{e.strerror}" if e.strerror else str(e)
    advice = " Free some space; the same command resumes." if e.errno in ending.FULL else ""
    return text if text.endswith(".") and not advice else f"{text.rstrip('.')}.{advice}"
