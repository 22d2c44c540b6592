"""What a decoder looks like: one frozen record, which `families.py` reads from a `config.json`.

A family is a row of data there (and a table of names in `hub/names.py`), not a class.
"""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, repr=False)
class Rope:
    """Rotary positions: base frequency and how it is stretched beyond the original context."""

    theta: float
    kind: str = "default"  # default | linear | llama3
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 0
    share: float = 1.0  # of each head's dims that are rotated, the first ones

    def __repr__(self) -> str:
        return _brief(self, 6)


@dataclasses.dataclass(frozen=True)
class Layer:
    """What may differ from layer to layer, as data that is scanned along with the weights."""

    window: int = 0  # a token sees this many tokens, itself included; 0: all before it
    rope: Rope | None = None


@dataclasses.dataclass(frozen=True, repr=False)
class Arch:
    """Static shape of a decoder; hashable, so that it can key a compiled program."""

    family: str
    V: int  # vocabulary
    D: int  # residual stream
    N: int  # layers
    H: int  # query heads
    K: int  # key/value heads
    Dh: int  # head dim
    F: int  # MLP hidden
    rope: Rope | None  # of full attention; None: no rotation anywhere
    norm_eps: float
    tied: bool  # unembedding = embedding
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    # what families differ in; a field that is off is not shown
    act: str = "silu"  # of the MLP: a key of mlp.ACTIVATIONS
    gated: bool = True  # act(gate) * up; else act(up)
    norm: str = "rms"  # rms | rms_late | rms_plus_one | layer: see norms.py
    pre_norm: bool = True  # of what attention and MLP read
    post_norm: bool = False  # of what they write
    qk_norm: str = ""  # "head": each head by itself; "all": all heads together
    parallel: bool = False  # attention and MLP read the same residual
    positions: int = 0  # rows of a table of learned positions
    scale: float = 0.0  # of attention scores; 0: Dh**-0.5
    score_cap: float = 0.0  # soft-caps, 0: none
    logit_cap: float = 0.0
    embed_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and MLP write
    logit_divisor: float = 1.0
    layers: tuple[Layer, ...] = ()  # one a layer, where not all are Layer(0, rope)

    def __repr__(self) -> str:
        return _brief(self, 14)

    @property
    def kinds(self) -> tuple[Layer, ...]:
        """The kinds of layers, each once, in the order of their first."""
        return tuple(dict.fromkeys(self.layers or (Layer(0, self.rope),)))

    @property
    def score_scale(self) -> float:
        return self.scale or self.Dh**-0.5


def _brief(record: Any, always: int) -> str:
    """The repr without later fields at their defaults.

    Fingerprints of models are made of it, and must stay when a field is added.
    """
    fields = dataclasses.fields(record)
    later = [f for f in fields[always:] if getattr(record, f.name) != f.default]
    shown = (f"{f.name}={getattr(record, f.name)!r}" for f in (*fields[:always], *later))
    return f"{type(record).__name__}({', '.join(shown)})"
