"""What every program shares: flags, the work folder, loading the model, clear errors."""

import hashlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from reptune_jax import config as configs
from reptune_jax import distributed, lm, mesh
from reptune_jax.lm import Model
from reptune_jax.model import attention

PER_RUN = ("arm", "sign", "seed", "study")  # may differ between the runs of one study


class Stopped(Exception):
    """A SIGTERM was heeded: what was done is saved, and the same command goes on from there."""


def main(run: Callable[..., Any], doc: str | None, trains: bool = False) -> None:
    """Parses `--config` and `--workdir`, then calls run(config, workdir).

    A program that `trains` does not die of a SIGTERM but saves first.

    A ValueError or a missing file ends the program with its message and exit code 1: those messages
    are written for the user, a traceback would hide them.
    """
    flag = config_flags.DEFINE_config_file(
        "config", None, "configs/x.py[:arg], then --config.key=value", lock_config=True
    )
    workdir = flags.DEFINE_string("workdir", None, "folder of the study; made if absent")
    coordinator = flags.DEFINE_string("coordinator", "", "host:port of process 0, of many")
    processes = flags.DEFINE_integer("processes", 0, "how many, where that is not detected")
    process_id = flags.DEFINE_integer("process_id", -1, "which of them this is, from 0")
    flags.mark_flags_as_required(["config", "workdir"])
    names = ("config", "workdir", "coordinator", "processes", "process_id")
    for name in names:  # so that --help shows them
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])
    sys.modules["__main__"].__doc__ = doc

    def entry(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(
                f"unexpected argument {argv[1]!r}; flags are --config and --workdir."
            )
        c = configs.check(flag.value)
        start()
        distributed.start(coordinator.value, processes.value, process_id.value, trains)
        run(c, Path(str(workdir.value)))

    call(lambda: app.run(entry))


def call(entry: Callable[[], Any]) -> None:
    """Runs a program; the user's mistakes are printed, not traced."""
    logging.set_verbosity(logging.WARNING)
    try:
        entry()
    except Stopped as e:
        say(str(e))
    except (ValueError, OSError, AttributeError, KeyError, TypeError) as e:
        message = _for_user(e)
        if os.environ.get("REPTUNE_TRACEBACK") or not message:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(1)


def heed_stop(what: str) -> None:
    """Between two parts of a program: ends it if a SIGTERM came meanwhile.

    Raises:
      Stopped: one came.
    """
    if distributed.stop_asked():
        raise Stopped(f"stopped {what} by SIGTERM. The same command goes on from here.")


def start() -> None:
    """Compiled programs are kept between runs, in the user's cache folder."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", "~/.cache/reptune_jax/xla")
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def load_model(c: ConfigDict) -> Model:
    """The config's model on the config's mesh."""
    began = time.monotonic()
    where = mesh.make_mesh(**c.mesh.to_dict())
    model = lm.load(c.model, c.dtype or None, where if where.size > 1 else None)
    if model.tokenizer is None:
        raise ValueError(f"{c.model}: has no tokenizer, expected a chat model. Add its files.")
    took = time.monotonic() - began
    say(f"model: {c.model} ({model.arch.family}, {model.dtype}) in {took:.1f} s")
    training = model.kernel("right") if c.train.flash else attention.XLA
    say(f"attention: {training} in training, {model.kernel('any')} elsewhere")
    return model


def claim_study(workdir: Path, c: ConfigDict) -> None:
    """The study's own config.json: everything but which run this is."""
    _claim(workdir, _without(c, PER_RUN))


def claim_run(folder: Path, c: ConfigDict) -> None:
    """A run's config.json: everything but which other runs the study has, which may grow."""
    _claim(folder, _without(c, ("study",)))


def run_name(c: ConfigDict) -> str:
    """Folder of one tuned run: dual+_s0."""
    return f"{c.arm}{'+' if c.sign > 0 else '-'}_s{c.seed}"


def template_sha(model: Model) -> str:
    """Identifies the chat template a vector was read under."""
    template = model.tokenizer.chat_template or ""
    return hashlib.sha256(str(template).encode()).hexdigest()[:12]


def say(message: str) -> None:
    """For the person at the terminal; libraries' own chatter stays in the log."""
    if distributed.is_first():
        print(f"[{time.strftime('%H:%M:%S')}] {message}", flush=True)


def _claim(folder: Path, c: ConfigDict) -> None:
    distributed.same(config=configs.digest(c))
    distributed.once(lambda: configs.claim_workdir(folder, c))
    if not distributed.everywhere((folder / "config.json").exists()):
        raise ValueError(
            f"workdir {folder}: not every process sees what process 0 wrote there, expected one "
            "folder. Use a file system that all hosts share."
        )


def _without(c: ConfigDict, keys: tuple[str, ...]) -> ConfigDict:
    return ConfigDict({k: v for k, v in c.to_dict().items() if k not in keys})


def _for_user(e: BaseException) -> str:
    """The message of an error that was raised for the user: by this package, or by the config."""
    trace, last = e.__traceback__, ""
    while trace is not None:
        last, trace = trace.tb_frame.f_code.co_filename, trace.tb_next
    if Path(last).is_relative_to(Path(__file__).parent):
        # Other kinds of error within this package are its own faults and keep their traceback.
        return str(e) if isinstance(e, ValueError | OSError) else ""
    if "ml_collections" in Path(last).parts:
        what = "" if isinstance(e, OSError) else "config: unknown key or wrong type: "
        return what + str(e.args[0] if e.args else e)
    return ""
