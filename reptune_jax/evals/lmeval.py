"""Program: lm-evaluation-harness on any model, or on the arms of a study, steered ones too.

    python -m reptune_jax.evals.lmeval --from=MODEL --tasks=arc_easy,hellaswag [--limit=100]
    python -m reptune_jax.evals.lmeval --from=runs/sentiment --arms=base,steer,dual --tasks=…

Needs `pip install "reptune_jax[lmeval]"`, and no torch. MODEL is a Hugging Face folder or hub id, a
.gguf file or an Orbax folder. Tasks are the harness's own, whose data comes from the hub, or those
of the YAML files in --include. With --to, the harness's results of each condition are written to
FOLDER/<condition>.json, samples included; what is there is not asked again.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from reptune_jax import command_line, folder, lm, program, stored_config
from reptune_jax.config import ARMS
from reptune_jax.console import say
from reptune_jax.evals import capability
from reptune_jax.evals.arms import Condition
from reptune_jax.evals.capability import Planned
from reptune_jax.folder import Study
from reptune_jax.lm import Model
from reptune_jax.reading import parse_json, reading, short


class Asked(NamedTuple):
    """How the harness asks; the names are those of its `simple_evaluate`."""

    tasks: tuple[str, ...]
    include: str = ""  # folder of further tasks
    limit: int = 0  # items of each task; 0: all
    num_fewshot: int | None = None  # None: as the task says
    apply_chat_template: bool = False
    batch: int = 32


def run(given: str, asked: Asked, arms: Sequence[str] = (), to: str = "") -> dict[str, Any]:
    """Asks every condition and prints the harness's table; its results by condition.

    Raises:
      ValueError: the harness is not installed, has no such task, or there is no such arm.
    """
    harness = _harness()
    manager = _tasks(harness, asked)
    settings = asked._asdict() | {"tasks": list(asked.tasks)}
    settings |= {"files": _files(Path(asked.include))} if asked.include else {}
    found: dict[str, Any] = {}
    planned, base = _conditions(given, tuple(arms))
    for name, one in planned.items():
        path = Path(to) / f"{name}.json" if to else None
        noted = settings | ({"persona": one.persona} if one.persona else {})
        if path and path.exists():
            found[name] = _there(path, noted)
            continue
        cond = one.make(base())
        say(f"asking {cond.title}")
        options = {k: v for k, v in settings.items() if k not in ("include", "files", "batch")}
        with reading("lm-eval", "Is the task's data within reach? --include takes local tasks."):
            results: Any = harness.simple_evaluate(
                harness.Harness(cond, asked.batch),
                task_manager=manager,
                **options | {"limit": asked.limit or None},
            )
        print(harness.table(results), flush=True)
        found[name] = results | {"asked": noted}
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            folder.write_whole(path, harness.as_json(found[name]))
            say(f"lmeval: {name} -> {path}")
    return found


def _files(include: Path) -> str:
    """Identifies the user's own tasks, and such rows as lie beside them."""
    found, paths = hashlib.sha256(), (p for p in sorted(include.rglob("*")) if p.is_file())
    for path in paths:
        if path.suffix in (".yaml", ".yml", ".py", ".json", ".jsonl"):
            found.update(f"{path.relative_to(include)}\n".encode() + path.read_bytes())
    return found.hexdigest()[:12]


def _there(path: Path, settings: dict[str, Any]) -> Any:
    """Results of the same questions; of others they are neither shown nor written over."""
    results = parse_json(path.read_text(encoding="utf-8"), path, "Name another folder with --to.")
    if results.get("asked") != settings:
        raise ValueError(
            f"{path}: got results of {short(results.get('asked'))}, expected those of "
            f"{settings}. Name another folder with --to."
        )
    say(f"{path}: already there")
    return results


def _harness() -> Any:
    """The module that needs lm-eval."""
    try:
        from reptune_jax.evals import harness
    except ModuleNotFoundError as error:
        raise ValueError(
            f"lmeval: needs the package {error.name}, which is not installed. "
            'Run pip install "reptune_jax[lmeval]".'
        ) from None
    return harness


def _tasks(harness: Any, asked: Asked) -> Any:
    """The harness's index of tasks, with the user's own; the names are in it."""
    if asked.include and not Path(asked.include).is_dir():
        raise ValueError(f"--include: got {asked.include!r}, expected a folder of YAML files.")
    manager = harness.TaskManager(include_path=asked.include, include_defaults=False)
    if not asked.include or not all(manager.match_tasks([name]) for name in asked.tasks):
        manager = harness.TaskManager(
            include_path=asked.include or None
        )  # thousands: takes seconds
    for name in asked.tasks:
        if not manager.match_tasks([name]):
            raise ValueError(
                f"--tasks: got {name!r}, expected names of tasks or groups. `lm-eval ls tasks` "
                "lists them; --include=FOLDER brings in your own."
            )
    return manager


def _conditions(
    given: str, arms: tuple[str, ...]
) -> tuple[dict[str, Planned], Callable[[], Model]]:
    """What is asked, by the name of its results, and of which model, loaded when it is called."""
    study = Study(Path(given).expanduser())
    if not (study.runs() or study.vector.is_file()):
        if arms:
            raise ValueError(f"--arms: got {', '.join(arms)} for {given}, which is no study.")
        alone = Planned("model", lambda base: Condition(base, "base"))
        return {"model": alone}, lambda: lm.load(given)
    c = stored_config.get_config(given)
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise ValueError(f"--arms: got {unknown[0]!r}, expected some of {', '.join(ARMS)}.")
    if arms:
        c.suites.arms = arms
    base = cache(lambda: capability.base_of(c, study, None))
    planned = list(capability.conditions(c, study, c.suites.arms))
    return {one.name + (f"_k{one.scale:g}" if one.scale else ""): one for one in planned}, base


def main() -> None:
    """Flags; the user's mistakes are printed, not traced."""
    texts = {
        "from": "a model, or the folder of a study",
        "tasks": "names with commas between them",
        "arms": "of a study; by default its suites.arms",
        "include": "folder with tasks of one's own",
        "to": "folder for the results",
    }
    values = {name: flags.DEFINE_string(name, None, text) for name, text in texts.items()}
    limit = flags.DEFINE_integer("limit", 0, "items of each task; 0: all", lower_bound=0)
    shots = flags.DEFINE_integer("fewshot", None, "examples before each item")
    chat = flags.DEFINE_bool("chat", False, "ask through the chat template")
    batch = flags.DEFINE_integer("batch", 32, "rows at a time", lower_bound=1)
    flags.mark_flags_as_required(["from", "tasks"])

    def entry(argv: list[str]) -> None:
        if len(argv) > 1:
            raise ValueError(f"unexpected argument {argv[1]!r}; see --help.")
        program.start()
        v = {name: value.value or "" for name, value in values.items()}
        tasks, arms = (tuple(filter(None, v[name].split(","))) for name in ("tasks", "arms"))
        asked = Asked(tasks, v["include"], limit.value, shots.value, chat.value, batch.value)
        run(v["from"], asked, arms, v["to"])

    shown = (*texts, "limit", "fewshot", "chat", "batch")
    program.call(lambda: command_line.run(entry, __doc__, shown))


if __name__ == "__main__":
    main()
