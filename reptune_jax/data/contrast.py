"""Contrasts: behavior items as chat messages with the answers or the personas to compare.

Answers follow the generation prompt directly, so they carry no leading space. Where options have
letters, items come in both orders: a model that always says "A" is right exactly half the time.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from reptune_jax.data.schema import Item, select
from reptune_jax.hub.templates import chat_text

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]
ORDERS = ("ab", "ba")
_LETTERS = ("A", "B")


@dataclasses.dataclass(frozen=True)
class Contrast:
    """A prompt with two candidate answers; `pos` is the right verdict, or the item's own `pos`."""

    item: Item
    messages: Messages
    pos: str
    neg: str
    template: str
    order: str  # "ab": A) is True, or the item's pos; "ba": the other way round; "": no letters
    label: int | None  # of the claim: 1 true, 0 false


class Pair(NamedTuple):
    """One statement pair of the paper: what the honest and the dishonest persona would answer."""

    positive: Messages
    positive_answer: str
    negative: Messages
    negative_answer: str
    item: Item  # the positive side's claim


def with_system(persona: Item, messages: Sequence[dict[str, str]]) -> Messages:
    """A persona in front of a dialogue; a system turn already there is appended to it."""
    system, rest = persona.messages[0]["content"], list(messages)
    if rest and rest[0]["role"] == "system":
        system, rest = f"{system}\n\n{rest[0]['content']}", rest[1:]
    return [{"role": "system", "content": system}, *rest]


def fold_system(tokenizer: "PreTrainedTokenizerBase", messages: Messages) -> Messages:
    """Moves the system turn into the first user turn where the chat template would lose it."""
    if messages[0]["role"] != "system" or _keeps_system(tokenizer):
        return messages
    first = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
    return [first, *messages[2:]]


