"""A small step compiled for devices that are not there, and what the sharding rules say of it.

Run by test_collectives on 8 forced devices: python -m tests.support.plan_case 1x8x1 2x2x2 …
"""

import functools
import json
import math
import re
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import traverse_util

from reptune_jax import config, ranges
from reptune_jax import mesh as meshes
from reptune_jax.cost import hardware
from reptune_jax.cost.collectives import Traffic, traffic
from reptune_jax.model import families
from reptune_jax.plan import abstract
from reptune_jax.plan import compiled as plan

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1")
# As Llama's, but small: grouped heads of 128, untied, every dimension divisible.
SHAPE = hardware._llama(8192, 512, 1024, 6, 8, 4, head_dim=128)
ARCH = families.from_config(SHAPE)
BF16 = jnp.dtype("bfloat16")
# For 8 CPU devices, of which all may be on one axis of the weights.
SMALL = families.from_config(hardware._llama(256, 64, 96, 6, 4, 2))
FIRST, STOP = 2, 4
L = 16


def settings(**changes):
    c = config.default()
    c.model = "none"
    c.train.layers = c.loss.layers = (FIRST, STOP)
    c.train.batch, c.loss.retain = 8, 0.0
    for key, value in changes.items():
        c.update_from_flattened_dict({key.replace("__", "."): value})
    return ranges.check(c)


@functools.cache
def mesh_for(topology):
    pytest.importorskip("libtpu", reason="the TPU compiler: pip install -e '.[plan]'")
    kind, shape = hardware.parse(topology)
    return meshes.make_mesh(1, 2, 2, devices=plan.tpu_devices(kind, shape))


@functools.cache
def compare(arch, dtype, mesh, T, remat):
    """{what: (as compiled, as the rules say)}, in numbers that JSON holds."""
    step, args = abstract.step(settings(train__remat=remat), arch, dtype, mesh, T, L)
    lowered = step.lower(*args)
    compiled = lowered.compile()
    hlo, rules = compiled.as_text(), Rules(arch, dtype, mesh, T, remat, args)
    every = traffic(hlo, mesh)
    gathers = {w: of(only(hlo, f"/{w}/"), mesh, "all-gather", "fsdp") for w in rules.weights}
    summed = of(only(hlo, "/(below|tuned|above)/(attn|mlp)/"), mesh, "all-reduce", "tensor")
    gradients = [every.get(("all-reduce", axis), Traffic(0, 0.0)) for axis in ("fsdp", "data")]
    known = sum(sent for _, sent in gathers.values()) + summed[1] + sum(rules.gradients())
    memory = compiled.memory_analysis()
    return {
        "gathers": (gathers, rules.gathers()),
        "activations": (summed, rules.activations()),
        "gradients": ([t.bytes_sent for t in gradients], rules.gradients()),
        "rest": (sum(t.bytes_sent for t in every.values()) - known, rules.tables()),
        "several axes": (
            {" ".join(k): t.bytes_sent for k, t in every.items() if "+" in k[1]},
            8 * T * 4,
        ),
        "constraints": (constraints(lowered.as_text()), rules.constraints()),
        "kernels": (hlo.count('custom_call_target="tpu_custom_call"'), rules.kernels()),
        "arguments": (memory.argument_size_in_bytes, bytes_of(args)),
        "donated": (memory.alias_size_in_bytes, bytes_of(args[0])),
        "new": (memory.output_size_in_bytes - memory.alias_size_in_bytes, None),
    }


