"""The judge of `rubric` behind an OpenAI-compatible endpoint: asked once a text, kept on disk.

The key comes from the environment and is written nowhere. What was answered is kept as it came, so
that a study that is stopped, or measured again, asks for nothing twice.
"""

import collections
import hashlib
import json
import math
import os
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from reptune_jax.console import say
from reptune_jax.evals import rubric
from reptune_jax.evals.probe import Texts
from reptune_jax.reading import short

KEYS = ("REPTUNE_JUDGE_KEY", "OPENAI_API_KEY")  # the second for its own host alone
_OWN_HOST = "api.openai.com"
_TRIES, _LOST = 5, 3  # of one text; texts in a row without an answer, after which nobody is there
_WAIT, _LONGEST, _TIMEOUT = 1.0, 60.0, 60.0  # seconds
_AT_ONCE = 8
_AGAIN = (408, 409, 425, 429)  # and 500 on: worth another try


class Place(NamedTuple):
    """Whom to ask."""

    url: str  # of the API, before /chat/completions
    model: str

    @classmethod
    def parse(cls, text: str) -> "Place":
        """MODEL@URL.

        Raises:
          ValueError: it is not; or the URL has a password or a query, which would be written down.
        """
        model, _, url = text.partition("@")
        parts = urllib.parse.urlsplit(url)
        fits = parts.scheme in ("http", "https") and parts.hostname and model
        if not fits or "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError(
                f"eval.judge: got 'openai:{model}@{parts.scheme}://{parts.hostname or ''}…', "
                "expected openai:MODEL@URL without password or query, as in "
                f"openai:small@http://localhost:8000/v1. Give the key in {KEYS[0]}."
            )
        return cls(url.rstrip("/"), model)


class Endpoint:
    """Scores texts; counts what that took. `cache` is a file of one answer a line."""

    def __init__(self, place: Place, description: str, scale: tuple[int, int], cache: Path) -> None:
        self.place, self.description, self.scale, self.cache = place, description, scale, cache
        self.used: collections.Counter[str] = collections.Counter()
        self._known = {row["key"]: row for row in answers(cache)}
        self._lock, self._lost, self._logprobs = threading.Lock(), 0, scale[1] < 10
        host = urllib.parse.urlsplit(place.url).hostname
        names = KEYS if host == _OWN_HOST else KEYS[:1]
        self._key = next((os.environ[name] for name in names if os.environ.get(name)), "")
        self._opener = urllib.request.build_opener(_NoRedirect)  # a key goes to nobody else

    def score(self, texts: Texts) -> list[float]:
        """The score of each text; NaN where there is none.

        Raises:
          ValueError: the endpoint refuses, or several texts in a row get no answer.
        """
        before = self.used.copy()
        pool = ThreadPoolExecutor(_AT_ONCE)
        try:
            found = list(pool.map(lambda one: self._score(*one), texts))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        new = self.used - before
        if new["asked"]:
            say(
                f"judge {self.place.model}: {new['asked']} texts asked, {new['kept']} known, "
                f"{new['failed']} without an answer; {new['prompt_tokens']:,} + "
                f"{new['completion_tokens']:,} tokens"
            )
        return found

    def _score(self, item: Any, answer: str) -> float:
        asked = rubric.question(self.description, self.scale, item, answer)
        request = {
            "model": self.place.model,
            "messages": [{"role": "user", "content": asked}],
            "temperature": 0,
            "max_tokens": 4,
            "seed": 0,
        }
        whole = json.dumps([self.place.url, request], sort_keys=True)
        key = hashlib.sha256(whole.encode()).hexdigest()[:32]
        with self._lock:
            row = self._known.get(key)
            self.used["kept" if row else "asked"] += 1
        if row is None:
            row = self._ask(request)
            with self._lock:
                self._lost = 0 if row else self._lost + 1
                self.used["failed"] += row is None
                if row is not None:
                    row["key"] = key
                    self._keep(row)
                elif self._lost >= _LOST:
                    raise ValueError(
                        f"eval.judge {self.place.url}: got no answer to {_LOST} texts in a row, "
                        f"{_TRIES} tries each, expected some. What was answered is kept: the same "
                        "command goes on."
                    )
        return math.nan if row is None else self._read(row)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """What was answered; None after as many tries as there may be."""
        for attempt in range(_TRIES):
            more = {"logprobs": True, "top_logprobs": 20} if self._logprobs else {}
            wait = min(_WAIT * 2**attempt, _LONGEST)
            try:
                return self._reply(request | more)
            except urllib.error.HTTPError as error:
                said = error.read(2000).decode(errors="replace")
                said = said.replace(self._key, "…") if self._key else said
                if error.code == 400 and self._logprobs and "logprob" in said:
                    self._logprobs = False  # it has none
                    continue
                if error.code < 500 and error.code not in _AGAIN:
                    advice = f"Set the key in {KEYS[0]}." if error.code in (401, 403) else ""
                    raise ValueError(
                        f"eval.judge {self.place.url}: got status {error.code}: {short(said)}, "
                        f"expected an answer of {self.place.model}. {advice}".rstrip()
                    ) from None
                after = error.headers.get("Retry-After", "")
                wait = min(float(after), _LONGEST) if after.isdecimal() else wait
            except (OSError, ValueError, LookupError, TypeError, AttributeError):
                pass  # nobody there, or what came is no reply
            if attempt + 1 < _TRIES:
                time.sleep(wait)
        return None

    def _reply(self, request: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        url = f"{self.place.url}/chat/completions"
        asked = urllib.request.Request(url, json.dumps(request).encode(), headers)
        with self._opener.open(asked, timeout=_TIMEOUT) as answer:
            reply = json.loads(answer.read())
        choice, used = reply["choices"][0], reply.get("usage") or {}
        spent = {name: int(used.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")}
        first = ((choice.get("logprobs") or {}).get("content") or [{}])[0]
        top = [[one["token"], float(one["logprob"])] for one in first.get("top_logprobs") or ()]
        with self._lock:
            self.used.update(spent)
        said = str(choice["message"].get("content") or "")
        return {"model": self.place.model, "said": said, "top": top, **spent}

    def _keep(self, row: dict[str, Any]) -> None:
        self._known[row["key"]] = row
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        with self.cache.open("a+b") as file:
            file.seek(max(file.tell() - 1, 0))
            cut = file.read() not in (b"", b"\n")  # by a kill, in the middle of a line
            file.write(b"\n" * cut + json.dumps(row).encode() + b"\n")

    def _read(self, row: dict[str, Any]) -> float:
        """By the probabilities of the first token, else the number that was said."""
        low, high = self.scale
        known = [(n, logp) for token, logp in row["top"] if (n := token.strip()).isdecimal()]
        found = [(int(n), logp) for n, logp in known if low <= int(n) <= high]
        if found:
            numbers, logp = zip(*found, strict=True)
            if math.isfinite(score := rubric.expected(logp, numbers)):
                return score
        said = re.search(r"\d+", row["said"])
        return float(said[0]) if said and low <= int(said[0]) <= high else math.nan


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:
        return None


def answers(cache: Path) -> list[dict[str, Any]]:
    """What is kept; a last line that was cut is left out."""
    if not cache.exists():
        return []
    rows = []
    for line in cache.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
            if {"key", "said", "top"} <= row.keys():
                rows.append(row)
        except (ValueError, AttributeError):
            continue
    return rows
