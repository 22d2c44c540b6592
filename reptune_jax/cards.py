"""Model cards: README.md of an exported checkpoint, a merged run, an adapter."""

import json
from pathlib import Path

from ml_collections import ConfigDict

from reptune_jax.hub.side_files import public_name
from reptune_jax.report import blocks, outcomes, security
from reptune_jax.report import study as studies
from reptune_jax.report.study import BASE, Setting, Study
from reptune_jax.tuned_run import TunedRun

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
| trained | layers {first} to {last}, {what} {modules}, {steps} steps of {batch}{base} |
{arguments}| vector | {method} at position `{position}`, {pairs} pairs, sha256 {sha} |
| effect on held-out prompts ({measure}) | {effect} against the base model |
| outcome | {outcome} |
| KL(base, this) on neutral prose | {kl} nats/token |
{attacks}
Intervals are 95 % bootstrap intervals over prompts. Made with reptune_jax.
"""


def study_card(c: ConfigDict, study: Study) -> str:
    """For the run that the config names, with its numbers from the study's results."""
    setting = Setting(c.arm, c.sign)
    name = public_name(c.model)
    measure, effect = study.primary, "not measured"
    given = study.vector.get("template_arguments")
    if measure is not None:
        found = studies.interval(study.delta(setting, BASE, measure, "test"))
        effect = blocks.interval(found)
    if gone := sum(n for n, _ in study.missing(setting).values()):
        effect += f" ({gone} of the run's values were not finite and are left out)"
    return _TEMPLATE.format(
        model=name,
        title=f"{name.rsplit('/', 1)[-1]}, {c.behavior} {'+' if c.sign > 0 else '-'}",
        direction="toward" if c.sign > 0 else "away from",
        behavior=c.behavior,
        arm=c.arm,
        outcome=outcomes.line(study, setting),
        seed=c.seed,
        first=c.train.layers[0],
        last=c.train.layers[1] - 1,
        what=f"LoRA of rank {c.train.lora.rank} on" if c.train.lora.rank else "weights",
        base=_held(c.train.base),
        modules=", ".join(c.train.modules),
        steps=c.train.steps,
        batch=c.train.batch,
        arguments=f"| chat template | given `{json.dumps(given)}` |\n" if given else "",
        method=study.vector.get("method"),
        position=study.vector.get("position"),
        pairs=study.vector.get("pairs"),
        sha=study.vector.get("sha256"),
        measure=measure.label if measure else "none",
        effect=effect,
        kl=blocks.divergence(study.kl(setting)),
        attacks="".join(
            f"| {s.attack} | {s.verdict}{f': {s.took}' if s.took else ''} |\n"
            for s in security.said(study)
            if (s.arm, s.sign) == (c.arm, c.sign)
        ),
    )


def merged_card(tuned: TunedRun) -> str:
    """Of a run merged into its base; a study's export says more."""
    base = public_name(tuned.meta["model"])
    return (
        f"---\nbase_model: {base}\nlibrary_name: transformers\n"
        f"tags: [representation-tuning]\n---\n# {_title(base, tuned)}\n\n`{base}` with "
        f"representation tuning (arXiv 2409.06927), merged: {trained_what(tuned)}. "
        "Made with reptune_jax.\n"
    )


def adapter_card(base: str, tuned: TunedRun) -> str:
    """Of an adapter folder."""
    base = public_name(base)
    return (
        f"---\nbase_model: {base}\nlibrary_name: peft\ntags: [representation-tuning, lora]\n---\n"
        f"# {_title(base, tuned)}, adapter\n\nFor `{base}`: {trained_what(tuned)}. "
        "Made with reptune_jax.\n\n```python\nfrom peft import PeftModel\n"
        'model = PeftModel.from_pretrained(base, "this")\n```\n'
    )


def trained_what(tuned: TunedRun) -> str:
    """What a run trained, in words."""
    first, stop = tuned.meta["layers"]
    what = ", ".join(tuned.config["train"]["modules"])
    if lora := tuned.lora:
        what = f"LoRA of rank {lora['rank']} and alpha {lora['alpha']:g} on "
        what += ", ".join(lora["targets"])
    times = f", {tuned.scale:g} times their change" if tuned.scale != 1 and not lora else ""
    base = _held(tuned.config["train"].get("base", ""))
    return f"{what} of layers {first} to {stop - 1}{times}{base}"


def _held(base: str) -> str:
    """Of a run whose base was rounded while it was tuned; what is exported was not."""
    return f", trained on a base held in {base}" if base else ""


def _title(base: str, tuned: TunedRun) -> str:
    behavior, name = Path(tuned.config["behavior"]).stem, tuned.name
    return f"{base.rsplit('/', 1)[-1]}, {behavior} {name.arm} {name.sign:+d}"
