"""The rows a run trains on: behavior examples by split, and retention text."""

from pathlib import Path

from ml_collections import ConfigDict

from reptune_jax.data import tuning as examples
from reptune_jax.data.batches import Example, Keep, stack_examples
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
    """Tokenised training and validation rows, all of one length so that one program fits them."""
    items = load_behavior(c.behavior)
    of_split = _free_examples if select(items, format="free") else _claim_examples
    train, val = (of_split(c, workdir, model, items, split) for split in ("tune", "val"))
    for split, found in (("tune", train), ("val", val)):
        if not found:
            raise ValueError(
                f"behavior {c.behavior}: got no example of split {split!r}, expected free prompts "
                "or claims. Add some."
            )
    val = val[: c.train.val_rows or None]
    T = -(-max(len(e.ids) for e in train + val) // _BUCKET) * _BUCKET
    rows = [stack_examples(e, model.pad_id, T) for e in (train, val)]
    keeps = [_keep(c, model, split, T) if c.loss.retain else None for split in ("train", "val")]
    return Corpus(rows[0], rows[1], keeps[0], keeps[1])


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
    key = (model.sha, model.dtype.name, split, T, c.eval.new_tokens, c.train.retain_positions)
    if key not in _keeps:
        rows = retention.prose_rows(model, split, T)
        rows += retention.chat_rows(model, split, c.eval.new_tokens)
        _keeps[key] = retention.make_keep(model, rows, T, c.train.retain_positions)
    return _keeps[key]
