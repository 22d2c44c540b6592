"""The model card of an exported checkpoint: provenance, what it does, what it costs."""

from pathlib import Path

from ml_collections import ConfigDict

from reptune_jax.report import tables
from reptune_jax.report.study import BASE, Condition, Study, interval

_TEMPLATE = """---
base_model: {model}
library_name: transformers
tags: [representation-tuning]
---
# {title}

`{model}`, tuned {direction} **{behavior}** with representation tuning (arXiv 2409.06927): the
behavior vector is in the weights, so it needs no hook at inference.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("this/folder")
tokenizer = AutoTokenizer.from_pretrained("this/folder")
```

| what | value |
|---|---|
| arm, seed | {arm}, {seed} |
| trained | layers {first} to {last}, {what} {modules}, {steps} steps of {batch} |
| vector | {method} at position `{position}`, {pairs} pairs, sha256 {sha} |
| effect on held-out prompts ({measure}) | {effect} against the base model |
| KL(base, this) on neutral prose | {kl:.4f} nats/token |

Intervals are 95 % bootstrap intervals over prompts. Made with reptune_jax.
"""


def model_card(c: ConfigDict, study: Study) -> str:
    """For the run that the config names, with its numbers from the study's results."""
    cond = Condition(c.arm, c.sign)
    # A local path means nothing to who downloads the model, and says where it was made.
    name = Path(c.model).name if Path(c.model).exists() else c.model
    measure, effect = study.primary, "not measured"
    if measure is not None:
        found = interval(study.delta(cond, BASE, measure, "test"))
        effect = tables.interval(found)
    return _TEMPLATE.format(
        model=name,
        title=f"{name.rsplit('/', 1)[-1]}, {c.behavior} {'+' if c.sign > 0 else '-'}",
        direction="toward" if c.sign > 0 else "away from",
        behavior=c.behavior,
        arm=c.arm,
        seed=c.seed,
        first=c.train.layers[0],
        last=c.train.layers[1] - 1,
        what=f"LoRA of rank {c.train.lora.rank} on" if c.train.lora.rank else "weights",
        modules=", ".join(c.train.modules),
        steps=c.train.steps,
        batch=c.train.batch,
        method=study.vector.get("method"),
        position=study.vector.get("position"),
        pairs=study.vector.get("pairs"),
        sha=study.vector.get("sha256"),
        measure=measure.label if measure else "none",
        effect=effect,
        kl=study.kl(cond),
    )
