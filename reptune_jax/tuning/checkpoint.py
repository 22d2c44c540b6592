"""Orbax behind one file: what is saved, how a run resumes, what an evaluation reads.

A step's folder holds the trained weights, the rest of the state, and `meta`: what the run is, how
far it has come, and a digest of every leaf. Orbax restores flipped bytes without a word and takes
an empty folder for a step, so nothing is used before its digests agree. A step that is damaged is
renamed to `<step>.broken`, said so, and the one before it is used.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from reptune_jax import config as configs
from reptune_jax import distributed, program
from reptune_jax.tuning import digest
from reptune_jax.tuning.partition import Flat
from reptune_jax.tuning.step import State

_ITEMS = ("trained", "rest", "meta")
_IDENTITY = ("model_sha", "vector")  # of another run if they differ, beside the config


class Progress(NamedTuple):
    """How far a run had come when a step was saved."""

    val_loss: float | None = None  # of this step; None where it was not measured
    best: float | None = None  # lowest validation loss up to this step
    waited: int = 0  # evaluations since then
    seconds: float = 0.0  # of training, over all restarts


class Broken(Exception):
    """A checkpoint that cannot be used; says which step, which leaf, and why."""


class Checkpoints:
    """`workdir/checkpoints/<step>`. The newest `keep` steps stay, and the best one."""

    def __init__(self, workdir: Path, keep: int = 1):
        self.workdir = workdir
        self.folder = (workdir / "checkpoints").absolute()
        self._saving: int | None = None
        self._metas = self._sound_metas()
        self._manager = _Manager(
            self.folder,
            item_names=_ITEMS,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_NewestAndBest(max(keep, 1), self._metas),
                save_decision_policy=checkpoint_managers.FixedIntervalPolicy(1),
                cleanup_tmp_directories=True,  # of saves that a kill cut short
                enable_async_checkpointing=True,
            ),
        )

    def save(self, state: State, meta: dict[str, Any], progress: Progress) -> None:
        """Starts a save; the state may be donated to the next step at once.

        Raises:
          ValueError: there is a checkpoint of this step or of a later one.
          OSError: this save or the one before it could not be written.
        """
        step, items = int(state.step), _items(state)
        leaves = {k: f"{digest.describe(a)} {d}" for (k, d), a in _zip_digests(items)}
        sealed = _seal(
            {**meta, "step": step, "progress": list(progress), "leaves": leaves, **_made_with()}
        )
        args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        with self._reporting():
            saved = self._manager.save(
                step, args=ocp.args.Composite(**args, meta=ocp.args.JsonSave(sealed))
            )
        if not saved:
            raise ValueError(
                f"checkpoints: step {step} was not saved, because {self.folder} holds step "
                f"{self.latest()}. Two programs may be training in one folder: stop one of them."
            )
        self._saving, self._metas[step] = step, sealed

    def restore(self, like: State, meta: dict[str, Any]) -> tuple[State, Progress] | None:
        """The newest state that is sound, laid out as `like`; None where there is none.

        Raises:
          ValueError: it belongs to another run, or to another set of trained weights.
        """
        for step in sorted(self._metas, reverse=True):
            about = self._metas[step]
            _check_same_run(step, about, meta)
            items = _items(jax.tree.map(ocp.utils.to_shape_dtype_struct, like))
            _check_leaves(step, about, items)
            try:
                found = self._read(step, items)
            except Broken as e:
                self._metas.pop(step)
                distributed.once(functools.partial(_quarantine, self.folder / str(step), e))
                self._manager.reload()
                continue
            state = State(found["rest"]["step"], found["trained"], found["rest"]["opt"])
            return state, Progress(*about["progress"])
        return None

    def latest(self) -> int | None:
        """The newest step."""
        return self._manager.latest_step()

    def wait(self) -> None:
        """Returns when the saves under way are on disk.

        Raises:
          OSError: one of them could not be written.
        """
        with self._reporting():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for saves under way."""
        self.wait()
        self._manager.close()

    def _read(self, step: int, items: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, tree in items.items():
            error, args = "", ocp.args.Composite(**{name: ocp.args.StandardRestore(tree)})
            try:
                found[name] = self._manager.restore(step, args=args)[name]
            except RuntimeError:  # jax's own, such as a lack of memory: not the files' fault
                raise
            except Exception as e:  # Orbax raises bare ones
                error = _unreadable(name, tree, e)
            # A host reads its own shards only, and all must come to the same verdict.
            if not distributed.everywhere(not error):
                raise Broken(f"step {step}: {error or 'another process could not read it'}")
        _check_digests(step, self._metas[step], found)
        return found

    def _sound_metas(self) -> dict[int, dict[str, Any]]:
        """Sets aside what has no readable meta, before Orbax takes it for a step."""
        folders = _step_folders(self.folder)

        def sort_out() -> None:
            for folder in folders:
                try:
                    read_meta(folder)
                except Broken as e:
                    _quarantine(folder, e)

        distributed.once(sort_out)
        return {int(f.name): read_meta(f) for f in folders if f.exists()}

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        """What a save raised, now or in its thread, as one line that says what is left."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as e:
            failed, self._saving = self._saving, None
            left = sorted(s for s in self._metas if s != failed and (self.folder / str(s)).exists())
            raise OSError(
                f"checkpoints: a save into {self.folder} failed ({_first_line(e)}). Intact: steps "
                f"{', '.join(map(str, left)) or 'none'}. Free some space; the same command resumes."
            ) from e


class _Manager(ocp.CheckpointManager):
    """Only the loop asks for a SIGTERM: jax counts the questions, see distributed.stop_asked."""

    def reached_preemption(self, step: int) -> bool:
        return False


@dataclasses.dataclass
class _NewestAndBest:
    """Orbax's policy interface; validation losses come from the metas, which are sealed."""

    newest: int
    metas: dict[int, dict[str, Any]]

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        steps = [c.step for c in checkpoints]
        keep = {*steps[-self.newest :], best_step(self.metas)}
        return [step in keep for step in steps]


def best_step(metas: dict[int, dict[str, Any]]) -> int | None:
    """The step with the lowest validation loss, the earliest of several."""
    losses = {step: Progress(*meta["progress"]).val_loss for step, meta in metas.items()}
    measured = {step: loss for step, loss in losses.items() if loss is not None}
    return min(sorted(measured), key=measured.__getitem__) if measured else None


def load_best(workdir: Path) -> tuple[Flat, dict[str, Any], int]:
    """(trained leaves, meta, step) of the checkpoint with the lowest validation loss.

    Raises:
      FileNotFoundError: the folder holds no finished checkpoint. ValueError: it is damaged.
    """
    folder = (workdir / "checkpoints").absolute()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no checkpoints there. Run `train` with this --workdir first."
        )
    try:
        metas = {int(f.name): read_meta(f) for f in _step_folders(folder)}
        step = best_step(metas)
        if step is None:
            raise FileNotFoundError(
                f"{folder}: no finished checkpoint there. Let `train` finish a save."
            )
        trained = _read_trained(folder / str(step))
        _check_digests(step, metas[step], {"trained": trained})
    except Broken as e:
        raise ValueError(
            f"{folder}: {e}. The weights that would be measured are not those that were trained. "
            f"Delete {workdir} and run `train` again."
        ) from None
    return trained, metas[step], step


