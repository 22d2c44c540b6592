"""A file of another tool as a behavior: its prompts and answers, or its claims, as our items.

Splits are drawn by the text of the prompt, so that the same file is always split alike and a prompt
that is there twice stays in one split. Lettered choices are taken apart: the prompt is what is
asked, the answers what the letters stand for; and the same again as a scenario, which is asked with
letters in both orders.
"""

import hashlib
import re
from collections.abc import Iterable
from typing import Any

from reptune_jax.data.foreign import Foreign, Given
from reptune_jax.data.schema import Item

# Of what is in a file, in this order by digest; what is left is test.
_SHARES = {"train": 0.25, "tune": 0.3, "val": 0.1}
_CHOICE = re.compile(r"\n\s*\(([A-Z])\)")
_ENDS = re.compile(r"\s*(?:Choices|Answer)\s*:\s*$")


def items(foreign: Foreign) -> list[Item]:
    """Items of a behavior, all splits.

    Raises:
      ValueError: the file has no prompts with both answers and no claims.
    """
    if foreign.claims:
        return _claims(foreign)
    asked = [one for one in foreign.given if one.prompt]
    if not asked:
        held = "personas and questions" if foreign.personas else "texts without prompts"
        raise ValueError(
            f"behavior {foreign.name}: got {held} ({foreign.format}), expected prompts with an "
            "answer that shows the behavior and one that opposes it, which it is measured by. A "
            "vector can be read from it: set vector.data, and behavior to what is measured."
        )
    plain = [unlettered(one) for one in asked]
    keys = [_key(one.prompt[-1]["content"]) for one in plain]
    splits = _splits(keys)
    out = []
    for i, (one, before, key) in enumerate(zip(plain, asked, keys, strict=True)):
        shared: dict[str, Any] = {"messages": one.prompt, "pos": one.positive, "neg": one.negative}
        shared |= {"split": splits[key], "cluster": key, "label": None}
        out.append(_item(foreign, f"{i}", format="free", **shared))
        if one.prompt is not before.prompt and splits[key] in ("val", "test"):
            out.append(_item(foreign, f"{i}-ab", format="ab", **shared))
    return out


def asked(foreign: Foreign) -> list[Item]:
    """Personas and the questions to ask under them, all of the train split: a vector's alone."""
    shared: dict[str, Any] = {"split": "train", "pos": "", "neg": ""}
    out = []
    for i, sides in enumerate(foreign.personas):
        for label, text in zip((1, 0), sides, strict=True):
            turns = ({"role": "system", "content": text},)
            about: dict[str, Any] = {
                "messages": turns,
                "label": label,
                "cluster": f"persona-{i:03}",
            }
            out.append(_item(foreign, f"persona-{i}-{label}", format="persona", **shared, **about))
    for i, text in enumerate(foreign.questions):
        turns = ({"role": "user", "content": text},)
        about = {"messages": turns, "label": None, "cluster": _key(text)}
        out.append(_item(foreign, f"{i}", format="free", **shared, **about))
    return out


def unlettered(given: Given) -> Given:
    """Without letters, where the question lists choices and both answers are letters of them."""
    *before, last = given.prompt
    question, *parts = _CHOICE.split(last["content"])
    choices = dict(zip(parts[::2], (_ENDS.sub("", p).strip() for p in parts[1::2]), strict=True))
    sides = [answer.strip().strip("().") for answer in (given.positive, given.negative)]
    if not all(side in choices and choices[side] for side in sides):
        return Given(given.prompt, given.positive.strip(), given.negative.strip())
    turn = {"role": last["role"], "content": _ENDS.sub("", question).strip()}
    return Given((*before, turn), *(choices[side] for side in sides))


def _claims(foreign: Foreign) -> list[Item]:
    """As many true as false ones in each split, as far as the file has them."""
    splits: dict[str, str] = {}
    for label in (0, 1):
        splits |= _splits(_key(text) for text, of in foreign.claims if of == label)
    return [
        _item(
            foreign,
            f"{i}",
            format="claim",
            messages=({"role": "user", "content": text},),
            pos="True" if label else "False",
            neg="False" if label else "True",
            label=label,
            split=splits[_key(text)],
            cluster=_key(text),
        )
        for i, (text, label) in enumerate(foreign.claims)
    ]


def _item(foreign: Foreign, number: str, **values: Any) -> Item:
    name = foreign.name
    about: dict[str, Any] = {
        "id": f"{name}-{number}",
        "behavior": name,
        "source": foreign.format,
        "license": "",
    }
    return Item(**about, tags=(), **values)


def _splits(keys: Iterable[str]) -> dict[str, str]:
    """key -> split, by the order of the keys, which are digests."""
    ranked = sorted(set(keys))
    splits = dict.fromkeys(ranked, "test")
    start = 0.0
    for split, share in _SHARES.items():
        stop = start + share
        for key in ranked[round(start * len(ranked)) : round(stop * len(ranked))]:
            splits[key] = split
        start = stop
    return splits


def _key(text: str) -> str:
    plain = " ".join(re.findall(r"\w+", text.lower()))
    return hashlib.sha256(plain.encode()).hexdigest()[:12]
