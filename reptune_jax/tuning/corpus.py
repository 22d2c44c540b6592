"""The rows a run trains on: behavior examples by split, and retention text."""

import json
from pathlib import Path

from ml_collections import ConfigDict

from reptune_jax.config import retains
from reptune_jax.data import tuning as examples
from reptune_jax.data.batches import Example, Keep, Rows, stack_examples
from reptune_jax.data.contrast import claim_prompts
from reptune_jax.data.schema import Item, load_behavior, select
from reptune_jax.hub import tokenizer as tokenizers
from reptune_jax.lm import Model
from reptune_jax.tuning import retention
from reptune_jax.tuning.run import Corpus
from reptune_jax.vectors import extraction

_BUCKET = 16
_keeps: dict[tuple, Keep] = {}


def make_corpus(c: ConfigDict, workdir: Path, model: Model) -> Corpus:
    """Tokenised training and validation rows, all of one length so that one program fits them.

    Those of `c.behavior` first, then those of each behavior in `c.loss.also`.
    """
    each = {c.behavior: (c, workdir)} | {
        f"loss.also.{name}": other_behavior(c, one) for name, one in c.loss.also.items()
    }
    train, val = (
        [_examples(name, own, folder, model, split) for name, (own, folder) in each.items()]
        for split in ("tune", "val")
    )
    val = [found[: c.train.val_rows or None] for found in val]
    longest = max(len(e.ids) for found in train + val for e in found)
    T = -(-longest // _BUCKET) * _BUCKET
    rows = [_stack(side, model.pad_id, T) for side in (train, val)]
    keeps = [_keep(c, model, split, T) if retains(c) else None for split in ("train", "val")]
    batches = (c.train.batch, *(one.batch for one in c.loss.also.values()))
    return Corpus(rows[0], rows[1], keeps[0], keeps[1], tuple(map(len, train)), batches)


def other_behavior(c: ConfigDict, one: ConfigDict) -> tuple[ConfigDict, Path]:
    """(the config that makes the rows of a further behavior, its study folder)."""
    folder = Path(one.folder)
    stored = json.loads((folder / "config.json").read_text())["config"]
    own = c.copy_and_resolve_references()
    own.behavior, own.sign = stored["behavior"], one.sign
    own.loss.position, own.loss.mode = one.position, one.mode
    own.loss.targets = "neutral" if one.mode == "out" else one.targets
    return own, folder


def _examples(name: str, c: ConfigDict, workdir: Path, model: Model, split: str) -> list[Example]:
    items = load_behavior(c.behavior)
    of_split = _free_examples if select(items, format="free") else _claim_examples
    found = of_split(c, workdir, model, items, split)
    if not found:
        raise ValueError(
            f"behavior {name}: got no example of split {split!r}, expected free prompts "
            "or claims. Add some."
        )
    return [examples.unlabeled(e) for e in found] if c.loss.mode == "keep" else found


def _stack(of_each: list[list[Example]], pad_id: int, T: int) -> Rows:
    of = [k for k, found in enumerate(of_each) for _ in found]
    return stack_examples([e for found in of_each for e in found], pad_id, T, of)


def _free_examples(
    c: ConfigDict, workdir: Path, model: Model, items: list[Item], split: str
) -> list[Example]:
    """Prompts without persona, continued by the answers of the sign's persona (or of both)."""
    answers = extraction.read_targets(workdir / "targets.jsonl")
    answers = [a for a in answers if a.split == split]
    if c.loss.targets == "behavior":
        answers = [a for a in answers if a.sign == c.sign]
    if split == "tune":
        answers = examples.fluent(answers, c.targets.max_repeat)
        answers = examples.best_share(answers, c.targets.keep)
    if c.loss.targets == "neutral":
        answers = examples.balanced(answers)
    prompts = {i.id: model.encode_prompt(list(i.messages)) for i in select(items, split=split)}
    return [examples.response_example(prompts[a.item], a.ids, c.loss.position) for a in answers]


def _claim_examples(
    c: ConfigDict, workdir: Path, model: Model, items: list[Item], split: str
) -> list[Example]:
    """Questions about claims, answered rightly (sign +) or wrongly (sign -), or half each."""
    out = []
    for template in c.train.templates:
        for contrast in claim_prompts(select(items, split=split, format="claim"), template):
            text = tokenizers.chat_text(model.tokenizer, contrast.messages)
            right, wrong = tokenizers.free_label_tokens(
                model.tokenizer, text, contrast.pos, contrast.neg
            )
            ids = model.tokenizer.encode(text, add_special_tokens=False)
            at = tokenizers.find_position(model.tokenizer, ids, c.loss.position)
            span = (at.start, at.stop) if isinstance(at, slice) else (at, at + 1)
            label, other = (right, wrong) if c.sign > 0 else (wrong, right)
            neutral = c.loss.targets == "neutral"
            out.append(examples.verdict_example(ids, label, other, span, neutral))
    return out


def _keep(c: ConfigDict, model: Model, split: str, T: int) -> Keep:
    """Retention rows; the runs of a study share them, and reading them costs tens of seconds."""
    layers = tuple(c.train.layers) if c.loss.l2 else None
    L = c.train.retain_positions
    key = (model.sha, model.dtype.name, split, T, c.eval.new_tokens, L, layers)
    if key not in _keeps:
        texts = retention.prose_texts(model, split, T)
        texts += retention.chat_texts(model, split, c.eval.new_tokens)
        _keeps[key] = retention.make_keep(model, texts, T, L, layers=layers)
    return _keeps[key]
