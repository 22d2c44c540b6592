"""What values a config's keys may have: one table, checked before anything is done."""

import math
from typing import Any, NamedTuple

from flax import traverse_util
from ml_collections import ConfigDict

from reptune_jax import config as configs
from reptune_jax import depth
from reptune_jax.hub import templates
from reptune_jax.model import integers, intervene

_POSITIONS = ("response", "last", "before_answer", "all")
_SEED = 2**32 - 1


class Range(NamedTuple):
    """Numbers from `low` to `high`, both allowed unless `above`; of a tuple's every element."""

    low: float
    high: float = math.inf
    above: bool = False  # `low` itself is not allowed

    def __str__(self) -> str:
        low = f"more than {self.low:g}" if self.above else f"{self.low:g} or more"
        return low if self.high == math.inf else f"{low}, at most {self.high:g}"

    def __contains__(self, value: Any) -> bool:
        fits = self.low < value if self.above else self.low <= value
        return bool(fits and value <= self.high and math.isfinite(value))  # never NaN


class Layer:
    """A layer's number, or a share of the depth."""

    def __str__(self) -> str:
        return "layers, counted from 0, or shares of the depth such as 0.5"

    def __contains__(self, value: Any) -> bool:
        return depth.number(value) or depth.share(value)


_COUNT, _AT_LEAST_ONE, _WEIGHT, _SHARE = Range(0), Range(1), Range(0, 1e6), Range(0, 1)
_DOSE, _RATE = Range(-1e4, 1e4), Range(0, 1, above=True)
_MOMENT = Range(0, 0.9999999)

_LAYER = Layer()

