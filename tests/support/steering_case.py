"""Vectors, batches and torch hooks that the tests of steering and baking share."""

import numpy as np
import torch

import reptune_jax as rt
from tests.support import tiny
from tests.support import torch_reference as ref

TOLERANCE = 1e-4  # of the largest logit


def make_vector(seed=0, layers=range(4), N=4, D=64, **meta):
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((N, D)).astype(np.float32)
    directions *= np.isin(np.arange(N), list(layers))[:, None]
    norms = rng.uniform(2, 9, N).astype(np.float32)
    mean = rng.standard_normal((N, D)).astype(np.float32)
    return rt.SteeringVector(directions, norms, mean, tuple(layers), {"norm": "raw", **meta})


def draw_batch():
    ids = np.random.default_rng(0).integers(4, tiny.VOCAB, (3, 24)).astype(np.int32)
    mask = np.array([np.arange(24) < n for n in (24, 17, 5)]).astype(np.int32)
    return ids, mask


def hooks(dose_NxD):
    return {l: torch.tensor(v) for l, v in enumerate(np.asarray(dose_NxD)) if np.any(v)}


def assert_equals_torch(logits, hf_model, ids, mask, vectors):
    want = ref.steered_logits(hf_model, torch.tensor(ids).long(), torch.tensor(mask), vectors)
    want, real = want.numpy(), mask.astype(bool)
    assert np.abs(np.asarray(logits) - want)[real].max() < TOLERANCE * np.abs(want[real]).max()
