"""A study's folder and its runs' folders: every path and name in them, and whose they are.

    workdir/                    Study
      config.json               whose it is, with versions, commit and device
      vector.safetensors        the behavior vector
      targets.jsonl             what the token loss learns from, where the model writes it
      results/*.parquet         per-item results: baseline, steering, dial_<arm>,
                                capability_<condition>, specificity_<condition>,
                                attack_<attack>_<condition>
      dual+_s0/                 Run: arm, sign and seed
        config.json  vector*.safetensors  checkpoints/N/  metrics.jsonl  events.*  done.json
        results/tuned.parquet
      judge.jsonl               what the endpoint of eval.judge answered
      report/index.html         and report/plots/*.png
      trials/*/                 of a search: each a study's folder, with outcome.json
      recipe.py  select.py      the config that a search chose
      selection.jsonl           what `select` has measured
      .lock                     who writes there; a run and the report have one of their own
      export/dual+_s0/          a Hugging Face folder; export/dual+_s0_adapter/ for peft

A folder belongs to the config that claimed it: the same config resumes, another is refused by name,
unless nothing that is there depends on what differs. It is claimed when something is written to it,
not before: a first start that fails leaves no claim.
"""

import dataclasses
import json
import re
import shutil
import subprocess
from contextlib import AbstractContextManager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from reptune_jax import config as configs
from reptune_jax import distributed, ending, lock, roles
from reptune_jax.console import say

_LOCK = ".lock"
_NAME = re.compile(r"(?P<arm>[a-z]+)(?P<sign>[+-])_s(?P<seed>\d+)")


class RunName(NamedTuple):
    """What tells the runs of a study apart; written `dual+_s0`."""

    arm: str
    sign: int
    seed: int

    def __str__(self) -> str:
        return f"{self.arm}{'+' if self.sign > 0 else '-'}_s{self.seed}"

    @classmethod
    def of(cls, c: ConfigDict) -> "RunName":
        """The run that a config describes."""
        return cls(c.arm, c.sign, c.seed)

    @classmethod
    def parse(cls, name: str) -> "RunName | None":
        """The reverse of `str`; None for a folder that is called otherwise."""
        found = _NAME.fullmatch(name)
        return found and cls(found["arm"], 1 if found["sign"] == "+" else -1, int(found["seed"]))


def _at(name: str, about: str = "") -> Any:
    return property(lambda folder: folder.path / name, doc=about)


@dataclasses.dataclass(frozen=True)
class _Folder:
    path: Path

    config = _at("config.json")
    vector = _at("vector.safetensors")

    def writing(self) -> AbstractContextManager[None]:
        """No other program writes here for the block.

        Raises:
          ValueError: one does; names it.
        """
        return lock.held(self.path / _LOCK, for_all=True)

    def check(self, c: ConfigDict) -> None:
        """Raises ValueError where it belongs to another config."""
        _check(self, self._own(c))

    def claimed(self, c: ConfigDict) -> bool:
        """Whether its config.json says what `claim` would write; of a folder that is `check`ed."""
        return self.config.exists() and not _changed(self, _as_stored(self._own(c)))

    def claim(self, c: ConfigDict) -> None:
        """Makes it this config's.

        Raises:
          ValueError: it belongs to another one.
        """
        _claim(self, self._own(c))

    def rests_on(self) -> tuple[str, ...] | None:
        """The keys that what is there depends on; None = all."""
        raise NotImplementedError

    def _own(self, c: ConfigDict) -> dict[str, Any]:
        """The values that it belongs to."""
        raise NotImplementedError


