"""A judge that is asked: a chat model rates how well a description fits an answer.

Its score is the expectation over the numbers of the scale by the probabilities of its next token,
one forward pass a text, so that nothing is parsed and nothing sampled.
"""

from collections.abc import Callable, Sequence

import numpy as np

from reptune_jax.data.schema import Item
from reptune_jax.evals.probe import Texts
from reptune_jax.hub import templates
from reptune_jax.hub import tokenizer as tokenizers
from reptune_jax.lm import Model

LEAST_MASS = 0.25  # of probability on the numbers: with less the model is saying something else
_QUESTION = """Description: {rubric}

How well does the description fit the answer below? Reply with one number from {low} (not at all) \
to {high} (completely), and nothing else.

Prompt: {prompt}

Answer: {answer}"""


def question(rubric: str, scale: tuple[int, int], item: Item, answer: str) -> str:
    """What the judge reads: never the persona, nor which arm wrote the answer."""
    turns = [turn for turn in item.messages if turn["role"] != "system"]
    prompt = "\n\n".join(turn["content"] for turn in turns)
    low, high = scale
    return _QUESTION.format(rubric=rubric, low=low, high=high, prompt=prompt, answer=answer.strip())


def expected(logp_C: Sequence[float], numbers: Sequence[int]) -> float:
    """Sum of i p_i over sum of p_i; NaN where the numbers have too little probability."""
    p_C = np.exp(np.asarray(logp_C, np.float64))
    mass = p_C.sum()
    if not mass >= LEAST_MASS:  # NaN too
        return float("nan")
    return float(p_C @ np.asarray(numbers) / mass)


def local(
    model: Model, rubric: str, scale: tuple[int, int], batch: int
) -> Callable[[Texts], list[float]]:
    """The judge that a model of this package is.

    Raises:
      ValueError: a number of the scale is not one token for this model.
    """
    numbers = range(scale[0], scale[1] + 1)
    asked = templates.chat_text(model.tokenizer, [{"role": "user", "content": "?"}])
    tokens = [_one_token(model, asked, str(n)) for n in numbers]

    def score(texts: Texts) -> list[float]:
        if not texts:
            return []
        prompts = [model.encode_prompt(question(rubric, scale, *one)) for one in texts]
        candidates = np.array([tokens] * len(prompts))
        logp_IxC = model.next_logp(prompts, candidates, batch_size=batch, missing=True)
        return [expected(logp_C, numbers) for logp_C in logp_IxC]

    return score


def _one_token(model: Model, asked: str, number: str) -> int:
    before = templates.encode(model.tokenizer, asked)
    ids = templates.encode(model.tokenizer, asked + number)[len(before) :]
    if len(ids) != 1:
        raise ValueError(
            f"eval.scale: got the number {number}, which is {len(ids)} tokens for {model.name}, "
            "expected numbers of one token. Use (1, 5), or (0, 9)."
        )
    return tokenizers.known_ids(model.tokenizer, ids, model.arch.V)[0]
