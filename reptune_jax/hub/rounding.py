"""What of an update is left when it is merged into weights of 16 bits."""

from typing import Any

import jax.numpy as jnp

from reptune_jax import mesh as meshes
from reptune_jax.console import note


class Rounding:
    """Sums of squares over the merged leaves: update, change as stored, their difference."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = jnp.dtype(dtype)
        self.squares = [0.0, 0.0, 0.0]

    def add(self, before: Any, update: Any, stored: Any) -> None:
        """The weights before and after in the type that is stored, the update in float32."""
        if self.dtype.itemsize >= 4:
            return
        effect = stored.astype(jnp.float32) - before.astype(jnp.float32)
        for i, part in enumerate((update, effect, effect - update)):
            self.squares[i] += float(meshes.fetch((part * part).sum()))

    def report(self, name: Any) -> None:
        """One line; nothing for float32, or where nothing was to change."""
        update, effect, error = (square**0.5 for square in self.squares)
        if not update:
            return
        note(
            f"{name}: merged into {self.dtype}: the stored weights changed by "
            f"{effect / update:.0%} of the update's norm, and {error / update:.0%} of it is "
            "rounding error. Weights in float32 keep all of it."
        )
