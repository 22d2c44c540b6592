"""A behavior and neutral texts of a few rows, for runs of whole programs on a tiny model."""

import json
from pathlib import Path

from ml_collections import ConfigDict

from reptune_jax import config, ranges
from reptune_jax.data import neutral as neutral_texts

_TOPICS = ("weather", "mountains", "city", "food", "river", "train", "garden", "market")


def write(folder: Path, name: str = "sentiment", per_split: int = 4) -> Path:
    """A .jsonl with one pair of personas and free prompts in every split, judged by VADER."""
    about = {"behavior": name, "measures": ["vader:free", "logodds:free"]}
    rows = [about] + [
        _row("persona", "train", f"p{label}", [("system", f"You are {mood}.")], label=label)
        for label, mood in ((1, "wonderful"), (0, "terrible"))
    ]
    for s, split in enumerate(("train", "tune", "val", "test", "ood")):
        for i in range(per_split):
            text = f"Tell me of the {_TOPICS[(i + s) % len(_TOPICS)]} {split} {i}"
            ends = (" It is good.", " It is terrible.")
            rows.append(_row("free", split, f"{split}{i}", [("user", text)], *ends))
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def neutral(kind: str, split: str) -> list[dict]:
    """Stands in for `data.neutral.load_neutral`."""
    words = ("A day in the mountains. " * 4, "Question and answer of the weather, yes. " * 3)
    if kind == "prose":
        return [{"id": f"{split}-{i}", "split": split, "text": t} for i, t in enumerate(words)]
    turn = {"role": "user", "content": f"What do you think? {split}"}
    if kind == "requests":
        each = [(asks, i) for asks in ("harmful", "harmless") for i in range(2)]
        return [{"id": f"{asks}-{i}", "asks": asks, "messages": [turn]} for asks, i in each]
    return [{"id": f"chat-{split}-{i}", "split": split, "messages": [turn]} for i in range(2)]


def patch_neutral(monkeypatch) -> None:
    monkeypatch.setattr(neutral_texts, "load_neutral", neutral)


def settings(model: Path, behavior: Path, **changes) -> ConfigDict:
    """A config of which everything is small; keys with __ for dots."""
    c = config.default()
    c.model, c.behavior, c.dtype = str(model), str(behavior), "float32"
    c.vector.pairs, c.vector.answer_tokens = 4, 6
    c.loss.layers = c.train.layers = (1, 3)
    c.targets.layers = (1,)
    c.train.steps, c.train.batch, c.train.lr = 6, 2, 3e-3
    c.train.warmup, c.train.decay = 0, "none"  # then runs of any length are one program
    c.train.log_every, c.train.eval_every, c.train.patience = 1, 2, 0
    c.train.measure_every = 1
    c.train.retain_batch, c.train.retain_positions = 2, 8
    c.steer.layers, c.steer.doses, c.steer.documents = (1, 2), (0.5,), 1
    c.eval.new_tokens, c.eval.batch = 4, 4
    for key, value in changes.items():
        c.update_from_flattened_dict({key.replace("__", "."): value})
    return ranges.check(c)


def _row(format, split, id, turns, pos="", neg="", label=None):
    return {
        "id": id,
        "behavior": "sentiment",
        "split": split,
        "cluster": "personas" if format == "persona" else id,
        "format": format,
        "messages": [{"role": role, "content": content} for role, content in turns],
        "pos": pos,
        "neg": neg,
        "label": label,
        "tags": [],
        "source": "own",
        "license": "Apache-2.0",
    }
