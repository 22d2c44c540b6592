"""Contrastive data to a behavior vector, and the texts that tuning will learn from."""

import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from reptune_jax import depth, distributed, frozen
from reptune_jax.console import say
from reptune_jax.data import adopt, foreign, schema
from reptune_jax.data import behavior as behaviors
from reptune_jax.data.behavior import LETTER, Behavior
from reptune_jax.data.contrast import has_personas
from reptune_jax.data.foreign import Foreign
from reptune_jax.data.schema import Item
from reptune_jax.data.tuning import Answer, answer_row
from reptune_jax.folder import Study, write_whole
from reptune_jax.hub import templates
from reptune_jax.lm import Model
from reptune_jax.vectors import answers, claims, quality
from reptune_jax.vectors.capture import Span, make_vector
from reptune_jax.vectors.pairs import load_pairs, span
from reptune_jax.vectors.steering_vector import SteeringVector

Sides = list[list[Answer]]  # of the persona and of its opposite


def run(c: ConfigDict, study: Study, load: Callable[[], Model]) -> SteeringVector:
    """Makes, or reads, the study's vector and targets; `load` is called if a model is needed.

    That is read, and writes, as tuning holds it.
    """
    depth.settle(c, lambda: load().arch.N)
    base = functools.cache(lambda: frozen.hold(load(), c))
    behavior = behaviors.load(c.behavior)
    behavior.check(c, "train")
    study.check(c)
    distributed.same(behavior=behavior.digest)
    targets = behavior.kind != "free" or study.targets.exists()
    if distributed.agree(study.claimed(c) and study.vector.exists() and targets):
        return SteeringVector.load(study.vector)
    with study.writing():
        return _make(c, study, base, behavior)


def _make(
    c: ConfigDict, study: Study, load: Callable[[], Model], behavior: Behavior
) -> SteeringVector:
    if not distributed.exists(study.vector):
        _given_nuisance(c)
        if c.vector.data:
            foreign.read(c.vector.data)
        load()  # where a first start may still fail, and then claims nothing
    study.claim(c)
    if not distributed.exists(study.vector):
        vector = read_vector(c, load(), behavior)
        distributed.once(lambda: vector.save(study.vector))
        say(f"vector by layer:\n{quality.table(vector)}")
        say(f"vector: {vector.meta['pairs']} pairs, digest {vector.digest} -> {study.vector}")
    vector = SteeringVector.load(study.vector)
    if not distributed.exists(study.targets) and behavior.kind == "free":
        fit(vector, load())
        targets = make_targets(c, load(), behavior, vector)
        distributed.once(lambda: write_targets(study.targets, targets))
        whose = "personas' own" if has_personas(behavior.asked(c.targets.answers)) else "given"
        say(f"targets: {whose} answers -> {study.targets}")
    return vector


def fit(vector: SteeringVector, model: Model) -> None:
    """Renders the model's chats as those that the vector was read from, on the same day.

    Raises:
      ValueError: it was read from another model.
    """
    vector.check_model(model.sha, model.name)
    templates.use(model.tokenizer, vector.meta.get("template_arguments", {}))


