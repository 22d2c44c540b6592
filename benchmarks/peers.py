"""reptune_jax beside the real steering-vectors and repeng: the same numbers, and their times.

    pip install --no-deps steering-vectors==0.12.2 repeng==0.4.0
    python -m benchmarks.peers [--model FOLDER] [--parity-only] [--runs 3]

First what has to be equal: mean differences, pair-centred PCA, steered logits. Then times, in
turns: extraction of 64 pairs, steered answers, and a sweep of layers x doses x prompts, which both
peers leave to a loop around a steered forward pass. Both ask for older numpy and transformers than
the test extra has; they run on these.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

np.float_ = np.float64  # type: ignore[attr-defined]  # repeng 0.4 names it in an annotation

from repeng import ControlModel, ControlVector, DatasetEntry  # noqa: E402
from steering_vectors import SteeringVector, train_steering_vector  # noqa: E402

import reptune_jax as rt  # noqa: E402
from benchmarks import torch_baseline  # noqa: E402
from benchmarks.model import smollm2_folder  # noqa: E402
from benchmarks.side_by_side import PAIRS, PROMPTS  # noqa: E402
from benchmarks.timing import HEADER, Case, alternate, row  # noqa: E402

BATCH = 16


class Both:
    """A model on both sides, and their vectors from the same pairs."""

    def __init__(self, folder: Any):
        self.ours = rt.load(str(folder), dtype="float32")
        self.theirs, self.tokenizer = torch_baseline.load(folder, "cpu")
        self.N = self.ours.arch.N
        self.l = self.N // 2
        self.vector = rt.extract(self.ours, PAIRS).at(self.l)
        self.same = SteeringVector({self.l: torch.tensor(self.vector.dose_NxD[self.l])})

    def mean_difference(self) -> dict[int, np.ndarray]:
        """steering-vectors', by layer."""
        found = train_steering_vector(self.theirs, self.tokenizer, PAIRS, batch_size=BATCH)
        return {l: v.numpy() for l, v in found.layer_activations.items()}

    def pca_center(self) -> ControlVector:
        """repeng's."""
        self.tokenizer.padding_side = "right"
        entries = [DatasetEntry(*pair) for pair in PAIRS]
        asked = {"method": "pca_center", "batch_size": BATCH}
        return ControlVector.train(self.theirs, self.tokenizer, entries, **asked)

    def batch(self) -> Any:
        """Chats of several lengths as tensors, padded on the left."""
        self.tokenizer.padding_side = "left"
        turns = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
        texts = [
            self.tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True)
            for one in turns
        ]
        return self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)

    def controlled(self, dose: float) -> ControlModel:
        """repeng's wrapper with our vector at the middle layer, from a file; to be unwrapped."""
        wrapped = ControlModel(self.theirs, [self.l])
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "vector.gguf")
            self.vector.save(file)
            wrapped.set_control(ControlVector.import_gguf(file), dose)
        return wrapped


# ---------------------------------------------------------------- what has to be equal


def parity(both: Both) -> None:
    """Prints the lowest cosine of a layer, and how far logits are apart."""
    ours = rt.extract(both.ours, PAIRS).directions_NxD
    theirs = both.mean_difference()
    cosines = [_cosine(ours[l], theirs[l]) for l in range(both.N)]
    print(f"mean difference, steering-vectors: lowest cosine of {both.N} layers {min(cosines):.7f}")
    ours = rt.extract(both.ours, PAIRS, method="pca_center").directions_NxD
    trained = both.pca_center()
    theirs = trained.directions
    # Its last layer is read behind the final norm, as hidden_states has it: not the same residual.
    cosines = [_cosine(ours[l], theirs[l]) for l in range(1, both.N - 1)]
    print(f"pair-centred PCA, repeng: lowest cosine of layers 1 to {both.N - 2} {min(cosines):.7f}")
    with tempfile.TemporaryDirectory() as folder:
        trained.export_gguf(Path(folder, "theirs.gguf"))
        read = rt.SteeringVector.load(Path(folder, "theirs.gguf"), n_layers=both.N).directions_NxD
    apart = max(np.abs(read[l] - v).max() for l, v in theirs.items() if l)
    print(f"repeng's own file read here: {apart:.0e} apart at most")
    inputs = both.batch()
    tokens, mask = (inputs[name].numpy() for name in ("input_ids", "attention_mask"))
    real, dose = mask.astype(bool), 2.0
    logits = np.asarray(both.ours.forward(tokens, mask, steer=dose * both.vector).logits_BxTxV)
    with torch.no_grad(), both.same.apply(both.theirs, multiplier=dose):
        peers = {"steering-vectors": _logits(both, inputs)}
    wrapped = both.controlled(dose)
    with torch.no_grad():
        peers["repeng"] = _logits(both, inputs)
    wrapped.unwrap()
    largest = np.abs(logits[real]).max()
    for name, other in peers.items():
        apart = np.abs(logits[real] - other[real]).max()
        print(f"steered logits, {name}: {apart:.1e} apart at most, of {largest:.0f} at most")


def _logits(both: Both, inputs: Any) -> np.ndarray:
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    return both.theirs(**inputs, position_ids=positions).logits.numpy()


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


# ---------------------------------------------------------------- what takes how long


