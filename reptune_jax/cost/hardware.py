"""What accelerators can do, as published, and what that bounds a step to.

Sources. TPU: cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e (peak bf16, HBM and its bandwidth per
chip). H100 SXM and H200 SXM: NVIDIA's data sheets (bf16 without sparsity).
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device."""

    name: str
    tflops: float  # peak, bfloat16
    hbm_gb: float  # capacity
    hbm_gb_per_s: float

    @property
    def hbm_gib(self) -> float:
        """Capacity as the compiler counts it."""
        return self.hbm_gb * 1e9 / 2**30

    def seconds(self, flops: float, bytes_moved: float) -> tuple[float, float]:
        """(seconds of arithmetic at peak, seconds of HBM traffic at full bandwidth)."""
        return flops / (self.tflops * 1e12), bytes_moved / (self.hbm_gb_per_s * 1e9)


CHIPS = {
    "v4": Chip("TPU v4", 275, 32, 1228),
    "v5e": Chip("TPU v5e", 197, 16, 819),
    "v5p": Chip("TPU v5p", 459, 95, 2765),
    "v6e": Chip("TPU v6e", 918, 32, 1640),
    "h100": Chip("NVIDIA H100 SXM", 989, 80, 3350),
    "h200": Chip("NVIDIA H200 SXM", 989, 141, 4800),
}
ALIAS = {"gpu": "h100"}
# jax's `device_kind` -> chip
_KINDS = {
    r"^TPU v4$": "v4",
    r"^TPU v5 ?(lite|e)": "v5e",
    r"^TPU v5p?$": "v5p",
    r"^TPU v6 ?(lite|e)": "v6e",
    r"H100.*(HBM3|SXM)": "h100",
    r"H200": "h200",
}

_ROPE3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def _llama(V: int, D: int, F: int, N: int, H: int, K: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama", "vocab_size": V, "hidden_size": D, "intermediate_size": F,
        "num_hidden_layers": N, "num_attention_heads": H, "num_key_value_heads": K,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "rope_theta": 10_000.0, **more,
    }  # fmt: skip


# config.json of models that are planned for without being at hand
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": _llama(32_000, 4096, 11_008, 32, 32, 32),
    "llama-2-13b": _llama(32_000, 5120, 13_824, 40, 40, 40),
    "llama-2-70b": _llama(32_000, 8192, 28_672, 80, 64, 8),
    "llama-3-8b": _llama(128_256, 4096, 14_336, 32, 32, 8, rope_theta=500_000.0),
    "llama-3.1-8b": _llama(
        128_256, 4096, 14_336, 32, 32, 8, rope_theta=500_000.0, rope_scaling=_ROPE3
    ),
    "llama-3-70b": _llama(128_256, 8192, 28_672, 80, 64, 8, rope_theta=500_000.0),
    "smollm2-135m": _llama(
        49_152, 576, 1536, 30, 9, 3, rope_theta=100_000.0, tie_word_embeddings=True
    ),
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip that jax calls so; None where its peak is not in the table."""
    hits = (name for pattern, name in _KINDS.items() if re.search(pattern, device_kind))
    return CHIPS.get(next(hits, ""))


def peak_of(device_kind: str, given: float = 0.0) -> float | None:
    """TFLOP/s of one device: `given` where it is not 0, else the chip's; None where not known."""
    chip = chip_of(device_kind)
    return given or (chip.tflops if chip else None)


def about_peak(device_kind: str, given: float = 0.0) -> str:
    """One line: what MFU is measured against."""
    peak, chip = peak_of(device_kind, given), chip_of(device_kind)
    if peak is None:
        return f"no MFU: the peak of {device_kind!r} is not known; train.peak_tflops gives it"
    source = "train.peak_tflops" if given else f"{chip.name}, bfloat16" if chip else ""
    return f"MFU is of {peak:g} TFLOP/s a device ({source})"


def is_tpu(kind: str) -> bool:
    """Whether a kind of CHIPS, or "cpu", is a TPU."""
    return kind.startswith("v")


def parse(topology: str) -> tuple[str, str]:
    """ "v5e:2x2" -> ("v5e", "2x2").

    Raises:
      ValueError: not a known chip and a shape or number.
    """
    kind, _, shape = topology.partition(":")
    kind = ALIAS.get(kind, kind)
    if kind not in (*CHIPS, "cpu") or not re.fullmatch(r"\d+(x\d+)*", shape):
        raise ValueError(
            f"--topology: got {topology!r}, expected one of {', '.join((*CHIPS, *ALIAS, 'cpu'))} "
            "with a shape or number. Example: v5e:2x2, v5p:4x4x4, gpu:64, cpu:8."
        )
    return kind, shape


def advice(memory: Mapping[str, float], mesh: Mapping[str, int], remat: str) -> list[str]:
    """What to turn where a step does not fit; `memory` is GiB per device by kind."""
    held = memory.get("frozen weights", 0) + memory.get("trained weights", 0)
    moments = memory.get("optimizer", 0) + memory.get("trained weights", 0)
    out = []
    if memory.get("temporaries", 0) > 0.3 * sum(memory.values()):
        out += ["--config.train.remat=full"] if remat != "full" else []
        out += ["a smaller --config.train.batch, or a larger --config.train.accumulate"]
    if mesh["data"] > 1 and held > 0.3 * sum(memory.values()):
        out += [
            "--config.mesh.fsdp=-1 --config.mesh.data=1: weights are whole on each of "
            f"{mesh['data']} groups"
        ]
    if moments > 0.3 * sum(memory.values()):
        out += ["fewer --config.train.layers or --config.train.modules"]
    return [*out, "more devices"]
