"""What the untuned model computes at a run's examples, once instead of in every step.

Its cosines, residuals and how likely an answer ends, for losses that refer to them; and what enters
the lowest trained layer, since nothing below it changes: steps then begin there.
"""

import collections
import dataclasses
import hashlib
import time
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from reptune_jax.console import say
from reptune_jax.data.batches import Examples, Retention
from reptune_jax.lm import Model
from reptune_jax.model import score
from reptune_jax.model.intervene import Probe
from reptune_jax.model.read import read_at_once
from reptune_jax.model.transformer import Decoder
from reptune_jax.tuning.corpus import Corpus
from reptune_jax.tuning.objective import Objective, goal_layers, needs_anchors

# Of the runs of a study, which share examples; the oldest go when there is no room.
_known: collections.OrderedDict[str, np.ndarray] = collections.OrderedDict()
_endings: dict[str, np.ndarray] = {}


def with_base_values(c: ConfigDict, corpus: Corpus, model: Model, probe: Probe) -> Corpus:
    """The corpus with what the losses need of the untuned model."""
    B = c.eval.batch
    if needs_anchors(c):
        train, val = (add_cosines(x, model, probe, B) for x in (corpus.train, corpus.val))
        corpus = corpus._replace(train=train, val=val)
    if c.loss.ending and model.stop_ids:
        train, val = (add_endings(x, model, B) for x in (corpus.train, corpus.val))
        corpus = corpus._replace(train=train, val=val)
    if c.loss.match:
        train, val = (add_goals(x, model, goal_layers(c), B) for x in (corpus.train, corpus.val))
        corpus = corpus._replace(train=train, val=val)
    return corpus


def with_rows_below(
    c: ConfigDict, corpus: Corpus, model: Model, decoder: Decoder, objective: Objective
) -> Corpus:
    """The corpus with what enters the tuned layers, where that pays; `model` may be lent."""
    B = c.eval.batch
    sides = {k: getattr(corpus, k) for k in ("train", "val", "retention", "retention_val")}
    sides = {name: side for name, side in sides.items() if side is not None}
    gib = below_gib(model, c.train.layers[0], *sides.values())
    if not 0 < gib <= c.train.cache_gib:
        return corpus
    began = time.monotonic()
    limit = int(c.train.cache_gib * 2**30)
    known = {
        name: add_below(side, model, decoder, objective, B, limit) for name, side in sides.items()
    }
    say(
        f"layers below {c.train.layers[0]}: computed once for all rows, {gib:.2f} GiB, "
        f"in {time.monotonic() - began:.1f} s"
    )
    return corpus._replace(**known)


def add_cosines(examples: Examples, model: Model, probe: Probe, batch: int) -> Examples:
    """The examples with the untuned model's cosines, each with its own behavior's vector."""

    def cosines(tokens_BxT: Any, mask_BxT: Any, of_B: Any) -> Any:
        asked = {"probe": _of_each(probe, of_B), "hidden": False}
        found = read_at_once(model.decoder, model.params, tokens_BxT, mask_BxT, **asked)
        return found.cosine_NxBxT.swapaxes(0, 1)

    inputs = examples.tokens_BxT, examples.mask_BxT, examples.of_B
    return dataclasses.replace(examples, base_BxNxT=model.in_batches(cosines, inputs, batch))


def add_endings(examples: Examples, model: Model, batch: int) -> Examples:
    """The examples with the untuned model's log p(the answer ends) at every label."""
    inputs = examples.tokens_BxT, examples.mask_BxT, examples.at_BxL
    stop_S = np.array(model.stop_ids, np.int32)
    key = _key(model.sha, model.dtype, model.held, stop_S, *inputs)
    if key not in _endings:

        def compute(*rows: Any) -> Any:
            return score.endings(model.decoder, model.params, *rows, stop_S)

        _endings[key] = model.in_batches(compute, inputs, batch)
    # Where there are fewer candidates the rest are token 0, which may be a stop token, of weight 0.
    ends_BxL = (np.isin(examples.target_BxLxC, stop_S) & (examples.weight_BxLxC > 0)).any(-1)
    goes_on_BxL = examples.weight_BxLxC.sum(-1) * ~ends_BxL
    return dataclasses.replace(examples, ending_BxL=_endings[key], goes_on_BxL=goes_on_BxL)


