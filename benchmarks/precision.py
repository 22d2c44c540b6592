"""How far this device is from float64: attention by each kernel, a whole model in each type.

    python -m benchmarks.precision [--model FOLDER] [--attention-only]

Everything is held against the same computation in float64, of inputs and weights that are rounded
to the type first; torch's error on the same device stands beside ours. Errors are of norms,
|x - x64| / |x64|. Windows are tried at their edge: rows one token shorter than the window, as long,
one longer. Ends with exit code 1 where ours is above what the type allows, and twice torch's.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

from reptune_jax import lm
from reptune_jax.model import attention

# A key too many, or too few, of a window of 8 is off by more than a tenth.
ATTENTION = {"float32": 1e-6, "bfloat16": 5e-3, "float16": 6e-4}
MODEL = {"float32": 2e-5, "bfloat16": 3e-2, "float16": 4e-3}  # errors of many layers
TEXTS = (
    "The weather in the mountains changes within the hour, so take a coat with you.",
    "Water boils at a lower temperature where the air is thin.",
    "She opened the letter, read it twice, and put it back into the drawer.",
    "A prime number has exactly two divisors: one and itself.",
)
HEADER = "| what | type | ours | torch |\n|---|---|---|---|"


class Line(NamedTuple):
    """Relative errors against float64, and what the type allows."""

    what: str
    dtype: str
    ours: float
    torch: float
    allowed: float

    @property
    def fine(self) -> bool:
        """Whether ours is what the type allows."""
        return self.ours <= max(self.allowed, 2 * self.torch)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a Hugging Face folder; by default SmolLM2-135M-Instruct")
    parser.add_argument("--attention-only", action="store_true", help="no model")
    args = parser.parse_args()
    lines = list(attentions())
    if not args.attention_only:
        from benchmarks.model import smollm2_folder

        lines += models(Path(args.model) if args.model else smollm2_folder())
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, torch {torch.__version__}\n\n{HEADER}")
    for x in lines:
        print(f"| {x.what} | {x.dtype} | {x.ours:.1e} | {x.torch:.1e} |")
    if wrong := [x for x in lines if not x.fine]:
        print("too far off:", *(f"{x.what} in {x.dtype}" for x in wrong), sep="\n  ")
        sys.exit(1)


# ---------------------------------------------------------------- attention


def attentions() -> Iterator[Line]:
    """Every kernel of this device, causal, grouped queries, with and without windows."""
    gpu, B, H, K, Dh, W = jax.default_backend() == "gpu", 2, 8, 2, 64, 8
    rng = np.random.default_rng(0)
    for dtype, (window, T) in itertools.product(
        ("float32", "bfloat16", "float16"), ((0, 96), (W, W - 1), (W, W), (W, W + 1), (W, 96))
    ):
        shapes = (B, T, H, Dh), (B, K, T, Dh), (B, K, T, Dh)
        q, k, v = (jnp.asarray(rng.normal(size=s), dtype) for s in shapes)
        want = exact(*(np.asarray(x, np.float64) for x in (q, k, v)), window)
        theirs = error(_torch_attention(q, k, v, window, dtype), want)
        mask = attention.causal_mask(jnp.ones((B, T)), T, window=window)
        with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
            found = {"xla": attention.attend(q, k, v, mask, Dh**-0.5)}
        if gpu and dtype != "float32":
            kernel = attention.Kernel("cudnn")
            asked = {"kernel": kernel, "window": window, "scale": Dh**-0.5, "cap": 0.0}
            found["cudnn"] = attention.flash(q, k, v, **asked)
        for name, got in found.items():
            row = f"{T} tokens" + (f", window {window}" if window else "")
            yield Line(
                f"attention, {name}, {row}", dtype, error(got, want), theirs, ATTENTION[dtype]
            )


def exact(q_BxTxHxDh: Any, k_BxKxTxDh: Any, v_BxKxTxDh: Any, window: int) -> np.ndarray:
    """Causal attention in float64, [B, T, H, Dh]."""
    T, H, Dh = q_BxTxHxDh.shape[1:]
    k, v = (x.repeat(H // k_BxKxTxDh.shape[1], axis=1) for x in (k_BxKxTxDh, v_BxKxTxDh))
    score = np.einsum("bthd,bhsd->bhts", q_BxTxHxDh, k) * Dh**-0.5
    behind = np.arange(T)[:, None] - np.arange(T)
    score = np.where((behind >= 0) & ((behind < window) | (window == 0)), score, -np.inf)
    weight = np.exp(score - score.max(-1, keepdims=True))
    return np.einsum("bhts,bhsd->bthd", weight / weight.sum(-1, keepdims=True), v)


def _torch_attention(q: Any, k: Any, v: Any, window: int, dtype: str) -> Any:
    place = {"device": _torch_device(), "dtype": getattr(torch, dtype)}
    q, k, v = (torch.tensor(np.asarray(x, np.float32), **place) for x in (q, k, v))
    T = q.shape[1]
    behind = torch.arange(T)[:, None] - torch.arange(T)
    seen = (behind >= 0) & ((behind < window) | (window == 0))
    mixed = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k, v, attn_mask=seen.to(q.device), enable_gqa=True
    )
    return mixed.transpose(1, 2).float().cpu().numpy()


# ---------------------------------------------------------------- a model


def models(folder: Path) -> Iterator[Line]:
    """The residual stream after the first, the middle and the last block, and the logits."""
    from transformers import AutoModelForCausalLM

    plain = lm.load(str(folder), "float32")
    ids = [plain.tokenizer.encode(text)[:12] for text in TEXTS]
    tokens = np.array([row for row in ids if len(row) == 12], np.int32)
    N = plain.arch.N
    for dtype in ("float32", "bfloat16", "float16"):
        kind = getattr(torch, dtype)
        rounded = AutoModelForCausalLM.from_pretrained(folder, dtype=kind)
        theirs = _torch_states(rounded.to(_torch_device()), tokens)
        want = _torch_states(rounded.to("cpu").double(), tokens)
        out = lm.load(str(folder), dtype).forward(tokens, capture=True)
        assert out.residual_NxBxTxD is not None
        ours = [*(out.residual_NxBxTxD[n] for n in (0, N // 2)), out.logits_BxTxV]
        names = f"after block 0 of {N}", f"after block {N // 2}", "logits"
        for name, got, of_torch, x64 in zip(names, ours, theirs, want, strict=True):
            errors = error(got, x64), error(of_torch, x64)
            yield Line(f"{folder.name}, {name}", dtype, *errors, MODEL[dtype])


def _torch_states(model: Any, tokens: np.ndarray) -> list[np.ndarray]:
    with torch.no_grad():
        ids = torch.tensor(tokens, device=model.device, dtype=torch.long)
        out = model(ids, output_hidden_states=True)
    N = len(out.hidden_states) - 1
    each = [out.hidden_states[1], out.hidden_states[N // 2 + 1], out.logits]
    return [x.double().cpu().numpy() for x in each]


def _torch_device() -> str:
    return "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"


def error(got: Any, want: np.ndarray) -> float:
    """Relative, of norms."""
    return float(np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want))


if __name__ == "__main__":
    main()