RANGES: dict[str, Range | Layer | tuple[Any, ...]] = {
    "dtype": ("", "float32", "bfloat16", "float16"),
    "arm": tuple(configs.ARMS),
    "sign": (1, -1),
    "seed": Range(0, _SEED),
    "mesh.data": Range(-1),
    "mesh.fsdp": Range(-1),
    "mesh.tensor": Range(-1),
    "vector.method": configs.METHODS,
    "vector.norm": ("raw", "unit"),
    "vector.pairs": _AT_LEAST_ONE,
    "vector.answer_tokens": _AT_LEAST_ONE,
    "vector.answers": ("persona", "given"),
    "targets.answers": ("persona", "given"),
    "targets.prompts": _COUNT,
    "targets.dose": _DOSE,
    "targets.layers": _LAYER,
    "targets.max_repeat": _SHARE,
    "targets.best_share": _RATE,
    "loss.token": _WEIGHT,
    "loss.cosine": _WEIGHT,
    "loss.retain": _WEIGHT,
    "loss.l2": _WEIGHT,
    "loss.own": _WEIGHT,
    "loss.ending": _WEIGHT,
    "loss.steer": _DOSE,
    "loss.match": _WEIGHT,
    "loss.goal": ("persona", "displaced"),
    "loss.dose": _DOSE,
    "loss.mode": configs.MODES,
    "loss.shift": Range(-2, 2),
    "loss.targets": ("behavior", "neutral"),
    "loss.layers": _LAYER,
    "loss.anneal.*": _WEIGHT,
    "loss.also.*.sign": (1, -1),
    "loss.also.*.mode": (*configs.MODES, "hold"),
    "loss.also.*.shift": Range(-2, 2),
    "loss.also.*.token": _WEIGHT,
    "loss.also.*.cosine": _WEIGHT,
    "loss.also.*.targets": ("behavior", "neutral"),
    "loss.also.*.layers": _LAYER,
    "loss.also.*.batch": _AT_LEAST_ONE,
    "loss.also.*.anneal": _WEIGHT,
    "train.layers": _LAYER,
    "train.lora.rank": _COUNT,
    "train.lora.alpha": Range(0, above=True),
    "train.base": ("", *integers.KINDS),
    "train.steps": _AT_LEAST_ONE,
    "train.batch": _AT_LEAST_ONE,
    "train.accumulate": _AT_LEAST_ONE,
    "train.retain_batch": _AT_LEAST_ONE,
    "train.retain_positions": _AT_LEAST_ONE,
    "train.lr": _RATE,
    "train.lr_by_path.*": _SHARE,
    "train.warmup": _COUNT,
    "train.decay": ("linear", "cosine", "none"),
    "train.clip": _COUNT,
    "train.b1": _MOMENT,
    "train.b2": _MOMENT,
    "train.eps": Range(0, above=True),
    "train.weight_decay": _SHARE,
    "train.remat": ("auto", "none", "dots", "full"),
    "train.pack": ("auto", "on", "off"),
    "train.cache_gib": _COUNT,
    "train.log_every": _AT_LEAST_ONE,
    "train.measure_every": _COUNT,
    "train.eval_every": _AT_LEAST_ONE,
    "train.rows": _COUNT,
    "train.val_rows": _COUNT,
    "train.patience": _COUNT,
    "train.keep": _AT_LEAST_ONE,
    "train.save_every": _COUNT,
    "train.save_minutes": _COUNT,
    "train.peak_tflops": _COUNT,
    "train.profile": _COUNT,
    "steer.layers": _LAYER,
    "steer.doses": Range(0, 1e4, above=True),
    "steer.width": _AT_LEAST_ONE,
    "steer.operation": intervene.OPERATIONS,
    "steer.documents": _AT_LEAST_ONE,
    "steer.max_kl": _COUNT,
    "dial.arms": configs.TUNED_ARMS[:-1],  # `out` is the same for both signs
    "dial.scales": Range(0, 1e4, above=True),
    "eval.splits": ("val", "test", "ood"),
    "eval.prompts": _COUNT,
    "eval.answered": _COUNT,
    "eval.val_prompts": _COUNT,
    "eval.ood_prompts": _COUNT,
    "eval.claims": _COUNT,
    "eval.scenarios": _COUNT,
    "eval.documents": _COUNT,
    "eval.heat_map": _COUNT,
    "eval.personas": _AT_LEAST_ONE,
    "eval.new_tokens": _AT_LEAST_ONE,
    "eval.batch": _AT_LEAST_ONE,
    "eval.scale": Range(0, 10),
    "suites.names": configs.SUITES,
    "suites.limit": _COUNT,
    "suites.arms": tuple(arm for arm in configs.ARMS if arm != "bake"),  # which is `steer`
    "suites.margin": Range(0, 1, above=True),
    "specificity.prompts": _COUNT,
    "specificity.arms": tuple(arm for arm in configs.ARMS if arm != "bake"),
    "attack.names": configs.ATTACKS,
    "attack.arms": tuple(arm for arm in configs.ARMS if arm not in ("bake", "prompt")),
    "attack.seeds": _COUNT,
    "attack.prompts": _COUNT,
    "attack.documents": _COUNT,
    "attack.pairs": _AT_LEAST_ONE,
    "attack.texts": _AT_LEAST_ONE,
    "attack.layer": Range(-1),
    "attack.doses": Range(0, 1e4, above=True),
    "attack.scales": _DOSE,
    "attack.personas": _AT_LEAST_ONE,
    "attack.lr": _RATE,
    "attack.steps": _AT_LEAST_ONE,
    "attack.max_kl": Range(0, above=True),
    "study.arms": tuple(configs.ARMS),
    "study.signs": (1, -1),
    "study.seeds": Range(0, _SEED),
    "search.lr": _RATE,
    "search.cosine": _WEIGHT,
    "search.steps": _AT_LEAST_ONE,
    "search.keep": _RATE,
    "search.max_kl": Range(0, above=True),
    "select.methods": configs.METHODS,
    "select.widths": _AT_LEAST_ONE,
    "select.operations": intervene.OPERATIONS,
    "select.shares": _RATE,
    "select.keep": _AT_LEAST_ONE,
    "select.max_kl": Range(0, above=True),
    "select.broken": _SHARE,
    "chat.scale": _DOSE,
    "chat.layer": Range(-1),
    "chat.dose": _DOSE,
    "chat.new_tokens": _AT_LEAST_ONE,
}