def add_goals(examples: Examples, model: Model, layers: tuple[int, int], batch: int) -> Examples:
    """The examples with the untuned model's output of blocks [first, stop) at every label.

    Of the text under its persona where there is one: the answer is the same there, so a label's
    place counts from the end.
    """
    rows, at_BxL = (examples.tokens_BxT, examples.mask_BxT), examples.at_BxL
    if examples.under_BxT is not None and examples.under_mask_BxT is not None:
        rows = examples.under_BxT, examples.under_mask_BxT
        later_B = examples.under_mask_BxT.sum(1) - examples.mask_BxT.sum(1)
        at_BxL = np.maximum(at_BxL + later_B[:, None], 0)  # padding, behind a shorter prompt

    def residuals(tokens_BxT: Any, mask_BxT: Any, at_BxL: Any) -> Any:
        read_BxPxT = jax.nn.one_hot(at_BxL, tokens_BxT.shape[1])
        asked = {"read_BxPxT": read_BxPxT, "hidden": False}
        found = read_at_once(model.decoder, model.params, tokens_BxT, mask_BxT, **asked)
        # In the stream's own type: nothing is lost, and all rows are kept.
        return found.mean_NxBxPxD[slice(*layers)].swapaxes(0, 1).astype(model.dtype)

    goal = model.in_batches(residuals, (*rows, at_BxL), batch)
    without = {"under_BxT": None, "under_mask_BxT": None}
    return dataclasses.replace(examples, goal_BxMxLxD=goal, **without)


def below_gib(model: Model, first: int, *sides: Examples | Retention) -> float:
    """What `add_below` would hold on the host; 0 where there is no layer below."""
    tokens = sum(side.tokens_BxT.size for side in sides)
    return bool(first) * tokens * model.arch.D * model.dtype.itemsize / 2**30


def add_below(
    side: Examples | Retention,
    model: Model,
    decoder: Decoder,
    objective: Objective,
    batch: int,
    limit: int = 2**32,
) -> Any:
    """With the residual stream that enters the segment `tuned`, and an example's cosines below it.

    What enters depends on model and tokens only; cosines also on the probe. `limit` is the bytes
    that are remembered for the runs that follow.
    """

    def below(tokens_BxT: Any, mask_BxT: Any, *of: Any) -> Any:
        asked = {"probe": _of_each(objective.probe, of[0])} if of else {}
        found = read_at_once(
            decoder, objective.frozen, tokens_BxT, mask_BxT, leave="tuned", **asked
        )
        cosine = None if found.cosine_NxBxT is None else found.cosine_NxBxT.swapaxes(0, 1)
        return found.hidden_BxTxD, cosine

    tokens = side.tokens_BxT, side.mask_BxT
    entered = _key(model.sha, model.dtype, model.held, decoder.segments, *tokens)
    if isinstance(side, Retention):
        if entered not in _known:
            _remember(entered, model.in_batches(below, tokens, batch)[0], limit)
        return dataclasses.replace(side, below_BxTxD=_known[entered])
    probed = _key(entered, side.of_B, *map(np.asarray, jax.tree.leaves(objective.probe)))
    if entered not in _known or probed not in _known:
        x_BxTxD, cosine_BxMxT = model.in_batches(below, (*tokens, side.of_B), batch)
        _remember(entered, _known.get(entered, x_BxTxD), limit)
        _remember(probed, cosine_BxMxT, limit)
    return dataclasses.replace(side, below_BxTxD=_known[entered], below_cosine_BxMxT=_known[probed])


def _of_each(probe: Probe, of_B: Any) -> Probe:
    return jax.tree.map(lambda a: a[:, of_B], probe)


def _key(*parts: Any) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
    return found.hexdigest()


def _remember(key: str, value: np.ndarray, limit: int) -> None:
    """As the newest; older ones go until all fit, but never the last two, which are in use."""
    _known.pop(key, None)
    _known[key] = value
    while len(_known) > 2 and sum(a.nbytes for a in _known.values()) > limit:
        _known.popitem(last=False)