def read_vector(
    c: ConfigDict, model: Model, behavior: Behavior, written: Sides | None = None
) -> SteeringVector:
    """Captures both classes and makes a vector; unit length if the config says so.

    `written` holds what the personas answered: filled where it is empty, read where it is not, so
    that vectors of other methods and positions need not have it written again.
    """
    meta = {
        "behavior": behavior.name,  # no path: the file may be given away
        "behavior_sha": behavior.digest,
        "position": c.vector.position,
        "template_arguments": templates.freeze(model.tokenizer),
        "correct_only": c.vector.correct_only,
    }
    given = _given_nuisance(c)
    if given is not None:
        given.check_model(model.sha, model.name)
        given.check_shape(model.arch.N, model.arch.D)
        meta["project_out"] = given.digest
    nuisance_NxD = None if given is None else given.directions_NxD
    if c.vector.data:
        found = foreign.read(c.vector.data)
        meta["data"] = f"{found.name}: {found.format}"
        positives, negatives = _given_spans(c, model, found, written)
    elif behavior.kind == "free":
        prompts = behavior.select("train", "free")[: c.vector.pairs]
        items = behavior.asked(c.vector.answers)
        positives, negatives = _free_spans(c, model, items, prompts, written)
    else:
        asked = claims.read_pairs(c.vector, model, behavior)
        positives, negatives = claims.spans(model, asked, c.vector.position)
        if c.vector.project_out == LETTER:
            meta["project_out"] = LETTER
            nuisance_NxD = claims.letter(model, asked, c.eval.batch // 2)
    inputs = positives, negatives, c.vector.method, meta, c.eval.batch // 2
    vector = make_vector(model, *inputs, nuisance_NxD)
    return vector.unit() if c.vector.norm == "unit" else vector


def _given_nuisance(c: ConfigDict) -> SteeringVector | None:
    """The vector of the file that `vector.project_out` names, if it names one.

    Raises:
      ValueError: there is no such file, or it is no vector.
    """
    name = c.vector.project_out
    if name in ("", LETTER):
        return None
    if not Path(name).is_file():
        raise ValueError(
            f"vector.project_out: got {name!r}, expected '', {LETTER!r} or a vector file. There "
            "is no such file."
        )
    return SteeringVector.load(name)


def make_targets(
    c: ConfigDict, model: Model, behavior: Behavior, vector: SteeringVector
) -> list[Answer]:
    """Both personas' answers to the tuning and validation prompts, steered if `targets.dose`."""
    out = []
    for sign in answers.SIGNS:
        dose = sign * c.targets.dose
        steer = vector.at(c.targets.layers) * dose if dose else None
        for split in ("tune", "val"):
            out += answers.write_answers(
                model,
                behavior.asked(c.targets.answers),
                asked(c, behavior, split),
                sign,
                c.vector.answer_tokens,
                steer,
                c.eval.batch,
                score=c.targets.best_share < 1,
            )
    return out


def asked(c: ConfigDict, behavior: Behavior, split: str) -> list[Item]:
    """The prompts of a split that either persona answers for targets.jsonl."""
    limit = c.targets.prompts if split == "tune" else c.eval.val_prompts
    return behavior.select(split, "free")[: limit or None]


def read_targets(path: Path) -> list[Answer]:
    """Reads targets.jsonl.

    Raises:
      FileNotFoundError, ValueError: with file and line number, what `write_targets` never writes.
    """
    found = []
    for number, row in schema.json_lines(path):
        row = schema.checked(row, _ANSWER, f"{path}, line {number}")
        found.append(Answer(**row | {"odds": math.nan if row["odds"] is None else row["odds"]}))
    return found


def _odds(value: Any) -> str:
    fits = value is None or (type(value) in (int, float) and math.isfinite(value))
    return "" if fits else "a finite number or null"


def _ids(value: Any) -> str:
    ids = isinstance(value, list) and value and all(type(i) is int for i in value)
    return "" if ids and all(0 <= i < 2**31 for i in value) else "a list of token ids"


_ANSWER = {
    "item": schema.string,
    "split": schema.among(schema.SPLITS),
    "sign": lambda value: "" if type(value) is int and value in (1, -1) else "1 or -1",
    "prompt": schema.text,
    "text": schema.text,
    "ids": _ids,
    "odds": _odds,
}


def write_targets(path: Path, targets: list[Answer]) -> None:
    """Writes targets.jsonl, at once."""
    write_whole(path, "".join(json.dumps(answer_row(row)) + "\n" for row in targets))


def _given_spans(
    c: ConfigDict, model: Model, found: Foreign, written: Sides | None
) -> tuple[list[Span], list[Span]]:
    """Pairs of another file; questions that come with personas are answered under them."""
    if found.personas:
        items = adopt.asked(found)
        prompts = schema.select(items, format="free")[: c.vector.pairs]
        return _free_spans(c, model, items, prompts, written)
    pairs = load_pairs(found, model)[: c.vector.pairs]
    if not pairs:
        raise ValueError(
            f"vector.data {c.vector.data}: got no pairs, expected texts of both sides. Add some."
        )
    positives, negatives = (
        [span(model, pair[side], c.vector.position) for pair in pairs] for side in (0, 1)
    )
    return positives, negatives


def _free_spans(
    c: ConfigDict,
    model: Model,
    items: Sequence[Item],
    prompts: Sequence[Item],
    sides: Sides | None,
) -> tuple[list[Span], list[Span]]:
    sides = [] if sides is None else sides
    for sign in answers.SIGNS if not sides else ():
        written = answers.write_answers(
            model,
            items,
            prompts,
            sign,
            c.vector.answer_tokens,
            batch_size=c.eval.batch,
            score=c.vector.correct_only,
        )
        whose = "persona" if has_personas(items) else "given"
        say(f"{whose} {sign:+d}, e.g.: {written[0].text!r}")
        sides.append(written)
    positive, negative = (
        answers.answer_spans(model, items, prompts, written, c.vector.position) for written in sides
    )
    if not c.vector.correct_only:
        return positive, negative
    # Pairs in which both answers fit their own persona better.
    fits = [i for i, (a, b) in enumerate(zip(*sides, strict=True)) if a.odds > 0 and b.odds > 0]
    if not fits:
        raise ValueError(
            "vector.correct_only: no pair passed, expected at least one. Set it to False."
        )
    return [positive[i] for i in fits], [negative[i] for i in fits]