def extraction(both: Both) -> dict[str, Case]:
    """64 pairs, every layer."""
    cases = {
        "steering-vectors": (both.mean_difference, "mean_diff"),
        "repeng": (both.pca_center, "pca_center"),
    }
    return {
        f"extract 64 pairs, {name}": Case(
            partial(rt.extract, both.ours, PAIRS, method=method),
            theirs,
            lambda a, b: "",
        )
        for name, (theirs, method) in cases.items()
    }


def generation(both: Both, batch: int, new: int) -> dict[str, Case]:
    """Greedy answers of `new` tokens, the vector added at the middle layer."""
    prompts = (PROMPTS * 2)[:batch]
    inputs = {name: torch.cat([x, x])[:batch] for name, x in both.batch().items()}
    how = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    how["pad_token_id"] = both.tokenizer.pad_token_id

    def answers(model: Any) -> list[str]:
        out = model.generate(**inputs, **how)[:, inputs["input_ids"].shape[1] :]
        return both.tokenizer.batch_decode(out, skip_special_tokens=True)

    def hooked() -> list[str]:
        with torch.inference_mode(), both.same.apply(both.theirs, multiplier=2.0):
            return answers(both.theirs)

    def wrapped() -> list[str]:
        model = both.controlled(2.0)
        with torch.inference_mode():
            found = answers(model)
        model.unwrap()
        return found

    def ours() -> list[str]:
        how = {"steer": 2.0 * both.vector, "batch_size": batch}
        return both.ours.generate(prompts, max_new_tokens=new, **how)

    def same(a: list[str], b: list[str]) -> str:
        alike = sum(x.split()[:8] == y.split()[:8] for x, y in zip(a, b, strict=True))
        return f"{alike} of {batch} answers begin with the same 8 words"

    peers = {"steering-vectors": hooked, "repeng": wrapped}
    return {f"{batch} steered answers, {name}": Case(ours, f, same) for name, f in peers.items()}


def sweeping(both: Both, layers: int, doses: int, prompts: int) -> dict[str, Case]:
    """Log-odds of two letters at every layer, dose and prompt."""
    numbered = [f"{prompt} A or B? ({i})" for i in range(prompts) for prompt in PROMPTS]
    asked = [(text, "A", "B") for text in numbered[:prompts]]
    at = np.linspace(0, both.N - 1, layers).round().astype(int).tolist()
    strengths = [float(d) for d in range(-(doses // 2), doses - doses // 2 + 1) if d][:doses]
    vector = rt.extract(both.ours, PAIRS).at(at)
    ids = [both.ours.encode_prompt(text) for text, _, _ in asked]
    letters = [both.tokenizer.encode(x, add_special_tokens=False)[0] for x in "AB"]
    both.tokenizer.padding_side = "left"
    batches = [
        both.tokenizer.pad({"input_ids": ids[i : i + BATCH]}, return_tensors="pt")
        for i in range(0, len(ids), BATCH)
    ]

    def loop(where: Any) -> np.ndarray:
        """As a researcher writes it: hooks, a forward pass, the last token's logits."""
        found = np.zeros((len(at), len(strengths), prompts))
        for i, l in enumerate(at):
            one = SteeringVector({l: torch.tensor(vector.dose_NxD[l])})
            for j, dose in enumerate(strengths):
                with torch.inference_mode(), one.apply(both.theirs, multiplier=dose, **where):
                    each = []
                    for batch in batches:
                        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
                        last = {"position_ids": positions, "logits_to_keep": 1}
                        logits = both.theirs(**batch, **last).logits
                        each.append(logits[:, -1, letters[0]] - logits[:, -1, letters[1]])
                    found[i, j] = torch.cat(each).numpy()
        return found

    def same(a: np.ndarray, b: np.ndarray) -> str:
        return f"log-odds {np.abs(a - b).max():.1e} nats apart at most, of {np.abs(b).max():.1f}"

    def ours(rule: str) -> np.ndarray:
        return rt.sweep(both.ours, vector, asked, strengths, tokens=rule).logodds_LxKxI

    size = f"{layers} x {doses} x {prompts}"
    answer = {"min_token_index": None, "token_indices": slice(-1, None)}
    return {
        f"sweep {size}, {rule}": Case(partial(ours, rule), partial(loop, where), same)
        for rule, where in (("answer", answer), ("all", {}))
    }


def main() -> None:
    """Prints what is equal, and one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a Hugging Face folder; SmolLM2-135M, fetched once")
    parser.add_argument("--parity-only", action="store_true")
    parser.add_argument("--case", default="", help="those whose names hold this, such as sweep")
    parser.add_argument("--runs", type=int, default=3, help="0: the first calls are what counts")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, action="append", help="may be repeated; 1, 8, 32")
    parser.add_argument("--sweep", default="30x8x60", help="layers x doses x prompts")
    args = parser.parse_args()
    both = Both(args.model or smollm2_folder())
    parity(both)
    if args.parity_only:
        return
    print(f"torch {torch.__version__} on {torch.get_num_threads()} threads", flush=True)
    cases = extraction(both)
    for batch in args.batch or (1, 8, 32):
        cases |= generation(both, batch, args.new_tokens)
    cases |= sweeping(both, *map(int, args.sweep.split("x")))
    rows = []
    for name, case in cases.items():
        if args.case not in name:
            continue
        timing = alternate(case.jax, case.torch, args.runs)
        print(f"{name}: {case.agreement(*timing.answers)}", flush=True)
        rows.append(row(name, timing))
        print(rows[-1], flush=True)
    print("\n".join(["", HEADER, *rows]))


if __name__ == "__main__":
    main()
