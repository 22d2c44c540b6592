"""The texts a run trains on: behavior examples by split, and retention text; and its batches."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from reptune_jax.config import retains
from reptune_jax.data import behavior as behaviors
from reptune_jax.data import positions
from reptune_jax.data import tuning as examples
from reptune_jax.data.batches import (
    Batch,
    Example,
    Examples,
    Retention,
    choose,
    choose_of_each,
    stack_examples,
)
from reptune_jax.data.behavior import Behavior
from reptune_jax.data.contrast import claim_prompts, fold_system, matched_personas, with_system
from reptune_jax.data.packing import Shape, arrange, pack
from reptune_jax.data.tuning import Answer
from reptune_jax.folder import Study, read_config
from reptune_jax.hub import templates
from reptune_jax.hub import tokenizer as tokenizers
from reptune_jax.lm import Model
from reptune_jax.tuning import retention
from reptune_jax.tuning.retention import Texts
from reptune_jax.vectors import extraction
from reptune_jax.vectors.answers import SIGNS, persona_prompts

_BUCKET = 16
_texts: dict[tuple, Texts] = {}


class Corpus(NamedTuple):
    """All texts of a run: for training, for validation, and retention text for each.

    Examples of the run's behaviors lie one after another, `sizes` of each; a step takes `batches`
    of each. Of `train` and `retention` only those are held that a step takes: example i at
    `place_I[i]`, text r at `place_R[r]`. With `packing`, a step's rows hold several of them.
    """

    train: Examples
    val: Examples
    retention: Retention | None
    retention_val: Retention | None
    sizes: tuple[int, ...]
    batches: tuple[int, ...]
    place_I: np.ndarray | None = None
    place_R: np.ndarray | None = None
    packing: tuple[Shape, ...] = ()  # of a step's examples, and of its retention text if any

    def of_steps(self, seed: int, steps: int) -> "Corpus":
        """Without the examples that no step takes: what the base says of them costs minutes."""
        taken = [min(steps * b, n) for b, n in zip(self.batches, self.sizes, strict=True)]
        at = np.sort(choose_of_each(self.sizes, taken, seed, 0))  # all within the first epoch
        some = jax.tree.map(lambda a: a[at], self.train)
        return self._replace(train=some, place_I=_places(at, sum(self.sizes)))

    def retaining(self, train: Texts, val: Texts, seed: int, steps: int, R: int) -> "Corpus":
        """With the retention text that its steps and its validations take."""
        at = np.sort(choose(len(train), min(steps * R, len(train)), seed, 0))
        n = -(-len(self.val.tokens_BxT) // sum(self.batches)) * R
        return self._replace(
            retention=train.take(at),
            place_R=_places(at, len(train)),
            retention_val=val.take(np.arange(min(n, len(val)))),
        )

    def digest(self) -> str:
        """Identifies what is trained on: hosts with other data must not train together."""
        found = hashlib.sha256()
        for leaf in (*jax.tree.leaves(self.train), *jax.tree.leaves(self.val)):
            found.update(leaf.tobytes())
        return found.hexdigest()[:16]

    def step_size(self, R: int) -> tuple[int, int]:
        """(examples, tokens with padding) of a step with R rows of retention text."""
        rows = sum(self.batches) + (R if self.retention is not None else 0)
        padded = rows * self.train.tokens_BxT.shape[1]
        packed = sum(shape.rows * shape.tokens for shape in self.packing)
        return sum(self.batches), packed or padded

    def real_share(self, R: int) -> float:
        """Of a step's tokens, those that are no padding: the mean over all rows that are taken."""
        sides = [(sum(self.batches), self.train.mask_BxT)]
        if self.retention is not None:
            sides.append((R, self.retention.mask_BxT))
        return sum(n * float(m.sum(1).mean()) for n, m in sides) / self.step_size(R)[1]

    def sides(self, seed: int, step: int, R: int) -> list[tuple[Any, np.ndarray]]:
        """A step's examples, and R texts of retention where there is any: (all, which of them)."""
        at = choose_of_each(self.sizes, self.batches, seed, step)
        found: list[tuple[Any, np.ndarray]]
        found = [(self.train, at if self.place_I is None else self.place_I[at])]
        if self.retention is not None and self.place_R is not None:
            at = self.place_R[choose(len(self.place_R), R, seed, step)]
            found.append((self.retention, at))
        return found

    def batch(self, seed: int, step: int, R: int) -> Batch:
        """A step's examples, and R texts of retention where there is any."""
        sides = self.sides(seed, step, R)
        if self.packing:
            parts = [
                pack(side, arrange(side, at, shape.tokens), shape)
                for (side, at), shape in zip(sides, self.packing, strict=True)
            ]
        else:
            parts = [jax.tree.map(lambda a, at=at: a[at], side) for side, at in sides]
        return Batch(*parts, *[None] * (2 - len(parts)))

    def val_batches(self, R: int) -> Iterator[Batch]:
        """Whole batches; what is missing in the last one is filled with weightless copies."""
        val, B, kept = self.val, sum(self.batches), self.retention_val
        n = len(val.tokens_BxT)
        for start in range(0, n, B):
            at = np.arange(start, start + B)
            chosen, real_B = jax.tree.map(lambda a, at=at: a[at % n], val), at < n
            chosen = chosen.replace(
                weight_BxLxC=chosen.weight_BxLxC * real_B[:, None, None],
                cosine_BxT=chosen.cosine_BxT * real_B[:, None],
            )
            if chosen.goes_on_BxL is not None:
                chosen = chosen.replace(goes_on_BxL=chosen.goes_on_BxL * real_B[:, None])
            own = None
            if kept is not None:
                rows = np.arange(start // B * R, start // B * R + R) % len(kept.tokens_BxT)
                own = jax.tree.map(lambda a, rows=rows: a[rows], kept)
            yield Batch(chosen, own)


def make_corpus(c: ConfigDict, workdir: Path, model: Model) -> Corpus:
    """Tokenised training and validation texts, all of one length so that one program fits them.

    Those of `c.behavior` first, then those of each behavior in `c.loss.also`.
    """
    each = {c.behavior: (c, Study(workdir))} | {
        f"loss.also.{name}": _also(c, one) for name, one in c.loss.also.items()
    }
    train, val = (
        [_examples(name, own, study, model, split) for name, (own, study) in each.items()]
        for split in ("tune", "val")
    )
    val = [found[: c.train.val_rows or None] for found in val]
    longest = max(len(e.ids) for found in train + val for e in found)
    T = -(-longest // _BUCKET) * _BUCKET
    train[0] = _some(train[0], c)
    batches = (c.train.batch, *(one.batch for one in c.loss.also.values()))
    corpus = Corpus(
        train=_stack(train, model.pad_id, T),
        val=_stack(val, model.pad_id, T),
        retention=None,
        retention_val=None,
        sizes=tuple(map(len, train)),
        batches=batches,
    )
    corpus = corpus.of_steps(c.seed, c.train.steps)
    if not retains(c):
        return corpus
    texts, val_texts = (_texts_of(c, model, split, T) for split in ("train", "val"))
    return corpus.retaining(texts, val_texts, c.seed, c.train.steps, c.train.retain_batch)


def _places(at: np.ndarray, total: int) -> np.ndarray:
    """Where each of them is among those `at`; behind the last, the others."""
    place = np.full(total, len(at))
    place[at] = np.arange(len(at))
    return place


def _also(c: ConfigDict, one: ConfigDict) -> tuple[ConfigDict, Study]:
    """(the config that makes the examples of a further behavior, its study folder)."""
    study = Study(Path(one.folder))
    own = c.copy_and_resolve_references()
    there = read_config(study)
    own.behavior, own.sign = there["behavior"], one.sign
    own.loss.position, own.loss.mode, own.loss.match = one.position, one.mode, 0.0
    own.targets.prompts, own.eval.val_prompts = (
        there["targets"]["prompts"],
        there["eval"]["val_prompts"],
    )
    own.loss.targets = "neutral" if one.mode == "out" else one.targets
    return own, study


def _examples(name: str, c: ConfigDict, study: Study, model: Model, split: str) -> list[Example]:
    behavior = behaviors.load(c.behavior)
    of_split = _free_examples if behavior.kind == "free" else _claim_examples
    found = of_split(c, study, model, behavior, split)
    if not found:
        raise ValueError(
            f"behavior {name}: got no example of split {split!r}, expected free prompts "
            "or claims. Add some."
        )
    return [examples.unlabeled(e) for e in found] if c.loss.mode == "hold" else found


def _some(found: list[Example], c: ConfigDict) -> list[Example]:
    """`train.rows` of them, others for each seed: what few labels do depends on which they are."""
    if c.train.rows > len(found):
        raise ValueError(
            f"train.rows: got {c.train.rows}, expected at most the {len(found)} tuning rows of "
            f"{c.behavior}. 0 takes all."
        )
    at = np.random.default_rng(c.seed).permutation(len(found))
    return [found[i] for i in at[: c.train.rows]] if c.train.rows else found


def _stack(of_each: list[list[Example]], pad_id: int, T: int) -> Examples:
    of = [k for k, found in enumerate(of_each) for _ in found]
    return stack_examples([e for found in of_each for e in found], pad_id, T, of)


def _free_examples(
    c: ConfigDict, study: Study, model: Model, behavior: Behavior, split: str
) -> list[Example]:
    """Prompts without persona, continued by the answers of the sign's persona (or of both)."""
    answers = _answers(c, study, behavior, split)
    if c.loss.targets == "behavior":
        answers = [a for a in answers if a.sign == c.sign]
    if split == "tune":
        answers = examples.fluent(answers, c.targets.max_repeat)
        answers = examples.best_share(answers, c.targets.best_share)
    if c.loss.targets == "neutral":
        answers = examples.balanced(answers)
    prompts = {i.id: model.encode_prompt(list(i.messages)) for i in behavior.select(split)}
    under: dict[tuple[str, int], list[int]] = {}
    if _matches_persona(c):
        asked = extraction.asked(c, behavior, split)  # as the answers were written
        for sign, each in persona_prompts(model, behavior.items, asked).items():
            under |= {(i.id, sign): ids for i, ids in zip(asked, each, strict=True)}
    out = []
    for answer in answers:
        prompt = prompts[answer.item]
        span = positions.span(model.tokenizer, prompt + answer.ids, len(prompt), c.loss.position)
        persona = under.get((answer.item, answer.sign), ())
        out.append(examples.response_example(prompt, answer.ids, span, persona))
    return out


def _answers(c: ConfigDict, study: Study, behavior: Behavior, split: str) -> list[Answer]:
    """Those of targets.jsonl, of which a file that was cut between two lines has less."""
    answers = [a for a in extraction.read_targets(study.targets) if a.split == split]
    asked = [(i.id, s) for i in extraction.asked(c, behavior, split) for s in SIGNS]
    found = [(a.item, a.sign) for a in answers]
    if sorted(found) != sorted(asked):
        fit = len({*found} & {*asked})
        raise ValueError(
            f"{study.targets}: got {len(found)} answers of split {split!r}, {fit} of them to its "
            f"prompts, expected {len(asked)}: one of either persona to each. The file was cut, or "
            "the behavior is another one now. Delete it: the same command writes it anew."
        )
    return answers


def _claim_examples(
    c: ConfigDict, study: Study, model: Model, behavior: Behavior, split: str
) -> list[Example]:
    """Questions about claims, answered rightly (sign +) or wrongly (sign -), or half each.

    The persona of the loss `match` is the sign's in the first cluster by name, which is also the
    first that the vector was read under; the arm `prompt` chooses its own.
    """
    out = []
    persona = matched_personas(behavior.items)[0][c.sign < 0] if _matches_persona(c) else None
    for template in c.train.templates:
        for contrast in claim_prompts(behavior.select(split, "claim"), template):
            text = templates.chat_text(model.tokenizer, contrast.messages)
            right, wrong = tokenizers.free_label_tokens(
                model.tokenizer, text, contrast.pos, contrast.neg
            )
            ids = model.encode_prompt(contrast.messages)
            span = positions.span(model.tokenizer, ids, len(ids), c.loss.position)
            label, other = (right, wrong) if c.sign > 0 else (wrong, right)
            neutral = c.loss.targets == "neutral"
            under: list[int] = []
            if persona is not None:
                turns = with_system(persona, contrast.messages)
                under = model.encode_prompt(fold_system(model.tokenizer, turns))
            out.append(examples.verdict_example(ids, label, other, span, neutral, under))
    return out


def _matches_persona(c: ConfigDict) -> bool:
    return bool(c.loss.match) and c.loss.goal == "persona"


def _texts_of(c: ConfigDict, model: Model, split: str, T: int) -> Texts:
    """The runs of a study share them, and what the base reads there."""
    layers = tuple(c.train.layers) if c.loss.l2 else None
    L = c.train.retain_positions
    chats = repr(templates.arguments(model.tokenizer)), c.eval.new_tokens
    key = (model.sha, model.dtype.name, model.held, split, T, *chats, L, layers)
    if key not in _texts:
        found = retention.pieces(model, split, T, c.eval.new_tokens)
        _texts[key] = Texts(model, found, T, L, layers=layers)
    return _texts[key]
