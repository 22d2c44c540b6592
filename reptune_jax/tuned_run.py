"""A tuned run as a thing: its best checkpoint, whose weights it changes, and those weights changed.

A step's folder holds the trained weights, the rest of the state, and `meta`: what the run is, how
far it had come, and a digest of every leaf. Orbax restores flipped bytes without a word and takes
an empty folder for a step, so nothing is used before its digests agree (`tuning.checkpoint` writes
what is read here).
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from reptune_jax.console import say
from reptune_jax.folder import Run, RunName
from reptune_jax.hub import digest
from reptune_jax.hub.names import table
from reptune_jax.hub.rounding import Rounding
from reptune_jax.hub.safetensors_io import TensorHandle
from reptune_jax.lm import Model
from reptune_jax.model import lora
from reptune_jax.model.arch import Arch
from reptune_jax.model.lora import Flat


class Progress(NamedTuple):
    """How far a run had come when a step was saved."""

    val_loss: float | None = None  # of this step; None where it was not measured
    best: float | None = None  # lowest validation loss up to this step
    waited: int = 0  # evaluations since then
    seconds: float = 0.0  # of training, over all restarts


class Broken(Exception):
    """A checkpoint that cannot be used; says which step, which leaf, and why."""


@dataclasses.dataclass(frozen=True)
class TunedRun:
    """What a run trained, of which base, and with what config."""

    folder: Path
    trained: Flat
    meta: dict[str, Any]
    step: int
    scale: float = 1.0  # how many times its change is put in
    less: "TunedRun | None" = None  # whose change is taken out of its own first

    @property
    def config(self) -> dict[str, Any]:
        return self.meta["config"]

    @property
    def name(self) -> RunName:
        return RunName(self.config["arm"], self.config["sign"], self.config["seed"])

    @property
    def lora(self) -> dict[str, Any] | None:
        """Rank, alpha and targets of its adapters; None where whole weights were trained."""
        about = self.meta.get("lora")
        return about and {**about, "alpha": self.scale * about["alpha"]}

    @property
    def kernels(self) -> list[str]:
        """Paths of the weights that it changes, within a block."""
        return [f"{path}/kernel" for path in self.lora["targets"]] if self.lora else [*self.trained]

    def tensor_names(self, family: str) -> set[str]:
        """What it changes: our leaves, and the Hugging Face tensors."""
        first, stop = self.meta["layers"]
        ours = {f"blocks/{path}" for path in self.kernels}
        theirs = (table(family)[path].hf for path in ours)
        return ours | {hf.format(l=l) for hf in theirs for l in range(first, stop)}

    def scaled(self, scale: float) -> "TunedRun":
        """The dial: base + scale x (tuned - base)."""
        return dataclasses.replace(self, scale=scale)

    def without(self, other: "TunedRun") -> "TunedRun":
        """base + scale x (this - `other`): contrastive weight steering (arXiv 2511.05408).

        Raises:
          ValueError: they are runs of different models, or changed different weights.
        """
        ours, theirs = ((r.meta["model_sha"], r.meta["layers"], r.kernels) for r in (self, other))
        if ours != theirs:
            raise ValueError(
                f"{other.folder}: changed {theirs}, got {ours} of {self.folder}, expected the same "
                "model, layers and weights. Take two runs of one study."
            )
        return dataclasses.replace(self, less=other)

    def tuned(self, kernel: str, before: Any, layers: slice = slice(None)) -> Any:
        """A kernel of some of the tuned layers, of which `before` is the base's; float32 [L, ...].

        With a scale of 1 whole weights are those that were trained, to the bit.
        """
        if self.scale == 1 and not self.less and not self.lora:
            return self.trained[kernel][layers].astype(np.float32)
        change = self._change(kernel, before, layers)
        if self.less:
            change = change - self.less._change(kernel, before, layers)
        return before + self.scale * change

    def _change(self, kernel: str, before: Any, layers: slice) -> Any:
        if not self.lora:
            return self.trained[kernel][layers].astype(np.float32) - before
        path, about = kernel.removesuffix("/kernel"), self.meta["lora"]
        a, b = (self.trained[f"{path}/{leaf}"][layers] for leaf in (lora.A, lora.B))
        return lora.delta(a, b, about["alpha"] / about["rank"])

    def over(self, base: Model) -> Model:
        """The base with this run's weights, or its adapters, put in.

        Raises:
          ValueError: it was tuned from another model.
        """
        self.check_base(base.sha, base.name, "Load the model it was tuned from.")
        first, stop = self.meta["layers"]
        flat = traverse_util.flatten_dict(base.params, sep="/")
        rounding = Rounding(base.dtype)
        for path in self.kernels:
            whole = flat[f"blocks/{path}"]
            before = whole[first:stop].astype(jnp.float32)
            tuned = jnp.asarray(self.tuned(path, before))
            stored = tuned.astype(whole.dtype)
            rounding.add(before, tuned - before, stored)
            flat[f"blocks/{path}"] = whole.at[first:stop].set(stored)
        rounding.report(self.folder)
        return dataclasses.replace(base, params=traverse_util.unflatten_dict(flat, sep="/"))

    def over_leaves(
        self, leaves: Mapping[str, TensorHandle], dtype: Any, rounding: Rounding
    ) -> dict[str, TensorHandle]:
        """The same for weights that are read one leaf at a time, cast to `dtype` after the change.

        Nothing is read yet; `dtype` None keeps each leaf's own.
        """
        first, stop = self.meta["layers"]
        changed = {f"blocks/{path}": path for path in self.kernels}

        def put(name: str, leaf: TensorHandle) -> TensorHandle:
            to = np.dtype(dtype or leaf.dtype)

            def read() -> np.ndarray:
                whole = leaf.read()
                out = whole.astype(to, copy=False)
                for l in range(first, stop) if name in changed else ():
                    path, before = changed[name], whole[l].astype(np.float32)
                    one = slice(l - first, l - first + 1)
                    tuned = np.asarray(self.tuned(path, before[None], one)[0], np.float32)
                    stored = tuned.astype(to)
                    rounding.add(out[l], tuned - before, stored)
                    out[l] = stored
                return out

            return TensorHandle(leaf.shape, to, read)

        return {name: put(name, leaf) for name, leaf in leaves.items()}

    def check_leaves(self, name: str, arch: Arch, leaves: Mapping[str, TensorHandle]) -> None:
        """`check_base` for weights that are read one leaf at a time."""
        table_64xD = leaves["embed/embedding"].read()[:64].copy()  # a view would keep the whole
        sha = digest.weights_sha(arch, leaves["final_norm/scale"].read(), table_64xD)
        self.check_base(sha, name, "Name it with --base.")

    def check_base(self, sha: str, name: str, advice: str) -> None:
        """Raises ValueError where it was tuned from other weights than these."""
        if sha != self.meta["model_sha"]:
            raise ValueError(
                f"{self.folder}: tuned from {self.meta['model']} ({self.meta['model_sha']}), got "
                f"base {name} ({sha}), expected the same. {advice}"
            )


def load(folder: Path) -> TunedRun:
    """The checkpoint of a run with the lowest validation loss.

    Raises:
      FileNotFoundError: the folder holds no finished checkpoint. ValueError: it is damaged.
    """
    steps = Run(folder).checkpoints
    if not steps.is_dir():
        raise FileNotFoundError(
            f"{steps}: no checkpoints there. Run `train` with this --workdir first."
        )
    try:
        metas = {int(f.name): read_meta(f) for f in step_folders(steps)}
        step = best_step(metas)
        if step is None:
            raise FileNotFoundError(
                f"{steps}: no finished checkpoint there. Let `train` finish a save."
            )
        trained = _read_trained(steps / str(step))
        check_digests(step, metas[step], {"trained": trained})
    except Broken as e:
        raise ValueError(
            f"{steps}: {e}. The weights that would be measured are not those that were trained. "
            f"Delete {folder} and run `train` again."
        ) from None
    return TunedRun(folder, trained, metas[step], step)


def step_folders(folder: Path) -> list[Path]:
    """The steps of a run's `checkpoints`, in order."""
    found = [p for p in folder.glob("*") if p.is_dir() and p.name.isdigit()]
    return sorted(found, key=lambda p: int(p.name))


