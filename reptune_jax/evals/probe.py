"""A judge made of the untuned model: a linear classifier of how it reads an answer.

Its features are the mean residual over the answer's tokens at one layer, of the untuned model,
whatever arm wrote the answer; it learns from a behavior's own labelled answers of the splits that
no result comes from.
"""

from collections.abc import Callable, Sequence

import numpy as np

from reptune_jax import mesh as meshes
from reptune_jax.data.schema import Item
from reptune_jax.lm import Model
from reptune_jax.model.padding import batches_by_length
from reptune_jax.vectors.capture import Span, read_batch

Texts = Sequence[tuple[Item, str]]  # an answer with the item it answers
_STRENGTH = 0.01  # of the inverse regularisation, of standardised features


def train(
    features: Callable[[Texts], np.ndarray], texts: Texts, labels: Sequence[int]
) -> Callable[[Texts], list[float]]:
    """Log-odds that an answer shows the behavior, as a function of answers; `features` are [I, D].

    Raises:
      ValueError: labels of one kind only.
    """
    from sklearn.linear_model import LogisticRegression  # seconds, and only this judge needs it
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(set(labels)) < 2:
        raise ValueError(
            f"eval.judge: got {len(labels)} labelled answers of splits train and tune, expected "
            "some with and some against the behavior, which the judge learns from. Add pos and neg."
        )
    fitted = make_pipeline(StandardScaler(), LogisticRegression(C=_STRENGTH, max_iter=2000))
    fitted.fit(features(texts), labels)
    return lambda asked: fitted.decision_function(features(asked)).tolist() if asked else []


def residuals(model: Model, layer: int, batch: int) -> Callable[[Texts], np.ndarray]:
    """Mean residual over each answer's tokens at the output of a 0-based block, [I, D]."""

    def of(texts: Texts) -> np.ndarray:
        spans = []
        for item, answer in texts:
            prompt = model.encode_prompt(list(item.messages))
            ids = prompt + model.tokenizer.encode(answer.strip(), add_special_tokens=False)
            ids = ids[: model.context]
            # An answer of no words is where it would begin.
            spans.append(Span(ids, min(len(prompt), len(ids) - 1), len(ids)))
        found = np.zeros((len(spans), model.arch.D), np.float32)
        for rows in batches_by_length([len(span.ids) for span in spans], batch):
            read_NxBxD = read_batch(model, [spans[r] for r in rows], batch)
            found[rows] = meshes.fetch(read_NxBxD[layer])
        return found

    return of


def embeddings(name: str) -> Callable[[Texts], np.ndarray]:
    """Of answers alone by a model of the sentence-transformers library, if it is installed.

    Raises:
      ValueError: it is not.
    """
    try:
        from sentence_transformers import SentenceTransformer  # type: ignore[import-not-found]
    except ImportError:
        raise ValueError(
            f"eval.judge: got 'embed:{name}', expected the package sentence-transformers to be "
            "installed for it. Install it, or use 'probe', which needs none."
        ) from None
    encoder = SentenceTransformer(name)
    return lambda texts: np.asarray(encoder.encode([answer for _, answer in texts]))