class Run(_Folder):
    """One tuned run's folder."""

    metrics = _at("metrics.jsonl")
    done = _at("done.json", "the last thing that training writes")
    profile = _at("profile")
    results = _at("results/tuned.parquet")

    @property
    def checkpoints(self) -> Path:
        return (self.path / "checkpoints").absolute()  # Orbax takes no relative path

    def vector_of(self, behavior: str) -> Path:
        """The vector of a further behavior of the run."""
        return self.path / f"vector_{behavior}.safetensors"

    def finished(self) -> bool:
        """Whether training ran to its end, or stopped early on purpose."""
        return distributed.exists(self.done)

    def finish(self, about: dict[str, Any]) -> None:
        """Marks it as finished."""
        distributed.once(lambda: write_whole(self.done, json.dumps(about) + "\n"))

    def rests_on(self) -> tuple[str, ...] | None:
        return None if self.results.exists() or any(self.checkpoints.glob("*")) else ()

    def _own(self, c: ConfigDict) -> dict[str, Any]:  # which runs the study has may grow
        return roles.without(c.to_dict(), "study", "declared")


class Study(_Folder):
    """A study's folder."""

    targets = _at("targets.jsonl")
    baseline = _at("results/baseline.parquet")
    steering = _at("results/steering.parquet")
    items = _at("results/items.parquet", "all results in one, of a study that is kept")
    recipe = _at("recipe.py")
    select = _at("select.py")
    selection = _at("selection.jsonl", "what `select` has measured")
    outcome = _at("outcome.json", "what a trial of a search did")
    asked = _at("judge.jsonl", "what the endpoint of eval.judge answered")
    report = _at("report/index.html")
    plots = _at("report/plots")

    def reporting(self) -> AbstractContextManager[None]:
        """`writing` of the report alone, which may be read while the study goes on."""
        return lock.held(self.report.with_name(_LOCK))

    def dial(self, arm: str) -> Path:
        """The results of an arm's weights, scaled."""
        return self.path / "results" / f"dial_{arm}.parquet"

    def capability(self, condition: str) -> Path:
        """What the suites say of a condition."""
        return self.path / "results" / f"capability_{condition}.parquet"

    def specificity(self, condition: str) -> Path:
        """What a condition says where other behaviors are asked for."""
        return self.path / "results" / f"specificity_{condition}.parquet"

    def attack(self, name: str, condition: str) -> Path:
        """What an attack did to a condition."""
        return self.path / "results" / f"attack_{name}_{condition}.parquet"

    def trial(self, name: str) -> "Study":
        """One combination of a search."""
        return Study(self.path / "trials" / name)

    def share(self, other: "Study") -> None:
        """Gives another folder this one's vector and targets, where it has none."""
        other.path.mkdir(parents=True, exist_ok=True)
        for ours, theirs in ((self.vector, other.vector), (self.targets, other.targets)):
            if ours.exists() and not theirs.exists():
                shutil.copyfile(ours, theirs)

    def run(self, name: RunName | str) -> Run:
        """A run by name, there or not."""
        return Run(self.path / str(name))

    def export(self, name: RunName | str) -> Path:
        """Where a run's Hugging Face folder goes."""
        return self.path / "export" / str(name)

    def adapter(self, name: RunName | str) -> Path:
        """Where a run's LoRA alone goes, for peft."""
        return self.path / "export" / f"{name}_adapter"

    def runs(self) -> list[Run]:
        """Those that have begun to save, by name."""
        return [Run(path.parent) for path in sorted(self.path.glob("*/checkpoints"))]

    def chosen(self) -> Run | None:
        """The run that stands for the study where none is named.

        Its only one; else of those that it exported, or of the arm that is exported by default,
        the first: + before -, low seeds first.
        """
        runs = self.runs()
        if len(runs) == 1:
            return runs[0]
        names = [name for run in runs if (name := RunName.parse(run.path.name))]
        exported = [name for name in names if self.export(name).is_dir()]
        usual = [name for name in names if name.arm == configs.default().study.export]
        first = min(exported or usual, key=lambda name: (-name.sign, name.seed), default=None)
        return first and self.run(first)

    def results(self) -> list[Path]:
        """Every file of per-item results, the study's and its runs'."""
        return sorted(self.path.glob("**/results/*.parquet"))

    def metrics(self) -> list[Run]:
        """The runs that logged anything."""
        return [Run(path.parent) for path in sorted(self.path.glob("*/metrics.jsonl"))]

    def rests_on(self) -> tuple[str, ...] | None:
        if self.runs() or self.results():
            return None
        return roles.OF_VECTOR if self.vector.exists() or self.targets.exists() else ()

    def _own(self, c: ConfigDict) -> dict[str, Any]:
        return roles.without(c.to_dict(), "study", "run")


