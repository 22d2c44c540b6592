"""lm-evaluation-harness asks one of our models, steered or not. No torch.

Unlike the other modules this needs an extra: `pip install "reptune_jax[lmeval]"`.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, handle_non_serializable, make_disjoint_window
from lm_eval.utils import make_table as table

from reptune_jax.console import counted
from reptune_jax.evals.arms import Condition
from reptune_jax.evals.suites import shared
from reptune_jax.evals.suites.scoring import encoder
from reptune_jax.evals.suites.shared import Scored
from reptune_jax.hub import templates, text
from reptune_jax.hub.endings import said
from reptune_jax.lm import Model
from reptune_jax.model.sampling import Sampling

_BATCHES = 4  # between two steps of the progress bar
_LONGEST = 2048  # tokens, where the model does not say what it reads
_NEW = 256  # tokens of an answer, where the task does not say; as the harness has it


__all__ = ["Harness", "TaskManager", "as_json", "simple_evaluate", "table"]


def as_json(results: Any) -> str:
    """The harness's results as it writes them itself."""
    return json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)


class Harness(LM):
    """A model as the harness's `LM`: `lm_eval.simple_evaluate(model=Harness(model), tasks=…)`.

    What is asked is a condition, or a plain model: a vector is added at every token, a persona
    stands in front as a paragraph. Context and continuation are tokenised together; what is longer
    than the model's context loses its beginning.
    """

    def __init__(self, asked: Condition | Model, batch: int = 32):
        super().__init__()
        self.cond = asked if isinstance(asked, Condition) else Condition(asked, "base")
        self.model, self.batch = self.cond.model, batch
        self.longest = self.model.context or _LONGEST
        self.encode = encoder(self.cond)

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log p(continuation | context), whether greedy decoding gives it) of each."""
        pairs = []
        for context, continuation in (request.args for request in requests):
            bare = context.rstrip()  # the harness counts space between the two as the second's
            pairs.append(self.encode(bare, context[len(bare) :] + continuation))
        found = self._score(pairs, disable_tqdm)
        for request, score in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, score)
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """log p of whole texts, every token once, in windows of the model's context.

        A text starts after the BOS (or the token that ends), which itself is not scored.
        """
        tokenizer, model = self.model.tokenizer, self.model
        bos = tokenizer.bos_token_id
        first = next(iter(model.stop_ids), model.pad_id) if bos is None else bos
        windows: list[tuple[int, Scored]] = []
        for i, request in enumerate(requests):
            ids = tokenizer.encode(request.args[0], add_special_tokens=False)
            # One less than is read: what is scored last is fed as well.
            cut = get_rolling_token_windows(ids, first, self.longest - 1, context_len=1)
            for before, after in map(make_disjoint_window, cut):
                windows.append((i, Scored((*before, *after), len(before))))
        total = [0.0] * len(requests)
        scores = self._score([window for _, window in windows], disable_tqdm)
        for (i, _), (logp, _) in zip(windows, scores, strict=True):
            total[i] += logp
        for request, logp in zip(requests, total, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, logp)
        return total

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers up to the first of the task's stop texts, greedy unless it samples."""
        answers = [""] * len(requests)
        alike: dict[str, list[int]] = {}  # requests that are generated in one way
        for i, request in enumerate(requests):
            alike.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        with counted(len(requests), "answering", disable_tqdm) as bar:
            for of in alike.values():
                for start in range(0, len(of), _BATCHES * self.batch):
                    part = of[start : start + _BATCHES * self.batch]
                    contexts, how = [requests[i].args[0] for i in part], requests[part[0]].args[1]
                    for i, answer in zip(part, self._answers(contexts, how), strict=True):
                        answers[i] = answer
                        self.cache_hook.add_partial("generate_until", requests[i].args, answer)
                    bar.update(len(part))
        return answers

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The chat as text; without a generation prompt its last turn stays open."""
        shown = templates.chat_text(self.model.tokenizer, chat_history, add_generation_prompt)
        if add_generation_prompt:
            return shown
        last = chat_history[-1]["content"].strip()
        return shown[: shown.rindex(last) + len(last)]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """What identifies the template in the harness's records."""
        return self.model.tokenizer.chat_template if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """What identifies the tokenizer in the harness's caches."""
        return self.model.name.replace("/", "__")

    def _score(self, pairs: Sequence[Scored], quiet: bool) -> list[tuple[float, bool]]:
        found: dict[Scored, tuple[float, bool]] = {}
        with counted(len({*pairs}), self.cond.title, quiet) as bar:
            for part in shared.scores(self.cond, pairs, self.batch):
                found |= part
                bar.update(len(part))
        finite = [math.isfinite(logp) for logp, _ in found.values()]
        self.model.check_finite(finite, "scores", self.cond.steer)
        return [found[pair] for pair in pairs]

    def _answers(self, contexts: Sequence[str], how: dict[str, Any]) -> list[str]:
        """Of prompts that are answered alike; `how` is the task's generation_kwargs."""
        new = next((how[k] for k in ("max_gen_toks", "max_new_tokens") if k in how), _NEW)
        warm = float(how.get("temperature", 1.0)) if how.get("do_sample") else 0.0
        options = {k: how[k] for k in ("top_k", "top_p", "repetition_penalty") if k in how}
        until = how.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        room = self.longest - int(new)
        if room < 1:
            raise ValueError(
                f"max_gen_toks: got {new}, expected fewer than the {self.longest} tokens that "
                f"{self.model.name} reads. Set it in the task's generation_kwargs."
            )
        prompts = [text.encode(self.model.tokenizer, context)[-room:] for context in contexts]
        drawn = Sampling.of(warm, **options)
        ids = self.model.generate_each(prompts, int(new), drawn, self.cond.steer, self.batch)
        answers = []
        for row in ids:
            answer = said(self.model.tokenizer, row)
            for stop in filter(None, stops):
                answer = answer.partition(stop)[0]
            answers.append(answer)
        return answers