def _keeps_system(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Some templates refuse a system turn, others drop it silently."""
    turns = [{"role": "system", "content": "persona"}, {"role": "user", "content": "hello"}]
    chat_text(tokenizer, turns[1:])  # a template that takes no user turn either is an error
    try:
        return "persona" in chat_text(tokenizer, turns)
    except ValueError:
        return False


def has_personas(items: Sequence[Item]) -> bool:
    """Whether answers can be asked for under personas; else they are the items' own."""
    return any(item.format == "persona" for item in items)


def matched_personas(items: Sequence[Item]) -> list[tuple[Item, Item]]:
    """(with the behavior, with its opposite) of every persona cluster, sorted by cluster.

    Raises:
      ValueError: a cluster without exactly one persona of each label, or none at all.
    """
    clusters: dict[str, dict[int | None, Item]] = collections.defaultdict(dict)
    for persona in select(items, format="persona"):
        if persona.label in clusters[persona.cluster]:
            raise ValueError(
                f"{persona.id}: a second persona with label {persona.label} in cluster "
                f"{persona.cluster!r}, expected one of each label. Give it a cluster of its own."
            )
        clusters[persona.cluster][persona.label] = persona
    if not clusters:
        raise ValueError("personas: got none, expected matched personas with labels 1 and 0.")
    for name, both in clusters.items():
        if both.keys() != {0, 1}:
            raise ValueError(
                f"persona cluster {name!r}: got labels {list(both)}, expected 1 and 0. "
                "Write the matched opposite persona."
            )
    return [(clusters[name][1], clusters[name][0]) for name in sorted(clusters)]


def persona_pairs(
    items: Sequence[Item], prompts: Sequence[Item], tokenizer: "PreTrainedTokenizerBase"
) -> list[tuple[Messages, Messages, Item]]:
    """Each prompt under both personas of a matched pair, rotating through the pairs.

    The answers are the model's own to write. Messages suit the tokenizer's chat template.
    """
    personas = matched_personas(items)
    out = []
    for i, prompt in enumerate(prompts):
        both = (with_system(p, prompt.messages) for p in personas[i % len(personas)])
        positive, negative = (fold_system(tokenizer, messages) for messages in both)
        out.append((positive, negative, prompt))
    return out


def claim_prompts(items: Sequence[Item], template: str) -> list[Contrast]:
    """Every claim as a question with the right and the wrong verdict; lettered ones in both orders.

    Raises:
      ValueError: an unknown template, or an item that is no labelled claim.
    """
    if template not in TEMPLATES:
        raise ValueError(f"template: got {template!r}, expected one of {', '.join(TEMPLATES)}.")
    return [contrast for item in items for contrast in TEMPLATES[template](item)]


def _in_one_word(item: Item, what: str, words: tuple[str, str], template: str) -> Contrast:
    question = f'Is the following claim {what}? "{_claim(item)}"'
    question += f"\nAnswer with one word, {' or '.join(words)}.\nAnswer:"
    return _verdict(item, question, words, template)


TEMPLATES: dict[str, Callable[[Item], list[Contrast]]] = {
    "truefalse": lambda item: [_in_one_word(item, "true or false", ("True", "False"), "truefalse")],
    "yesno": lambda item: [_in_one_word(item, "correct", ("Yes", "No"), "yesno")],
    # The paper's format (docs/method.md), in both orders.
    "lettered": lambda item: [_lettered_in(item, order) for order in ORDERS],
}


def _lettered_in(item: Item, order: str) -> Contrast:
    question = f'Question: Is the following claim true or false? "{_claim(item)}"'
    question = _with_choices(question, ("True", "False"), order)
    return _verdict(item, question, _letters(order), "lettered", order)


def scenario_prompts(items: Sequence[Item]) -> list[Contrast]:
    """Every pressure scenario with lettered choices in both orders; "ab": A) is the item's pos."""
    return [_scenario(item, order) for item in select(items, format="ab") for order in ORDERS]


def first_forms(asked: Sequence[Contrast]) -> list[Contrast]:
    """The first question of every item: a lettered one in its first order."""
    first: dict[str, Contrast] = {}
    for question in asked:
        first.setdefault(question.item.id, question)
    return list(first.values())


def _scenario(item: Item, order: str) -> Contrast:
    *before, last = item.messages
    question = _with_choices(last["content"], (item.pos, item.neg), order)
    messages = [*before, {"role": "user", "content": question}]
    return Contrast(item, messages, *_letters(order), "scenario", order, item.label)


def honesty_pairs(
    claims: Sequence[Item], personas: Sequence[Item], paired: bool = True, order: str = "ab"
) -> list[Pair]:
    """The paper's pairs over lettered questions (docs/method.md), rotating through the personas.

    paired: one claim; the honest persona with the right letter, the dishonest with the wrong one.
    unpaired: one letter; the honest persona is right with it, the dishonest one, asked about the
    claim's true or false twin, is wrong with it.

    Raises:
      ValueError: unpaired, and the twin of a claim is not among the claims.
    """
    matched = matched_personas(personas)
    by_id = {claim.id: claim for claim in claims}
    out = []
    for i, claim in enumerate(claims):
        other = claim if paired else _twin(claim, by_id)
        honest, dishonest = matched[i % len(matched)]
        told, lied = _lettered_in(claim, order), _lettered_in(other, order)
        sides = with_system(honest, told.messages), with_system(dishonest, lied.messages)
        out.append(Pair(sides[0], told.pos, sides[1], lied.neg, claim))
    return out


def _twin(claim: Item, by_id: dict[str, Item]) -> Item:
    twin = claim.tag("twin")
    if twin not in by_id:
        raise ValueError(
            f"{claim.id}: its twin {twin!r} is not among the claims, expected both of a pair. "
            "Give whole clusters, or use paired=True."
        )
    return by_id[twin]


def _claim(item: Item) -> str:
    if item.format != "claim" or item.label is None:
        raise ValueError(
            f"{item.id}: got a {item.format} with label {item.label}, expected a claim labelled "
            "0 or 1. Select them with select(items, format='claim')."
        )
    return item.messages[-1]["content"]


def _verdict(
    item: Item, question: str, answers: tuple[str, str], template: str, order: str = ""
) -> Contrast:
    """`answers` are those to a true and to a false claim."""
    right, wrong = answers if item.label else answers[::-1]
    messages = [*item.messages[:-1], {"role": "user", "content": question}]
    return Contrast(item, messages, right, wrong, template, order, item.label)


def _with_choices(question: str, choices: tuple[str, str], order: str) -> str:
    """The question, its choices in this order, and the cue that `before_answer` looks for."""
    if order not in ORDERS:
        raise ValueError(f"order: got {order!r}, expected one of {', '.join(ORDERS)}.")
    first, second = choices if order == "ab" else choices[::-1]
    return f"{question}\n\nChoices:\n A) {first}\n B) {second}\n\nAnswer:"


def _letters(order: str) -> tuple[str, str]:
    """Letters of the first and of the second choice."""
    return _LETTERS if order == "ab" else _LETTERS[::-1]
