"""Whether two models predict the same: the check after a conversion."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.special import log_softmax

from reptune_jax.lm import Model
from reptune_jax.model.padding import pad

TEXTS = (
    "The river is wide here, and the ferry crosses it twice a day until the ice comes.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "Question: Is the moon larger than the sea?\nAnswer: It depends on what is measured.",
    "1, 1, 2, 3, 5, 8, 13, 21, 34, 55. Was kommt als nächstes? 下一个数是多少?",
)
_LENGTH = 32  # of random tokens, where a model has no tokenizer

Batch = tuple[np.ndarray, np.ndarray]  # tokens, mask


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far apart, over all tokens of the texts."""

    logit: float  # largest difference, as a share of the largest logit
    kl: float  # mean KL(source || result), nats per token
    agreement: float  # share of tokens with the same greedy next token

    def __str__(self) -> str:
        return (
            f"max logit difference {self.logit:.1e} of the largest, KL {self.kl:.1e} nats/token, "
            f"greedy agreement {self.agreement:.1%}"
        )

    def within(self, allowed: "Difference") -> bool:
        """NaN is never within."""
        small = self.logit <= allowed.logit and self.kl <= allowed.kl
        return bool(small and self.agreement >= allowed.agreement)


# What rounding may change, by the type that the result is stored in; a result in its source's own
# type differs by nothing.
ALLOWED = {
    "float32": Difference(1e-4, 1e-6, 0.99),
    "float16": Difference(0.02, 1e-3, 0.98),
    "bfloat16": Difference(0.1, 0.02, 0.9),
}


def batches(model: Model) -> list[Batch]:
    """The built-in texts, one a batch: nothing depends on padding."""
    if model.tokenizer is None:
        draw = np.random.default_rng(0)
        ids = [draw.integers(0, model.arch.V, _LENGTH).tolist() for _ in TEXTS]
    else:
        ids = [model.encode_prompt(text, chat=False) for text in TEXTS]
    return [pad([row], 0, left=False) for row in ids]


def logits(model: Model, given: Sequence[Batch]) -> list[np.ndarray]:
    """Float32 logits of each batch's real tokens, [tokens, V]."""
    out = []
    for tokens, mask in given:
        logits_BxTxV = np.asarray(model.forward(tokens, mask).logits_BxTxV)
        out.append(logits_BxTxV[mask.astype(bool)])
    return out


def compare(before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> Difference:
    """Both models' logits of the same tokens."""
    a_PxV, b_PxV = np.concatenate(before), np.concatenate(after)
    logp_PxV, logq_PxV = log_softmax(a_PxV, axis=-1), log_softmax(b_PxV, axis=-1)
    kl_P = (np.exp(logp_PxV) * (logp_PxV - logq_PxV)).sum(-1)
    return Difference(
        logit=float(np.abs(a_PxV - b_PxV).max() / np.abs(a_PxV).max()),
        kl=float(max(kl_P.mean(), 0.0)) if np.isfinite(kl_P).all() else float("nan"),
        agreement=float((a_PxV.argmax(-1) == b_PxV.argmax(-1)).mean()),
    )
