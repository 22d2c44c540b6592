"""Runs that die, and what they logged."""

import json

from reptune_jax.tuning.run import Run

TIMES = ("seconds", "examples_per_s", "tokens_per_s")


def read_log(folder):
    """Rows without the columns that time a machine."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


class Stop(BaseException):
    """Not an Exception, as a kill is none."""


def stop_at(monkeypatch, step):
    """Makes the loop die when it asks for that step's batch."""
    whole = Run.batch

    def batch(self, i):
        if i == step:
            raise Stop
        return whole(self, i)

    monkeypatch.setattr(Run, "batch", batch)