def best_step(metas: Mapping[int, dict[str, Any]]) -> int | None:
    """The step with the lowest validation loss, the earliest of several."""
    losses = {step: Progress(*meta["progress"]).val_loss for step, meta in metas.items()}
    measured = {step: loss for step, loss in losses.items() if loss is not None}
    return min(sorted(measured), key=measured.__getitem__) if measured else None


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
    except (ValueError, OSError, KeyError, RecursionError) as e:
        raise Broken(f"step {step}: meta cannot be read ({first_line(e)})") from None
    if not isinstance(meta, dict) or "seal" not in meta:
        return _old_meta(folder, meta)
    if meta["seal"] != seal(meta)["seal"]:
        raise Broken(f"step {step}: meta is not what was saved")
    if str(meta["step"]) != step:
        raise Broken(f"step {step}: the folder holds step {meta['step']}, under this name")
    return meta


def seal(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The meta as JSON keeps it, with a digest of itself."""
    plain = json.loads(json.dumps({k: v for k, v in meta.items() if k != "seal"}, default=list))
    text = json.dumps(plain, sort_keys=True)
    return {**plain, "seal": hashlib.sha256(text.encode()).hexdigest()}


def check_digests(step: int, meta: Mapping[str, Any], items: Mapping[str, Any]) -> None:
    """Raises Broken where a leaf is not the one that was saved."""
    if meta["leaves"] is None:
        return
    for name, found in digest.digests(items).items():
        if found != meta["leaves"].get(name, "").rpartition(" ")[2]:
            raise Broken(f"step {step}: {name} is not what was saved")


def unreadable(item: str, paths: list[str], e: Exception) -> str:
    """Names the leaf where the error's text holds its name, as Orbax writes it (with dots)."""
    e = e.__cause__ if isinstance(e.__cause__, Exception) else e
    hit = [path for path in paths if path in str(e) or path.replace("/", ".") in str(e)]
    leaf = f"/{max(hit, key=len)}" if hit else ""
    return f"{item}{leaf}: cannot be read ({first_line(e)})"


def first_line(e: BaseException) -> str:
    """The last clause of a chained tensorstore message says what happened, so both ends stay."""
    line = (str(e).strip() or type(e).__name__).splitlines()[0]
    return line if len(line) <= 300 else f"{line[:140]} … {line[-140:]}"


def _old_meta(folder: Path, meta: Any) -> dict[str, Any]:
    """Of a checkpoint from before there were digests: usable, and said to be unchecked."""
    try:
        metrics = json.loads((folder / "metrics" / "metrics").read_text())
        val_loss, waited = float(metrics["val_loss"]), int(metrics["waited"])
    except (OSError, ValueError, KeyError):
        raise Broken(f"step {folder.name}: meta holds no digests") from None
    say(f"{folder}: of an older version, without digests; taken unchecked")
    return {**meta, "progress": list(Progress(val_loss, val_loss, waited)), "leaves": None}


def _read_trained(step_folder: Path) -> Flat:
    """To numpy: the devices it was saved from need not be there."""
    handler = ocp.StandardCheckpointHandler()
    with ocp.Checkpointer(handler) as reader:
        try:
            # Not the reader's own `metadata`, which warns that an item alone is no checkpoint.
            saved = handler.metadata(step_folder / "trained").tree
            like = {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in saved.items()}
            return reader.restore(step_folder / "trained", args=ocp.args.StandardRestore(like))
        except RuntimeError:  # jax's own, such as a lack of memory: not the files' fault
            raise
        except Exception as e:  # Orbax raises bare ones
            raise Broken(f"step {step_folder.name}: {unreadable('trained', [], e)}") from None
