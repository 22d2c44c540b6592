"""Adapters made by peft with random weights, and logits of both sides."""

import json

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

from tests.support import torch_reference as ref

TOLERANCE = 1e-4


def torch_logits(hf, ids):
    with torch.no_grad():
        return hf(torch.tensor(ids)).logits.numpy()


def ours(model, ids):
    return np.asarray(model.forward(ids.astype(np.int32)).logits_BxTxV)


def assert_same(got, want, other):
    """Equal to `want`, and visibly not to `other`."""
    scale = np.abs(want).max()
    np.testing.assert_allclose(got, want, atol=TOLERANCE * scale)
    assert np.abs(want - other).max() > 1e-2 * scale


def randomize(theirs, seed=0, scale=0.1):
    draw = torch.Generator().manual_seed(seed)
    for name, weight in theirs.named_parameters():
        if "lora_" in name:
            weight.data = scale * torch.randn(weight.shape, generator=draw)


def peft_adapter(folder, out, seed=0, **settings):
    """An adapter that peft made, with random weights; returns the torch model."""
    config = LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 6, **settings})
    theirs = get_peft_model(ref.load(folder), config)
    randomize(theirs, seed)
    theirs.save_pretrained(out)
    return theirs.eval()


def change(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
