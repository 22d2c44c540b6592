"""Orbax behind one file: what is saved, how a run resumes, what an evaluation reads."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from reptune_jax.tuning.partition import Flat
from reptune_jax.tuning.step import State


class Checkpoints:
    """`workdir/checkpoints/<step>`: the trained weights, the optimizer, and what they belong to.

    The newest `keep` steps stay, and the one with the lowest validation loss.
    """

    def __init__(self, workdir: Path, keep: int = 1):
        self.folder = workdir
        policy = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(n=max(keep, 1)),
                checkpoint_managers.BestN(get_metric_fn=lambda m: m["val_loss"], reverse=True, n=1),
            ]
        )
        self._manager = ocp.CheckpointManager(
            (workdir / "checkpoints").absolute(),
            item_names=("trained", "rest", "meta"),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy,
                best_fn=lambda m: m["val_loss"],
                best_mode="min",
                enable_async_checkpointing=True,
            ),
        )

    def save(self, state: State, meta: dict[str, Any], val_loss: float, waited: int) -> None:
        """Starts a save; the state may be donated to the next step at once."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            trained=ocp.args.StandardSave(state.trained),
            rest=ocp.args.StandardSave({"step": state.step, "opt": state.opt}),
            meta=ocp.args.JsonSave(meta),
        )
        self._manager.save(step, args=items, metrics={"val_loss": val_loss, "waited": waited})

    def restore(self, like: State) -> State | None:
        """The newest state, laid out as `like`; None where nothing has been saved."""
        step = self._manager.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        items = self._manager.restore(
            step,
            args=ocp.args.Composite(
                trained=ocp.args.StandardRestore(abstract.trained),
                rest=ocp.args.StandardRestore({"step": abstract.step, "opt": abstract.opt}),
            ),
        )
        return State(items["rest"]["step"], items["trained"], items["rest"]["opt"])

    def latest(self) -> int | None:
        """The step that `restore` restores."""
        return self._manager.latest_step()

    def progress(self) -> tuple[float | None, int]:
        """(lowest validation loss, evaluations without a lower one) up to the newest checkpoint."""
        best, latest = self._manager.best_step(), self._manager.latest_step()
        if best is None or latest is None:
            return None, 0
        waited = int(self._manager.metrics(latest)["waited"])
        return float(self._manager.metrics(best)["val_loss"]), waited

    def wait(self) -> None:
        """Returns when the saves under way are on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for saves under way."""
        self.wait()
        self._manager.close()


def load_best(workdir: Path) -> tuple[Flat, dict[str, Any], int]:
    """(trained leaves, meta, step) of the checkpoint with the lowest validation loss.

    Raises:
      FileNotFoundError: the folder holds no finished checkpoint.
    """
    folder = (workdir / "checkpoints").absolute()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no checkpoints there. Run `train` with this --workdir first."
        )
    options = ocp.CheckpointManagerOptions(best_fn=lambda m: m["val_loss"], best_mode="min")
    handlers = {
        "trained": ocp.StandardCheckpointHandler(),
        "rest": ocp.StandardCheckpointHandler(),  # not read here, but an unknown item warns
        "meta": ocp.JsonCheckpointHandler(),
    }
    with ocp.CheckpointManager(folder, item_handlers=handlers, options=options) as manager:
        step = manager.best_step()
        if step is None:
            raise FileNotFoundError(
                f"{folder}: no finished checkpoint there. Let `train` finish a save."
            )
        # To numpy: the devices it was saved from need not be there.
        saved = manager.item_metadata(step)["trained"].tree
        like = {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in saved.items()}
        items = manager.restore(
            step,
            args=ocp.args.Composite(
                trained=ocp.args.StandardRestore(like), meta=ocp.args.JsonRestore()
            ),
        )
    return items["trained"], items["meta"], step


def finished(workdir: Path) -> bool:
    """Whether training in this folder ran to its end (or stopped early on purpose)."""
    return (workdir / "done.json").exists()


def mark_finished(workdir: Path, about: dict[str, Any]) -> None:
    """The last thing a training run writes."""
    scratch = workdir / "done.json.tmp"
    scratch.write_text(json.dumps(about) + "\n")
    scratch.replace(workdir / "done.json")
