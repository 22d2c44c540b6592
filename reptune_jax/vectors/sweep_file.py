"""The file in which a sweep keeps the prompts that are done: the same one goes on from it."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reptune_jax import distributed, ending
from reptune_jax.hub.safetensors_io import save_file
from reptune_jax.reading import reading
from reptune_jax.vectors.own_file import open_tensors

FORMAT = "reptune_jax.sweep.1"
_EVERY_S = 30.0


class Kept:
    """Log-probabilities by prompt, of those that are done: `rows`, each [cells, 2]."""

    def __init__(self, path: Path | None, about: Mapping[str, Any], prompts: Sequence[Any]):
        """Reads `path`, if there is one; `about` is what else a row depends on than its prompt.

        Raises:
          ValueError: no .safetensors, a damaged one, or one of another sweep: naming in what.
        """
        self.path, self.rows = path, list[np.ndarray]()
        self.about = {"format": FORMAT} | {name: json.dumps(value) for name, value in about.items()}
        self.prompts = [hashlib.sha256(json.dumps(p).encode()).hexdigest()[:16] for p in prompts]
        if path is not None and path.suffix != ".safetensors":
            raise ValueError(f"keep: got {str(path)!r}, expected a file ending in .safetensors.")
        if path is not None and path.exists():
            self._read(path)
        distributed.same(sweep=f"{len(self.rows)} prompts done")
        self._wrote, self._last = len(self.rows), time.monotonic()

    def _read(self, path: Path) -> None:
        instead = "Name a new file, or delete this one."
        tensors, found = open_tensors(path)
        with reading(path, instead):
            prompts = json.loads(found.get("prompts", "[]"))
            rows = tensors.get("logp", np.zeros(0))
            other = [name for name, text in self.about.items() if found.get(name) != text]
            if prompts != self.prompts[: len(prompts)]:
                other.append("prompts")
            if other or rows.ndim != 3 or len(rows) != len(prompts):
                raise ValueError(
                    f"{path}: got other {', '.join(other) or 'tensors'}, expected the sweep that "
                    f"is asked for. {instead}"
                )
        self.rows.extend(rows)

    def add(self, logp_Cx2: np.ndarray) -> None:
        """One more prompt; writes every half minute."""
        self.rows.append(logp_Cx2)
        if time.monotonic() - self._last > _EVERY_S:
            self.write()

    def write(self) -> None:
        """The first process writes, and does not wait for others: they may be ending."""
        if self.path is not None and len(self.rows) > self._wrote and distributed.is_first():
            prompts = json.dumps(self.prompts[: len(self.rows)])
            with ending.whole(self.path) as scratch:
                save_file({"logp": np.stack(self.rows)}, scratch, self.about | {"prompts": prompts})
        self._wrote, self._last = len(self.rows), time.monotonic()