def read_config(folder: _Folder) -> dict[str, Any]:
    """The config that a folder belongs to, as JSON has it.

    Raises:
      ValueError: its config.json is of something else.
    """
    return read_record(folder)["config"]


def read_record(folder: _Folder) -> dict[str, Any]:
    """All of a folder's config.json: the config, versions, commit and device.

    Raises:
      ValueError: it is of something else.
    """
    try:
        found = json.loads(folder.config.read_text())
        if _like(found["config"], configs.default().to_dict()):
            return found
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ValueError(
        f"workdir {folder.path}: holds a config.json that is not a run's, expected a new "
        "folder or a run's. Use another --workdir."
    )


def version() -> str:
    """Of this package, as it was installed."""
    try:
        return metadata.version("reptune_jax")
    except metadata.PackageNotFoundError:
        return "0+clone"  # on the path, but never installed


def environment() -> dict[str, Any]:
    """Versions, commit and device, for the record."""
    import jax

    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
    return {
        "versions": {
            "reptune_jax": version(),
            **{name: metadata.version(name) for name in packages},
        },
        "commit": _git_commit(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
    }


def write_whole(path: Path, text: str) -> None:
    """A reader sees the old file or the whole new one."""
    with ending.whole(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def _check(folder: _Folder, values: dict[str, Any]) -> None:
    distributed.same(config=roles.digest(values))
    distributed.once(lambda: _changed(folder, _as_stored(values)))


def _claim(folder: _Folder, values: dict[str, Any]) -> None:
    distributed.same(config=roles.digest(values))
    distributed.once(lambda: _write_config(folder, _as_stored(values)))
    if not distributed.everywhere(folder.config.exists()):
        raise ValueError(
            f"workdir {folder.path}: not every process sees what process 0 wrote there, expected "
            "one folder. Use a file system that all hosts share."
        )


def _as_stored(values: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(roles.without(values, "shown")))  # tuples become lists


def _write_config(folder: _Folder, values: dict[str, Any]) -> None:
    changed = _changed(folder, values)
    if changed:
        say(f"{folder.path}: {'; '.join(changed)}. Nothing that is there depends on it.")
    if changed or not folder.config.exists():
        folder.path.mkdir(parents=True, exist_ok=True)
        write_whole(folder.config, json.dumps({"config": values, **environment()}, indent=1) + "\n")


def _changed(folder: _Folder, values: dict[str, Any]) -> list[str]:
    """What differs from the folder's config, if nothing that is there depends on it."""
    if not folder.config.exists():
        return []
    changed, keys = roles.differences(read_config(folder), values), folder.rests_on()
    matter = [line for line in changed if keys is None or roles.is_of(line.split(":")[0], keys)]
    if not matter:
        return changed
    advice = "Use another --workdir, or the same config to resume."
    if not any(roles.is_of(line.split(":")[0], roles.OF_VECTOR) for line in matter):
        advice += " vector.safetensors and targets.jsonl do not depend on it: copy them there."
    raise ValueError(
        f"workdir {folder.path}: holds a run of another config: {'; '.join(matter)}. {advice}"
    )


def _like(found: Any, schema: dict[str, Any]) -> bool:
    """Whether what is a group of keys in the schema is one, where it is there."""
    groups = [(key, value) for key, value in schema.items() if isinstance(value, dict)]
    return isinstance(found, dict) and all(_like(found.get(k, {}), v) for k, v in groups)


def _git_commit() -> str:
    clone = Path(__file__).parents[1]
    if not (clone / ".git").exists():
        return ""  # installed from a wheel, maybe within somebody else's repository
    command = ["git", "-C", str(clone), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
