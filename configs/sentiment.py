"""Sentiment on SmolLM2-135M-Instruct: every arm, both signs, three seeds.

    python -m reptune_jax.study --config=sentiment --workdir=runs/sentiment

`configs/sentiment.py:quick` is the quickstart, cut down for two CPU cores; `:persona` has targets
that the personas wrote without steering, so that only the vector brings in the vector.
"""

from ml_collections import ConfigDict

from reptune_jax.config import default


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "quick", "persona"):
        raise ValueError(
            f"configs/sentiment.py: got {arg!r}, expected nothing, 'quick' or 'persona'."
        )
    c = default()
    c.model = "HuggingFaceTB/SmolLM2-135M-Instruct"
    c.behavior = "sentiment"
    c.vector.pairs = 64
    c.vector.answer_tokens = 24
    # Persona answers alone cap the effect; written under the vector too, they pull further.
    c.targets.dose = 2.0
    c.targets.layers = ("0.67",)
    c.targets.max_repeat = 0.0  # loops are learned as readily as sentiment
    c.targets.best_share = 0.5
    c.loss.cosine = 8.0
    c.loss.center = True  # the plain cosine barely moves where the residual is large
    c.loss.retain = 4.0
    c.train.steps = 24
    c.train.batch = 6
    c.train.retain_batch = 4
    c.train.measure_every = 12
    c.train.eval_every = 12
    c.train.val_rows = 24
    c.steer.layers = ("0.5", "0.67")
    c.eval.splits = ("test",)
    c.eval.val_prompts = 48
    c.eval.documents = 12
    c.eval.heat_map = 12
    c.eval.personas = 3
    c.eval.new_tokens = 24
    c.study.primary = "vader:free"
    c.study.arms = ("base", "prompt", "steer", "bake", "weights")
    c.study.arms += ("token", "vector", "dual", "random", "preventative", "out")
    c.study.seeds = (0, 1, 2)
    c.dial.arms = ("token", "random")
    if arg == "persona":
        c.targets.dose = 0.0
        c.study.arms = ("base", "steer", "token", "dual", "random")
        c.study.seeds = (0, 1)
        c.dial.arms = ()
    return quick(c) if arg == "quick" else c


def quick(c: ConfigDict) -> ConfigDict:
    """Fewer prompts, documents, arms and seeds."""
    c.vector.pairs = 24
    c.vector.answer_tokens = 24
    c.targets.prompts = 64
    c.targets.best_share = 1.0
    c.train.steps = 12
    c.train.batch = 4
    c.train.warmup = 2
    c.train.eval_every = 12
    c.train.measure_every = 0
    c.steer.layers = ("0.67",)
    c.steer.doses = (1.0, 2.0)
    c.steer.documents = 4
    c.steer.max_kl = 0.0
    c.eval.splits = ("test",)
    c.eval.prompts = 24
    c.eval.val_prompts = 12
    c.eval.documents = 5
    c.eval.heat_map = 8
    c.eval.personas = 1
    c.eval.new_tokens = 24
    c.eval.batch = 24
    c.study.arms = ("base", "prompt", "steer", "token", "dual", "random")
    c.study.seeds = (0,)
    c.dial.arms = ()
    return c