def check(config: ConfigDict) -> ConfigDict:
    """The config with references resolved and values checked.

    Raises:
      ValueError: a value outside its range, by name.
    """
    out = config.copy_and_resolve_references()
    for key, value in traverse_util.flatten_dict(out.to_dict(), sep=".").items():
        allowed = RANGES.get(key) or RANGES.get(_any_name(key))
        for one in value if isinstance(value, tuple) else (value,):
            if allowed is not None and one not in allowed:
                names = allowed if isinstance(allowed, Range | Layer) else _names(allowed)
                raise ValueError(f"{key}: got {one!r}, expected {names}.")
    if not out.model:
        raise ValueError(
            "model: got '', expected a folder, hub id or .gguf file. Set --config.model=…"
        )
    templates.parse(out.template_arguments)
    low, high = (*out.eval.scale, -1, -1)[:2]
    if len(out.eval.scale) != 2 or not low < high:
        raise ValueError(f"eval.scale: got {out.eval.scale}, expected low < high. Example: (1, 5).")
    _check_losses(out)
    _check_steps(out.train)
    for rule in (out.steer.tokens, *out.select.tokens):
        intervene.span(rule)
    if "bake" in out.study.arms and (out.steer.operation, out.steer.tokens) != ("add", "all"):
        raise ValueError(
            f"study.arms: got bake with steer.operation={out.steer.operation} and steer.tokens="
            f"{out.steer.tokens}, expected add and all: nothing else is a constant. Leave it out."
        )
    for key in ("arms", "signs", "seeds"):
        value = out.study[key]
        if not value or len(set(value)) < len(value):
            raise ValueError(f"study.{key}: got {value}, expected some, each of them once.")
    return out


def _any_name(key: str) -> str:
    """The key in the table, of one whose last or last but one part is a name of the user's."""
    parts = key.split(".")
    if key.startswith("loss.also."):
        return ".".join(["loss.also.*", *parts[3:]])
    return ".".join([*parts[:-1], "*"])


def _names(allowed: tuple[Any, ...]) -> str:
    return f"one of {', '.join(map(str, allowed))}"


def _check_losses(c: ConfigDict) -> None:
    spans = {"train.layers": c.train.layers, "loss.layers": c.loss.layers}
    positions = {"vector.position": c.vector.position, "loss.position": c.loss.position}
    positions |= {f"select.positions {p!r}": p for p in c.select.positions}
    ends = {f"loss.anneal.{name}": ends for name, ends in c.loss.anneal.items()}
    for name, one in c.loss.also.items():
        spans[f"loss.also.{name}.layers"] = one.layers
        positions[f"loss.also.{name}.position"] = one.position
        ends[f"loss.also.{name}.anneal"] = one.anneal
        if one.batch % c.train.accumulate:
            raise ValueError(
                f"loss.also.{name}.batch: got {one.batch}, expected a multiple of "
                f"train.accumulate={c.train.accumulate}."
            )
    for key, value in spans.items():
        alike = len({*map(depth.number, value)}) == 1  # else the depth decides
        if len(value) != 2 or (alike and not float(value[0]) < float(value[1])):
            raise ValueError(f"{key}: got {value}, expected first < stop. Example: (10, 20).")
    for key, value in ends.items():
        if len(value) != 2:
            raise ValueError(f"{key}: got {value}, expected two factors. Example: (1, 0).")
    for key, value in positions.items():
        if value not in _POSITIONS and not (value.startswith("-") and value[1:].isdigit()):
            raise ValueError(
                f"{key}: got {value!r}, expected one of {', '.join(_POSITIONS)}, or a negative "
                "offset from the end of the prompt."
            )


def _check_steps(train: ConfigDict) -> None:
    first, stop = train.profile
    if (first, stop) != (0, 0) and not first < stop <= train.steps:
        raise ValueError(
            f"train.profile: got {(first, stop)}, expected first < stop <= train.steps="
            f"{train.steps}, or (0, 0) for none."
        )
    if train.base and not train.lora.rank:
        raise ValueError(
            f"train.base: got {train.base!r} with train.lora.rank=0, expected adapters: integers "
            "are not trained. Set train.lora.rank=16, or train.base=''."
        )
    if train.batch % train.accumulate or train.retain_batch % train.accumulate:
        raise ValueError(
            f"train.accumulate: got {train.accumulate}, expected a divisor of train.batch="
            f"{train.batch} and train.retain_batch={train.retain_batch}."
        )
