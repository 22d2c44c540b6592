"""Times reptune_jax against the torch baseline on the same work, in turns, on this machine.

    python -m benchmarks.side_by_side [--model FOLDER] [--case train] [--runs 5]

Each case first shows that both sides give the same answer. A ratio above 1 means reptune_jax is
faster. The first call of each side (compilation, warm-up) is timed apart and counts in no median.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks import torch_baseline, train_case
from benchmarks.model import smollm2_folder
from benchmarks.timing import HEADER, Case, alternate, row

# ---------------------------------------------------------------- the cases

TOPICS = ("gardens", "trains", "soup", "rivers", "chess", "winter", "libraries", "bicycles")
PROMPTS = [
    f"Tell me something about {topic}{end}" for topic in TOPICS for end in (".", ", briefly.")
]
PERSONAS = ("extremely positive and cheerful", "extremely negative and gloomy")
PAIRS = [
    tuple(f"You are {persona}. User: {prompt} Assistant:" for persona in PERSONAS)
    for prompt in PROMPTS * 4
]


def extraction(rt_model: Any, torch_model: Any, tokenizer: Any, _args: Any) -> Case:
    """Mean difference of 64 pairs at the last token, all layers."""
    import reptune_jax as rt

    return Case(
        lambda: np.asarray(
            rt.extract(rt_model, PAIRS, method="mean_diff", position="last").directions_NxD
        ),
        lambda: torch_baseline.extract(torch_model, tokenizer, PAIRS).numpy(),
        lambda a, b: f"lowest cosine of a layer {_cosines(a, b).min():.6f}",
    )


def generation(rt_model: Any, torch_model: Any, tokenizer: Any, args: Any) -> Case:
    """Greedy answers to 16 prompts."""
    n = args.max_new_tokens
    return Case(
        lambda: rt_model.generate(PROMPTS, max_new_tokens=n),
        lambda: torch_baseline.generate(torch_model, tokenizer, PROMPTS, n),
        _same_texts,
    )


def steered_generation(rt_model: Any, torch_model: Any, tokenizer: Any, args: Any) -> Case:
    """The same with one class-mean difference added at the middle layer."""
    import reptune_jax as rt

    n, l = args.max_new_tokens, rt_model.arch.N // 2
    vector = rt.extract(rt_model, PAIRS, method="mean_diff", position="last").at(layers=[l])
    same = torch_baseline.extract(torch_model, tokenizer, PAIRS)[l].to(torch_model.device)
    return Case(
        lambda: rt_model.generate(PROMPTS, max_new_tokens=n, steer=vector),
        lambda: torch_baseline.generate(torch_model, tokenizer, PROMPTS, n, {l: same}),
        _same_texts,
    )


CASES = {
    "train": train_case.training,
    "extract": extraction,
    "generate": generation,
    "generate-steered": steered_generation,
}


def main() -> None:
    """Prints one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model", help="a Hugging Face folder; SmolLM2-135M-Instruct, fetched once"
    )
    parser.add_argument("--case", choices=CASES, action="append", help="may be repeated; all")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()

    import jax

    import reptune_jax as rt

    folder = args.model or smollm2_folder()
    rt_model = rt.load(str(folder), dtype=args.dtype)
    torch_model, tokenizer = torch_baseline.load(folder, dtype=args.dtype)
    print(
        f"{folder}, {args.dtype}; jax {jax.__version__} on {jax.devices()[0].device_kind}; "
        f"torch {torch.__version__} on {torch_model.device}, {torch.get_num_threads()} threads"
    )
    rows = []
    for name in args.case or CASES:
        case = CASES[name](rt_model, torch_model, tokenizer, args)
        timing = alternate(case.jax, case.torch, args.runs)
        print(f"{name}: {case.agreement(*timing.answers)}", flush=True)
        rows.append(row(name, timing))
    print("\n".join(["", HEADER, *rows]))


def _cosines(a_NxD: np.ndarray, b_NxD: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(a_NxD, axis=-1) * np.linalg.norm(b_NxD, axis=-1)
    return (a_NxD * b_NxD).sum(-1) / norms


def _same_texts(a: Sequence[str], b: Sequence[str]) -> str:
    return f"{sum(x == y for x, y in zip(a, b, strict=True))} of {len(a)} texts are the same"


if __name__ == "__main__":
    main()
