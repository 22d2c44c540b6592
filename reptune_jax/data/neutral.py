"""Neutral text, which no behavior should touch: prose, and chats that the base model answers.

Retention is trained on its `train` and `val` splits and measured on `val` and `test`.
"""

from typing import Any, NamedTuple

from reptune_jax.data import schema
from reptune_jax.hub.endings import said
from reptune_jax.lm import Model

KINDS: dict[str, dict[str, Any]] = {
    "prose": {"text": schema.string},
    "chats": {"messages": schema.turns},
    # What one should refuse, and what only sounds like it (after XSTest, arXiv 2308.01263).
    "requests": {"asks": schema.among(("harmful", "harmless")), "messages": schema.turns},
}


class NeutralText(NamedTuple):
    """Tokens that are given, and the tokens after them that are predicted."""

    id: str
    kind: str  # prose | chats
    messages: list[dict[str, str]] | None  # the prompt of a chat
    prompt: list[int]  # of prose: its first token
    answer: list[int]  # of a chat: the base model's own, greedy
    n_bytes: int


def load_neutral(kind: str, split: str) -> list[dict[str, Any]]:
    """The shipped texts: prose with `text`; chats, and requests, with `messages`; all with `id`.

    Raises:
      ValueError: an unknown kind or split; a line that is wrong, by number.
    """
    schema.one_of("kind", kind, tuple(KINDS))
    path = schema.shipped("neutral") / f"{kind}.jsonl"
    fields = {"id": schema.string, "split": schema.among(schema.SPLITS), **KINDS[kind]}
    rows = [
        schema.checked(row, fields, f"{path}, line {number}")
        for number, row in schema.json_lines(path)
    ]
    schema.one_of("split", split, sorted({row["split"] for row in rows}))
    return [row for row in rows if row["split"] == split]


def prose(model: Model, split: str, limit: int = 0) -> list[NeutralText]:
    """Documents of a split, at most `limit` of them (0 = all)."""
    found = []
    for d in load_neutral("prose", split)[: limit or None]:
        ids = model.encode_prompt(d["text"], chat=False)
        n_bytes = len(d["text"].encode())
        found.append(NeutralText(d["id"], "prose", None, ids[:1], ids[1:], n_bytes))
    return found


def chats(
    model: Model, split: str, new_tokens: int, limit: int = 0, batch: int = 32
) -> list[NeutralText]:
    """Unrelated prompts of a split with the model's own greedy answers."""
    rows = load_neutral("chats", split)[: limit or None]
    prompts = [model.encode_prompt(d["messages"]) for d in rows]
    answers = model.generate_each(prompts, new_tokens, batch_size=batch)
    return [
        NeutralText(
            d["id"], "chats", d["messages"], p, ids, len(said(model.tokenizer, ids).encode())
        )
        for d, p, ids in zip(rows, prompts, answers, strict=True)
    ]
