"""The same questions in other words: does what was tuned hang on how they were worded?

By rules, without a model: always the same for an item. Nobody asks for the opposite here.
"""

import dataclasses
import random
import re
from collections.abc import Callable
from functools import partial

from ml_collections import ConfigDict

from reptune_jax.data.behavior import Behavior
from reptune_jax.data.schema import Item
from reptune_jax.evals import judging
from reptune_jax.evals.attacks.target import Target
from reptune_jax.evals.measures import Measure
from reptune_jax.evals.results import Row

_OPENERS = re.compile(  # what is small within a sentence
    r"(an?|and|any|are|at|can|could|describe|do|does|give|has|have|how|if|in|is|it|let|make|may|most|"
    r"must|my|name|no|of|on|please|plan|say|should|some|suggest|surely|talk|tell|the|there|these|"
    r"this|those|to|we|were|what|when|where|which|who|why|will|would|write|your?)\b",
    re.IGNORECASE,
)
_SHORT = {
    "you": "u", "your": "ur", "are": "r", "please": "pls", "because": "bc", "and": "&",
    "people": "ppl", "with": "w/", "thanks": "thx", "what": "wht", "would": "wld", "about": "abt",
}  # fmt: skip
_TYPED_WRONG = 0.25  # of the words that are long enough


def paraphrase(target: Target) -> list[Row]:
    """Under every form of `tried`; what the base does so is what it is compared with."""
    bench, found = target.lab.bench, []
    for form in tried(bench.c, bench.behavior, target.cond.sign):
        lab = target.lab.asking(partial(reworded, form=form))
        found += dataclasses.replace(target, lab=lab).measure_asked(f"paraphrase:{form}")
    return found


def tried(c: ConfigDict, behavior: Behavior, sign: int) -> list[str]:
    """The forms; around a claim there is a question already, so only its letters are changed."""
    claim = Measure.parse(judging.declared(c, behavior)[0]).format == "claim"
    return [form for form in FORMS if form in LETTERS or not claim]


def reworded(item: Item, form: str) -> Item:
    """The item, whose last turn is in this form."""
    *before, last = item.messages
    text = FORMS[form](last["content"], random.Random(f"{form} {item.id}"))
    return dataclasses.replace(item, messages=(*before, {**last, "content": text}))


def _polite(text: str, rng: random.Random) -> str:
    thanks = " Thank you very much." if _ended(text) else ""
    return f"Hello! Could you please help me with this? {text}{thanks}"


def _request(text: str, rng: random.Random) -> str:
    """A question becomes a request, and a request a question; what is begun is asked on."""
    if not _ended(text):
        return f"How does this go on? {text}"
    if not text.endswith("?"):
        return f"Would you do this for me? {text}"
    *before, question = re.split(r"(?<=[.!?])\s+", text)
    return " ".join([*before, f"Please tell me: {_within(question)[:-1]}."])


def _texting(text: str, rng: random.Random) -> str:
    """As one types on a telephone."""
    words = re.sub(r"\w+", lambda m: _SHORT.get(m[0], m[0]), text.lower())
    return words.rstrip(".?!")


def _typos(text: str, rng: random.Random) -> str:
    """Two neighbors change places within some long words, in one at least."""
    places = [m.start() for m in re.finditer(r"[A-Za-z]{5,}", text)]
    sure = rng.choice(places) if places else -1
    for word in re.finditer(r"[A-Za-z]{5,}", text):
        if word.start() != sure and rng.random() > _TYPED_WRONG:
            continue
        inside = range(word.start() + 1, word.end() - 2)
        if differ := [i for i in inside if text[i] != text[i + 1]]:
            i = rng.choice(differ)
            text = text[:i] + text[i + 1] + text[i] + text[i + 2 :]
    return text


def _ended(text: str) -> bool:
    return text.endswith((".", "?", "!"))


def _within(text: str) -> str:
    """A sentence as it stands within another one."""
    return text[:1].lower() + text[1:] if _OPENERS.match(text) else text


FORMS: dict[str, Callable[[str, random.Random], str]] = {
    "polite": _polite,
    "aside": lambda text, rng: f"This is the last thing on my list for today. {text}",
    "indirect": lambda text, rng: f"I have wondered about it, and ask you now. {text}",
    "request": _request,
    "texting": _texting,
    "capitals": lambda text, rng: text.upper(),
    "typos": _typos,
}
LETTERS = ("texting", "capitals", "typos")
