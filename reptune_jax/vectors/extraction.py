"""Contrastive data to a behavior vector, and the texts that tuning will learn from."""

import hashlib
import json
import math
import os
from pathlib import Path

from ml_collections import ConfigDict

from reptune_jax import distributed, program
from reptune_jax.data.schema import Item, load_behavior, select
from reptune_jax.data.tuning import Answer, answer_row
from reptune_jax.lm import Model
from reptune_jax.vectors import answers, claims
from reptune_jax.vectors.capture import sum_pairs
from reptune_jax.vectors.methods import METHODS
from reptune_jax.vectors.steering_vector import SteeringVector


def run(c: ConfigDict, workdir: Path, model: Model | None = None) -> SteeringVector:
    """Makes, or loads, the work folder's vector and targets."""
    program.claim_study(workdir, c)
    paths = workdir / "vector.safetensors", workdir / "targets.jsonl"
    items = load_behavior(c.behavior)
    distributed.same(behavior=hashlib.sha256(repr(items).encode()).hexdigest()[:16])
    if not distributed.exists(paths[0]):
        model = model or program.load_model(c)
        vector = make_vector(c, model, items)
        distributed.once(lambda: vector.save(paths[0]))
        program.say(f"vector: {vector.meta['pairs']} pairs, digest {vector.digest} -> {paths[0]}")
    vector = SteeringVector.load(paths[0])
    if not distributed.exists(paths[1]) and select(items, format="free"):
        model = model or program.load_model(c)
        targets = make_targets(c, model, items, vector)
        distributed.once(lambda: write_jsonl(paths[1], targets))
        program.say(f"targets: personas' own answers -> {paths[1]}")
    return vector


def make_vector(c: ConfigDict, model: Model, items: list[Item]) -> SteeringVector:
    """Captures both classes and takes the mean difference; unit length if the config says so."""
    if select(items, format="free"):
        positives, negatives = _free_spans(c, model, items)
    else:
        positives, negatives = claims.spans(c.vector, model, items)
    sums = sum_pairs(model, positives, negatives, c.eval.batch // 2)
    meta = {
        "model": model.name,
        "model_sha": model.sha,
        "behavior": c.behavior,
        "position": c.vector.position,
        "template": program.template_sha(model),
        "correct_only": c.vector.correct_only,
    }
    vector = METHODS[c.vector.method](sums, meta)
    return vector.unit() if c.vector.norm == "unit" else vector


def make_targets(
    c: ConfigDict, model: Model, items: list[Item], vector: SteeringVector
) -> list[Answer]:
    """Both personas' answers to the tuning and validation prompts, steered if `targets.dose`."""
    out = []
    for sign in answers.SIGNS:
        dose = sign * c.targets.dose
        steer = vector.at(c.targets.layers) * dose if dose else None
        for split in ("tune", "val"):
            limit = c.targets.prompts if split == "tune" else c.eval.val_prompts
            prompts = select(items, split=split, format="free")[: limit or None]
            out += answers.write_answers(
                model,
                items,
                prompts,
                sign,
                c.vector.answer_tokens,
                steer,
                c.eval.batch,
                score=c.targets.keep < 1,
            )
    return out


def read_targets(path: Path) -> list[Answer]:
    """Reads targets.jsonl."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        Answer(**row | {"odds": math.nan if row["odds"] is None else row["odds"]}) for row in rows
    ]


def write_jsonl(path: Path, rows: list[Answer]) -> None:
    """Atomically."""
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text("".join(json.dumps(answer_row(row)) + "\n" for row in rows))
    os.replace(scratch, path)


def _free_spans(c: ConfigDict, model: Model, items: list[Item]):
    prompts = select(items, split="train", format="free")[: c.vector.pairs]
    sides = []
    for sign in answers.SIGNS:
        written = answers.write_answers(
            model,
            items,
            prompts,
            sign,
            c.vector.answer_tokens,
            batch_size=c.eval.batch,
            score=c.vector.correct_only,
        )
        program.say(f"persona {sign:+d}, e.g.: {written[0].text!r}")
        sides.append((written, sign))
    if c.vector.correct_only:  # keep pairs in which both answers fit their own persona better
        fits = [a.odds > 0 and b.odds > 0 for a, b in zip(sides[0][0], sides[1][0], strict=True)]
    else:
        fits = [True] * len(prompts)
    if not any(fits):
        raise ValueError(
            "vector.correct_only: no pair passed, expected at least one. Set it to False."
        )
    keep = [i for i, fit in enumerate(fits) if fit]
    spans = [
        answers.answer_spans(model, items, prompts, written, c.vector.position)
        for written, _ in sides
    ]
    return [spans[0][i] for i in keep], [spans[1][i] for i in keep]
