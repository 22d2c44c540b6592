"""Orbax behind one file: what is saved, and how a run resumes; `tuned_run` reads what it leaves.

A step that is damaged is renamed to `<step>.broken`, said so, and the one before it is used.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from reptune_jax import distributed, ending, roles
from reptune_jax.console import say
from reptune_jax.folder import Run, environment
from reptune_jax.hub import digest
from reptune_jax.tuned_run import (
    Broken,
    Progress,
    best_step,
    check_digests,
    first_line,
    read_meta,
    seal,
    step_folders,
    unreadable,
)
from reptune_jax.tuning.step import State

_ITEMS = ("trained", "rest", "meta")
_IDENTITY = ("model_sha", "vector")  # of another run if they differ, beside the config


class Checkpoints:
    """`workdir/checkpoints/<step>`. The newest `keep` steps stay, and the best one."""

    def __init__(self, workdir: Path, keep: int = 1):
        self.workdir = workdir
        self.folder = Run(workdir).checkpoints
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
        named = zip(digest.digests(items).items(), jax.tree.leaves(items), strict=True)
        leaves = {name: f"{digest.describe(a)} {d}" for (name, d), a in named}
        sealed = seal(
            {
                **meta,
                "step": step,
                "progress": list(progress),
                "leaves": leaves,
                "versions": environment()["versions"],
            }
        )
        args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        self.wait()  # Orbax would, and then nobody could tell whose error it is
        self._saving = step
        with self._reporting():
            saved = self._manager.save(
                step, args=ocp.args.Composite(**args, meta=ocp.args.JsonSave(sealed))
            )
        if not saved:
            raise ValueError(
                f"checkpoints: step {step} was not saved, because {self.folder} holds step "
                f"{self.latest()}, expected earlier ones only. Use another --workdir."
            )
        self._metas[step] = sealed

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
        self._saving = None

    def close(self) -> None:
        """Waits for saves under way."""
        self.wait()
        self._manager.close()

    def _read(self, step: int, items: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, tree in items.items():
            paths = [digest.leaf_name(p) for p, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
            error, args = "", ocp.args.Composite(**{name: ocp.args.StandardRestore(tree)})
            try:
                found[name] = self._manager.restore(step, args=args)[name]
            except RuntimeError:  # jax's own, such as a lack of memory: not the files' fault
                raise
            except Exception as e:  # Orbax raises bare ones
                error = unreadable(name, paths, e)
            # A host reads its own shards only, and all must come to the same verdict.
            if not distributed.everywhere(not error):
                raise Broken(f"step {step}: {error or 'another process could not read it'}")
        check_digests(step, self._metas[step], found)
        return found

    def _sound_metas(self) -> dict[int, dict[str, Any]]:
        """Sets aside what has no readable meta, before Orbax takes it for a step."""
        folders = step_folders(self.folder)

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
            full = "Free some space. " if ending.number_of(e) in ending.FULL else ""
            left = sorted(s for s in self._metas if s != failed and (self.folder / str(s)).exists())
            raise OSError(
                f"checkpoints: a save into {self.folder} failed ({first_line(e)}). Intact: steps "
                f"{', '.join(map(str, left)) or 'none'}. {full}The same command resumes."
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


def _items(state: State) -> dict[str, Any]:
    return {"trained": state.trained, "rest": {"step": state.step, "opt": state.opt}}


def _check_same_run(step: int, there: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [
        f"{k}: {there.get(k)!r} there, {now.get(k)!r} now"
        for k in _IDENTITY
        if there.get(k) != now.get(k)
    ]
    # Which other runs the study has, and how it trains them, makes no other run of this one.
    trees = [roles.without(m.get("config", {}), "study", "declared") for m in (there, now)]
    changed += roles.differences(*trees)
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


def _quarantine(folder: Path, why: Broken) -> None:
    target, n = folder.with_name(f"{folder.name}.broken"), 1
    while target.exists():
        target, n = folder.with_name(f"{folder.name}.broken{n}"), n + 1
    folder.rename(target)
    say(f"checkpoints: {why}. Set aside as {target.name}; the step before it is used.")
