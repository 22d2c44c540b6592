"""Program: what a training step would need on hardware that is not here.

    python -m reptune_jax.plan --config=scale:llama-3-8b --topology=v5e:4x4

Compiles the real step ahead of time, without weights, for that many devices, and prints memory per
device, FLOPs, collectives and what they bound the step's time to. TPU topologies go through the TPU
compiler (`pip install -e ".[plan]"`); `gpu:N`, `h200:N` and `cpu:N` through N forced CPU devices,
whose buffers are not those of a GPU: read those temporaries as a rough guide.
"""

from absl import flags
from ml_collections import config_flags

from reptune_jax import command_line, program, ranges
from reptune_jax.plan.compiled import run


def main() -> None:
    """Parses the flags."""
    flag = config_flags.DEFINE_config_file("config", None, "name or path, [:arg]", lock_config=True)
    topology = flags.DEFINE_string("topology", None, "v5e:4x4, v5p:2x2x1, gpu:64, h200:8, cpu:8")
    shape = flags.DEFINE_string("model-config", "", "a config.json, or a built-in shape's name")
    tokens = flags.DEFINE_integer("tokens", 512, "tokens of a row")
    labels = flags.DEFINE_integer("labels", 64, "label tokens of a row")
    flags.mark_flags_as_required(["config", "topology"])
    shown = ("config", "topology", "model-config", "tokens", "labels")

    def entry(_: list[str]) -> None:
        c = ranges.check(flag.value)
        run(c, str(topology.value), str(shape.value), int(tokens.value), int(labels.value))

    program.call(lambda: command_line.run(entry, __doc__, shown))


if __name__ == "__main__":
    main()