class Rules:
    """What `mesh.RULES` and the decoder's structure imply, for a step over 8 rows of T tokens."""

    def __init__(self, arch, dtype, mesh, T, remat, args):
        self.N, self.back = arch.N, arch.N - FIRST  # layers of the forward and the backward pass
        self.size, self.remat, self.trained = dtype.itemsize, remat, args[0].trained
        self.data, self.fsdp, self.tensor = (mesh.shape[axis] for axis in meshes.AXES)
        self.tpu = mesh.devices.flat[0].platform == "tpu"
        self.row_bytes = 8 // (self.data * self.fsdp) * T * arch.D * self.size
        self.table_bytes = arch.V * arch.D * self.size
        below = traverse_util.flatten_dict(args[1].frozen["below"], sep="/")
        self.weights = {
            path.removesuffix("/kernel"): self.whole(leaf.shape[1:])
            for path, leaf in below.items()
            if path.endswith("kernel")
        }

    def whole(self, shape):
        """A layer's weight where it is used: whole over fsdp, still split over tensor."""
        return math.prod(shape) * self.size / self.tensor

    def gathers(self):
        """Each weight once a pass; XLA keeps none of q, k, v from recomputing them to using them
        again on a TPU, all others it does."""
        if self.fsdp == 1:
            return dict.fromkeys(self.weights, (0, 0.0))
        passes = dict.fromkeys(self.weights, self.N + self.back)
        if self.tpu and self.remat == "full":
            passes |= {f"attn/{name}": self.N + 2 * self.back for name in "qkv"}
        share = (self.fsdp - 1) / self.fsdp
        return {name: (n, n * self.weights[name] * share) for name, n in passes.items()}

    def activations(self):
        """Summed over heads after attention and over columns after the MLP, and before each in the
        backward pass: there a TPU adds up what q, k, v (gate, up) give before it is sent."""
        if self.tensor == 1:
            return 0, 0.0
        forward = 2 * (self.N + (self.back if self.remat == "full" else 0))
        arrays = forward + (2 if self.tpu else 3 + 2) * self.back
        each = self.row_bytes * 2 * (self.tensor - 1) / self.tensor
        return forward + 2 * self.back, arrays * each

    def gradients(self):
        """[over fsdp, over data]: of the trained weights, in the type of the products; the second
        sum is of what each device keeps of the first."""
        held = sum(self.whole(leaf.shape) for leaf in self.trained.values())
        ways = (self.fsdp, held), (self.data, held / self.fsdp)
        return [2 * size * (n - 1) / n for n, size in ways]

    def tables(self):
        """More than embedding, head and loss may send."""
        return 3 * self.table_bytes / self.tensor

    def constraints(self):
        """In the step's own gradient and in the one that measures: 2. Rows at the embedding, each
        segment and the end; in the backward pass at the end and the two upper segments, which are
        recomputed. Weights: the gradients, and what the new state holds: itself and two moments."""
        again = 2 if self.remat != "none" else 0
        return {
            "columns": 2,
            "rows": 2 * (1 + 3 + 1 + 3 + again),
            "weights": len(self.trained) * (2 + 3),
            "whole": 3,  # the step's number, and the optimizer's two
        }

    def kernels(self):
        """Splash attention: one forward in each segment, two backward and one recomputed in the
        upper two; and all again in the branch that measures."""
        again = 0 if self.remat == "none" else 1
        return 2 * (3 + 2 * (2 + again)) if self.tpu else 0


def only(hlo, pattern):
    """Without the collectives whose operation in the model is not like this."""
    keep = re.compile(rf'op_name="[^"]*{pattern}')
    lines = hlo.splitlines()
    return "\n".join(line for line in lines if "channel_id=" not in line or keep.search(line))


def of(hlo, mesh, kind, axis):
    return tuple(traffic(hlo, mesh).get((kind, axis), Traffic(0, 0.0)))


def constraints(mlir):
    found = re.findall(r"sdy\.sharding_constraint \S+ <@mesh, \[(.*?)\]> :", mlir)
    rows, columns = '{"data", "fsdp"}, {}, {}', '{"data"}, {}, {"fsdp"}'
    return {
        "columns": found.count(columns),
        "rows": found.count(rows),
        "weights": sum(f not in (columns, rows, "") for f in found),
        "whole": found.count(""),
    }


def bytes_of(tree):
    return round(abstract.gib_per_device(tree) * 2**30)


def main(*shapes):
    assert jax.device_count() == 8
    float32, out = jnp.dtype("float32"), {}
    for shape in shapes:
        mesh = meshes.make_mesh(*(int(n) for n in shape.split("x")))
        out[shape] = compare(SMALL, float32, mesh, 32, "dots")
    print(json.dumps(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
