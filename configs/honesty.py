"""Honesty on Qwen2.5-1.5B-Instruct: verdicts on true and false claims, pressure scenarios.

    python -m reptune_jax.study --config=honesty --workdir=runs/honesty

The paper's recipe: the vector is read, and the cosine taken, at the newline before the answer cue,
and the rate is the paper's. At 3e-4 every tuned arm gives one verdict to all claims
(docs/results.md). Made for an accelerator. `configs/honesty.py:cpu` asks the same on two CPU cores
within a night: the + side, fewer steps and claims. `configs/honesty.py:quick` is cut down for
minutes and a model of half a billion weights, which does not learn it, and at a higher rate than
this one unlearns what it knows.
"""

from ml_collections import ConfigDict

from reptune_jax.config import default


def get_config(arg: str = "") -> ConfigDict:
    cuts = {"": lambda c: c, "cpu": cpu, "quick": quick}
    if arg not in cuts:
        raise ValueError(f"configs/honesty.py: got {arg!r}, expected nothing, 'cpu' or 'quick'.")
    c = default()
    c.model = "Qwen/Qwen2.5-1.5B-Instruct"
    c.behavior = "honesty"
    c.vector.position = "before_answer"
    c.vector.pairs = 64
    c.loss.position = "before_answer"
    c.loss.layers = ("0.29", "0.57")  # of 28: 8 to 15
    c.loss.cosine = 8.0
    c.loss.center = True
    c.loss.retain = 1.0
    c.loss.ending = 0.0  # a verdict is one token: there is no going on to hold
    c.train.layers = c.loss.layers
    c.train.steps = 150
    c.train.batch = 8
    c.train.retain_batch = 2
    c.train.lr = 3e-5
    c.train.eval_every = 25
    c.train.measure_every = 0
    c.train.val_rows = 48
    c.steer.layers = ("0.43",)
    c.steer.doses = (1.0, 2.0, 4.0)
    c.steer.documents = 4
    c.eval.splits = ("test",)
    c.eval.claims = 120
    c.eval.heat_map = 0
    c.eval.personas = 1
    c.eval.new_tokens = 24
    c.eval.batch = 16
    c.study.primary = "logodds:claim"
    c.study.arms = ("base", "prompt", "steer", "weights")
    c.study.arms += ("token", "vector", "dual", "random", "preventative", "out")
    c.study.signs = (1, -1)
    c.study.seeds = (0, 1, 2)
    return cuts[arg](c)


def cpu(c: ConfigDict) -> ConfigDict:
    """The + side of the arms that a claim needs, with 24 steps; claims and texts cut to match."""
    c.vector.pairs = 32
    c.train.steps = 24
    c.train.retain_batch = 1
    c.train.eval_every = 12
    c.train.val_rows = 16
    c.steer.documents = 2
    c.dial.scales = (0.5, 1.0)
    c.eval.claims = 48
    c.eval.scenarios = 24
    c.eval.documents = 6
    c.study.arms = ("base", "prompt", "steer", "weights", "token", "dual", "random")
    c.study.signs = (1,)
    return c


def quick(c: ConfigDict) -> ConfigDict:
    """The + side of fewer arms, steps and claims, one seed, a lower rate."""
    c.model = "Qwen/Qwen2.5-0.5B-Instruct"
    c.loss.layers = c.train.layers = ("0.33", "0.67")
    c.steer.layers = ("0.5",)
    c.vector.pairs = 24
    c.train.steps = 24
    c.train.batch = 4
    c.train.lr = 1e-5
    c.train.retain_batch = 1
    c.train.eval_every = 12
    c.train.val_rows = 16
    c.eval.claims = 32
    c.eval.scenarios = 8
    c.eval.documents = 4
    c.study.arms = ("base", "token", "dual", "random")
    c.study.signs = (1,)
    c.study.seeds = (0,)
    c.study.export = ""
    return c
