"""A program of the package as a process of its own: python -m tests.run_program NAME SLEEP flags…

Every training step takes at least SLEEP seconds, so that a signal meets it at work; the neutral
texts are a few short ones.
"""

import importlib
import sys
import time

from reptune_jax import program
from reptune_jax.evals import scoring
from reptune_jax.tuning import retention
from reptune_jax.tuning.run import Run
from tests import tiny_behavior


def main() -> None:
    name, sleep = sys.argv[1], float(sys.argv[2])
    sys.argv = [name, *sys.argv[3:]]
    batch = Run.batch

    def slowly(self, step):
        time.sleep(sleep)
        return batch(self, step)

    Run.batch = slowly
    retention.load_neutral = scoring.load_neutral = tiny_behavior.neutral
    module = importlib.import_module(f"reptune_jax.{name}")
    program.main(module.run, module.__doc__, trains=name in ("train", "study"))


if __name__ == "__main__":
    main()
