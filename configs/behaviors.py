"""A behavior with open prompts on SmolLM2-135M-Instruct: `configs/behaviors.py:sycophancy`.

    python -m reptune_jax.study --config=behaviors:sycophancy --workdir=runs/sycophancy

Vector and targets are the behavior's own answers: a model of this size hardly says under personas
what they ask for (docs/results.md). `:sycophancy,persona` takes the personas' answers all the same.
The measure is declared here, before a study runs; where the judge of a behavior is weak it is the
log-odds (docs/behaviors.md).
"""

from ml_collections import ConfigDict

from reptune_jax.config import default

PRIMARY = {
    "sentiment": "vader:free",
    "sycophancy": "logodds:free",
    "helpfulness": "logodds:free",
    "neutrality": "twosided:free",
    "creativity": "logodds:free",
}


def get_config(arg: str = "sycophancy") -> ConfigDict:
    name, _, answers = arg.partition(",")
    if name not in PRIMARY or answers not in ("", "persona"):
        raise ValueError(
            f"configs/behaviors.py: got {arg!r}, expected one of {', '.join(PRIMARY)}, with or "
            "without ',persona' behind it."
        )
    c = default()
    c.model = "HuggingFaceTB/SmolLM2-135M-Instruct"
    c.behavior = name
    c.vector.pairs = 48
    c.vector.answer_tokens = 24
    c.targets.max_repeat = 0.0  # loops are learned as readily as behavior
    if answers:
        c.targets.best_share = 0.5
    else:
        c.vector.answers = c.targets.answers = "given"
    c.loss.cosine = 8.0
    c.loss.center = True
    c.loss.retain = 4.0
    c.train.steps = 24
    c.train.batch = 6
    c.train.retain_batch = 2
    c.train.measure_every = 0
    c.train.eval_every = 24
    c.train.val_rows = 16
    c.steer.layers = ("0.33", "0.5", "0.67")  # which one steers best is not known
    c.steer.documents = 6
    c.steer.max_kl = 0.0
    c.dial.scales = (0.5, 1.0, 2.0)
    c.eval.splits = ("test",)
    c.eval.prompts = 120
    c.eval.val_prompts = 16
    c.eval.documents = 8
    c.eval.heat_map = 0
    c.eval.personas = 3
    c.eval.new_tokens = 24
    c.study.primary = PRIMARY[name]
    c.study.arms = ("base", "prompt", "steer", "weights", "token", "dual", "random")
    c.study.seeds = (0, 1, 2)
    return c