def read_meta(folder: Path) -> dict[str, Any]:
    """A step's meta, if it is as it was written.

    Raises:
      Broken: it is not.
    """
    step = folder.name
    if not any(folder.iterdir()):
        raise Broken(f"step {step}: the folder is empty")
    try:
        meta = ocp.JsonCheckpointHandler().restore(folder / "meta")
    except (ValueError, OSError, KeyError) as e:
        raise Broken(f"step {step}: meta cannot be read ({_first_line(e)})") from None
    if not isinstance(meta, dict) or "seal" not in meta:
        return _old_meta(folder, meta)
    if meta["seal"] != _seal(meta)["seal"]:
        raise Broken(f"step {step}: meta is not what was saved")
    return meta


def finished(workdir: Path) -> bool:
    """Whether training in this folder ran to its end (or stopped early on purpose)."""
    return distributed.exists(workdir / "done.json")


def mark_finished(workdir: Path, about: dict[str, Any]) -> None:
    """The last thing a training run writes."""

    def write() -> None:
        scratch = workdir / "done.json.tmp"
        scratch.write_text(json.dumps(about) + "\n")
        scratch.replace(workdir / "done.json")

    distributed.once(write)


def _items(state: State) -> dict[str, Any]:
    return {"trained": state.trained, "rest": {"step": state.step, "opt": state.opt}}


def _zip_digests(items: dict[str, Any]) -> Iterator[tuple[tuple[str, str], Any]]:
    return zip(digest.digests(items).items(), jax.tree.leaves(items), strict=True)


def _made_with() -> dict[str, Any]:
    return {"versions": configs.environment()["versions"]}


