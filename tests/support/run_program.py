"""A program of the package as a process of its own:

    python -m tests.support.run_program NAME SLEEP flags…

Every training step takes at least SLEEP seconds, so that a signal meets it at work; the neutral
texts are a few short ones.
"""

import importlib
import sys
import time

import jax

from reptune_jax import program
from reptune_jax.data import neutral
from reptune_jax.tuning.run import Run
from tests.support import tiny_behavior


def main() -> None:
    name, sleep = sys.argv[1], float(sys.argv[2])
    sys.argv = [name, *sys.argv[3:]]
    batch = Run.batch

    def slowly(self, step):
        time.sleep(sleep)
        return batch(self, step)

    begin = program.start

    def start():
        begin()
        # Tiny programs compile in less than what is worth keeping, and there are many of them.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

    Run.batch, program.start = slowly, start
    neutral.load_neutral = tiny_behavior.neutral
    module = importlib.import_module(f"reptune_jax.{name}")
    program.main(module.run, module.__doc__)


if __name__ == "__main__":
    main()
