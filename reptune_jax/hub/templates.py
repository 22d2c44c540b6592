"""Chat templates: messages to text and ids, what a template is given, which day it is in one."""

import datetime
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from reptune_jax.hub import template_bounds

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedTokenizerBase

_TODAY = "strftime_now"  # a function, in templates; among arguments, the day that it tells
_CALL = re.compile(_TODAY + r"\(\s*(['\"])(.*?)\1\s*\)")
# What transformers gives to every template, and what a chat without tools and documents lacks.
_GIVEN = {"messages", "add_generation_prompt", "raise_exception", "range", "namespace", _TODAY}
_OTHER_USES = re.compile("tool|document|_token$|_tokens_map$|continue_final_message")
_MASK = re.compile("\ue000(\\d+)\ue001")  # a control token within a message, by its id


def chat_text(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Mapping[str, str]],
    add_generation_prompt: bool = True,
) -> str:
    """Renders messages with the model's own template, special tokens included; for `encode`.

    Control tokens within a message are text there, and end no turn: they are masked.
    """
    import jinja2

    if not tokenizer.chat_template:
        raise ValueError(
            "chat_template: the tokenizer has none, expected one for chat messages. "
            "Use an instruct model, or give raw text."
        )
    given, template = arguments(tokenizer), tokenizer.chat_template
    if day := given.pop(_TODAY, ""):
        template = _CALL.sub(_told(datetime.date.fromisoformat(day)), template)
    turns = [{**m, "content": _masked(tokenizer, m["content"])} for m in messages]
    try:
        with template_bounds.bounded(str(template)):
            text = tokenizer.apply_chat_template(
                turns,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                chat_template=template,
                **given,
            )
    except template_bounds.Unbounded:
        raise
    except jinja2.TemplateError as error:
        roles = [m.get("role") for m in messages]
        raise ValueError(
            f"messages: the model's chat template refuses roles {roles}: {error}"
        ) from None
    except Exception as error:  # it is a program from a file, and may raise anything
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(f"chat_template: cannot be rendered ({why}). Correct it.") from None
    return template_bounds.check_text(str(text), sum(len(turn["content"]) for turn in turns))


def prompt_text(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Mapping[str, str]]) -> str:
    """What an answer follows; an assistant turn at the end is what it begins with already."""
    if len(messages) < 2 or messages[-1].get("role") != "assistant":
        return chat_text(tokenizer, messages)
    return chat_text(tokenizer, messages[:-1]) + _masked(tokenizer, messages[-1]["content"])


def encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Ids of a rendered chat. The template has written its special tokens: none are added."""
    check_text(text)
    ids: list[int] = []
    for i, part in enumerate(_MASK.split(text)):
        if i % 2:  # between two pieces, so that nothing is merged with what is around it
            token = str(tokenizer.added_tokens_decoder[int(part)])
            ids += tokenizer.encode(token, add_special_tokens=False, split_special_tokens=True)
        else:
            ids += tokenizer.encode(part, add_special_tokens=False)
    return ids


def check_text(text: str) -> None:
    """Raises ValueError for half a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        around = text[max(0, e.start - 20) : e.start + 20]
        raise ValueError(
            f"text: got half a surrogate pair in {around!r}, expected whole characters. Decode its "
            "source again, or drop it."
        ) from None


def use(tokenizer: "PreTrainedTokenizerBase", given: Mapping[str, Any]) -> None:
    """Renders every chat with these variables from here on."""
    tokenizer.template_arguments = dict(given)


def arguments(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """What `use` was given; a day is "YYYY-MM-DD"."""
    return dict(getattr(tokenizer, "template_arguments", {}))


def freeze(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """The arguments, with today in them where the template prints it, so that it stays today.

    A study may run over midnight, and is resumed and reported on other days.
    """
    given = arguments(tokenizer)
    if _TODAY in str(tokenizer.chat_template) and _TODAY not in given:
        given[_TODAY] = datetime.date.today().isoformat()
        use(tokenizer, given)
    return given


def unset(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Variables that the template reads and that nobody gives; not those of tools."""
    import jinja2
    from jinja2 import meta, nodes

    if not isinstance(tokenizer.chat_template, str):
        return []
    plain = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", tokenizer.chat_template)  # not jinja's
    try:
        syntax = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except (jinja2.TemplateError, RecursionError):  # `chat_text` says what is wrong with it
        return []
    # What it sets itself, if only where it is not given, has a default.
    own = {
        name.name for set_ in syntax.find_all(nodes.Assign) for name in set_.find_all(nodes.Name)
    }
    found = meta.find_undeclared_variables(syntax) - own - _GIVEN - arguments(tokenizer).keys()
    return sorted(name for name in found if not _OTHER_USES.search(name))


def parse(text: str) -> dict[str, Any]:
    """`template_arguments` of a config.

    Raises:
      ValueError: not a JSON object, or a day that is none.
    """
    example = "Example: '{\"enable_thinking\": false}'."
    try:
        given = json.loads(text or "{}")
    except ValueError as e:
        raise ValueError(f"template_arguments: got {text!r} ({e}), expected JSON. {example}") from e
    if not isinstance(given, dict):
        raise ValueError(f"template_arguments: got {text!r}, expected a JSON object. {example}")
    try:
        datetime.date.fromisoformat(given.get(_TODAY, "2026-01-01"))
    except (TypeError, ValueError):
        raise ValueError(
            f"template_arguments: {_TODAY}: got {given[_TODAY]!r}, expected a day, YYYY-MM-DD."
        ) from None
    return given


def template_sha(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Identifies the chat template a vector was read under."""
    return hashlib.sha256(str(tokenizer.chat_template or "").encode()).hexdigest()[:12]


def _told(day: datetime.date) -> Callable[[re.Match[str]], str]:
    """A template's call for today's date as the text that it gave on that day."""
    return lambda call: json.dumps(day.strftime(call[2]))


def _masked(tokenizer: "PreTrainedTokenizerBase", content: str) -> str:
    special = {str(t): i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    for token in sorted(filter(None, special), key=len, reverse=True):
        if token in content:
            content = content.replace(token, f"\ue000{special[token]}\ue001")
    return content