def _seal(meta: dict[str, Any]) -> dict[str, Any]:
    """The meta as JSON keeps it, with a digest of itself."""
    plain = json.loads(json.dumps({k: v for k, v in meta.items() if k != "seal"}, default=list))
    text = json.dumps(plain, sort_keys=True)
    return {**plain, "seal": hashlib.sha256(text.encode()).hexdigest()}


def _old_meta(folder: Path, meta: Any) -> dict[str, Any]:
    """Of a checkpoint from before there were digests: usable, and said to be unchecked."""
    try:
        metrics = json.loads((folder / "metrics" / "metrics").read_text())
        val_loss, waited = float(metrics["val_loss"]), int(metrics["waited"])
    except (OSError, ValueError, KeyError):
        raise Broken(f"step {folder.name}: meta holds no digests") from None
    program.say(f"{folder}: of an older version, without digests; taken unchecked")
    return {**meta, "progress": list(Progress(val_loss, val_loss, waited)), "leaves": None}


def _check_same_run(step: int, there: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [
        f"{k}: {there.get(k)!r} there, {now.get(k)!r} now"
        for k in _IDENTITY
        if there.get(k) != now.get(k)
    ]
    # Which other runs the study has, and how it trains them, makes no other run of this one.
    trees = [{k: v for k, v in m.get("config", {}).items() if k != "study"} for m in (there, now)]
    changed += configs.differences(*trees)
    if changed:
        lines = "\n  ".join(changed)
        raise ValueError(
            f"checkpoints: step {step} belongs to another run:\n  {lines}\n"
            "Use another --workdir, or what the run began with."
        )


def _check_leaves(step: int, meta: dict[str, Any], items: dict[str, Any]) -> None:
    """Other shapes or dtypes are another run's, not damage; Orbax would cast dtypes silently."""
    if meta["leaves"] is None:
        return
    found = {k: v.rpartition(" ")[0] for k, v in meta["leaves"].items()}
    flat = jax.tree_util.tree_flatten_with_path(items)[0]
    expected = {digest.leaf_name(path): digest.describe(leaf) for path, leaf in flat}
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"checkpoints: step {step}, {name}: got {found.get(name)}, expected "
                f"{expected.get(name)}. It is a run with other trained weights: use another "
                "--workdir."
            )


def _check_digests(step: int, meta: dict[str, Any], items: dict[str, Any]) -> None:
    if meta["leaves"] is None:
        return
    for name, found in digest.digests(items).items():
        if found != meta["leaves"].get(name, "").rpartition(" ")[2]:
            raise Broken(f"step {step}: {name} is not what was saved")


def _read_trained(step_folder: Path) -> Flat:
    """To numpy: the devices it was saved from need not be there."""
    handler = ocp.StandardCheckpointHandler()
    with ocp.Checkpointer(handler) as reader:
        try:
            # Not the reader's own `metadata`, which warns that an item alone is no checkpoint.
            saved = handler.metadata(step_folder / "trained").tree
            like = {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in saved.items()}
            return reader.restore(step_folder / "trained", args=ocp.args.StandardRestore(like))
        except RuntimeError:
            raise
        except Exception as e:
            raise Broken(f"step {step_folder.name}: {_unreadable('trained', {}, e)}") from None


def _unreadable(item: str, tree: Any, e: Exception) -> str:
    """Names the leaf where the error's text holds its name, as Orbax writes it (with dots)."""
    e = e.__cause__ if isinstance(e.__cause__, Exception) else e
    paths = [digest.leaf_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    hit = [path for path in paths if path in str(e) or path.replace("/", ".") in str(e)]
    leaf = f"/{max(hit, key=len)}" if hit else ""
    return f"{item}{leaf}: cannot be read ({_first_line(e)})"


def _first_line(e: BaseException) -> str:
    text = str(e).strip() or type(e).__name__
    # The last clause of a chained tensorstore message says what happened.
    line = text.splitlines()[0]
    return line if len(line) <= 300 else f"{line[:140]} … {line[-140:]}"


def _step_folders(folder: Path) -> list[Path]:
    found = [p for p in folder.glob("*") if p.is_dir() and p.name.isdigit()]
    return sorted(found, key=lambda p: int(p.name))


def _quarantine(folder: Path, why: Broken) -> None:
    target, n = folder.with_name(f"{folder.name}.broken"), 1
    while target.exists():
        target, n = folder.with_name(f"{folder.name}.broken{n}"), n + 1
    folder.rename(target)
    program.say(f"checkpoints: {why}. Set aside as {target.name}; the step before it is used.")
