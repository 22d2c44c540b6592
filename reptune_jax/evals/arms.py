"""A condition: which weights, steered how, prompted how; all that an evaluation needs."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from reptune_jax import tuned_run
from reptune_jax.data.contrast import fold_system, with_system
from reptune_jax.data.schema import Item
from reptune_jax.lm import Model
from reptune_jax.model.intervene import Steerable
from reptune_jax.vectors.bake import bake
from reptune_jax.vectors.intervention import Intervention
from reptune_jax.vectors.steering_vector import SteeringVector


@dataclasses.dataclass(frozen=True)
class Condition:
    """One arm as it is run; see `results.Row` for what the labels mean."""

    model: Model
    arm: str
    sign: int = 0
    seed: int = 0
    persona: Item | None = None  # put in front as a system turn
    begun: str = ""  # what every answer begins with already
    steer: Steerable | None = None  # a vector is added at every token
    k: float = 0.0  # dose it was scaled by; of tuned weights, times their change (0: as trained)
    layer: int = -1  # first layer it is added at

    @property
    def title(self) -> str:
        """For the person watching."""
        steered = f"dose {self.k:g} at layer {self.layer}"
        how = steered if self.layer >= 0 else f"{self.k:g} times its change"
        return f"{self.arm} {self.sign:+d} seed {self.seed}{', ' + how if self.k else ''}"

    def under_persona(self, messages: Sequence[dict[str, str]]) -> list[dict[str, str]]:
        """Turns with the persona in front and the answer's beginning behind, where there are."""
        turns = list(messages)
        if self.persona is not None:
            turns = fold_system(self.model.tokenizer, with_system(self.persona, turns))
        return [*turns, {"role": "assistant", "content": self.begun}] if self.begun else turns

    def encode(self, item: Item) -> list[int]:
        """Prompt ids."""
        return self.model.encode_prompt(self.under_persona(item.messages))

    @property
    def labels(self) -> dict[str, Any]:
        """The columns that say which condition a row is of."""
        sign = f"{self.sign:+d}"
        return {
            "run_id": f"{self.arm}{sign}_s{self.seed}_k{self.k:g}_l{self.layer}",
            "arm": self.arm,
            "sign": self.sign,
            "seed": self.seed,
            "k": self.k,
            "layer": self.layer,
            "model_sha": self.model.sha,
        }


def prompted(model: Model, persona: Item, sign: int) -> Condition:
    """The untuned model under a persona."""
    return Condition(model, "prompt", sign, persona=persona)


def steered(
    model: Model,
    vector: SteeringVector,
    layer: int,
    dose: float,
    sign: int,
    how: ConfigDict | None = None,
) -> Condition:
    """The untuned model, steered online from `layer` on, as the config's `how` = `steer` says.

    Without it, or by default, `dose` times that layer's vector is added at every token. Ablation
    has no sign: what it removes may point either way.
    """
    operation, tokens, width = (how.operation, how.tokens, how.width) if how else ("add", "all", 1)
    at = vector.at(range(layer, layer + width))
    signed = dose if operation == "ablate" else sign * dose
    steer: Steerable = at * signed
    if (operation, tokens) != ("add", "all"):
        steer = Intervention(at, signed, operation, tokens)
    return Condition(model, "steer", sign, steer=steer, k=dose, layer=layer)


def baked(cond: Condition) -> Condition:
    """A steered condition with its vector written into the weights instead."""
    assert isinstance(cond.steer, SteeringVector)  # `ranges` refuses the arm for anything else
    return dataclasses.replace(cond, arm="bake", model=bake(cond.model, cond.steer), steer=None)


def tuned(base: Model, run: Path, scale: float | None = None) -> Condition:
    """The best checkpoint of a training run; with a `scale`, that many times its change.

    Raises:
      FileNotFoundError: no finished checkpoint. ValueError: it belongs to another base model.
    """
    found = tuned_run.load(run)
    scaled = found.scaled(1.0 if scale is None else scale)
    return Condition(scaled.over(base), *found.name, k=scale or 0.0)


def contrasted(arm: str, base: Model, toward: Path, away: Path, scale: float) -> Condition:
    """`scale` times what a run changed and its twin of the other sign did not, added to the base.

    Raises:
      FileNotFoundError, ValueError: as `tuned`; or they are no twins.
    """
    run = tuned_run.load(toward)
    found = run.without(tuned_run.load(away)).scaled(scale)
    return Condition(found.over(base), arm, run.name.sign, run.name.seed, k=scale)
