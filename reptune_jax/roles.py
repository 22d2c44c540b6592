"""What a key of the config is to a result: part of it, of one run, of how it is measured, none.

Identity of folders, and of what was measured, is made of the values that matter to it.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from reptune_jax.config import default

# What a key or section is. One that is not here is part of every result.
ROLES: dict[str, str] = {
    "arm": "run",  # tells the runs of a study apart
    "sign": "run",
    "seed": "run",
    "study.arms": "study",  # which arms and runs there are, which may grow
    "study.signs": "study",
    "study.seeds": "study",
    "study.export": "study",
    "study.primary": "declared",  # of the study, before it runs; no run depends on it
    "eval": "measure",  # how a model is measured: trains nothing
    "steer": "measure",
    "dial.arms": "study",
    "dial.scales": "measure",
    "suites.names": "study",
    "suites.data": "study",
    "suites.limit": "study",
    "suites.arms": "study",
    "suites.margin": "declared",
    "specificity": "study",
    "attack.names": "study",
    "attack.arms": "study",
    "attack.seeds": "study",
    "attack.prompts": "study",
    "attack.documents": "study",
    "attack.pairs": "study",
    "attack.texts": "study",
    "attack.layer": "study",
    "attack.doses": "study",
    "attack.scales": "study",
    "attack.personas": "study",
    "attack.lr": "study",
    "attack.steps": "study",
    "attack.max_kl": "declared",
    "mesh": "passing",  # may change between two starts of one run
    "train.save_every": "passing",
    "train.save_minutes": "passing",
    "train.profile": "passing",
    "train.remat": "passing",  # what is computed again is the same
    "train.pack": "passing",  # the same losses, in other rows
    "train.peak_tflops": "passing",
    "chat": "shown",  # is only looked at, and is not stored either
    "search": "shown",
    "select": "shown",
}
# What a vector and the targets depend on.
OF_VECTOR: tuple[str, ...] = ("model", "dtype", "tf32", "template_arguments", "behavior", "vector")
OF_VECTOR += ("targets", "train.base", "eval.val_prompts", "eval.batch")


def digest(values: dict[str, Any]) -> str:
    """Identifies the resolved values, whatever file they came from."""
    text = json.dumps(lasting(values), sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def differences(there: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`key: value there, value now` for every key that a result may depend on."""
    trees = (there, now, default().to_dict())
    was, new, first = (_flatten(lasting(json.loads(json.dumps(tree)))) for tree in trees)
    # A key that is newer than the folder has the value that made no difference then.
    first |= {k: new[k] for k in keys_of("declared") if k in new}
    was = {k: v for k, v in first.items() if k in new} | was
    changed = [k for k in sorted(was.keys() | new.keys()) if was.get(k) != new.get(k)]
    return [f"{k}: {was.get(k)!r} there, {new.get(k)!r} now" for k in changed]


def keys_of(*roles: str) -> tuple[str, ...]:
    """The keys and sections that have one of these `ROLES`."""
    return tuple(key for key, role in ROLES.items() if role in roles)


def is_of(key: str, keys: Iterable[str]) -> bool:
    """Whether it is one of these keys, or in one of these sections."""
    return any(key == one or key.startswith(f"{one}.") for one in keys)


def without(values: dict[str, Any], *roles: str, prefix: str = "") -> dict[str, Any]:
    """The values of a config, less those of the keys and sections with one of these `ROLES`."""
    out = {}
    for key, value in values.items():
        if ROLES.get(prefix + key) not in roles:
            nested = isinstance(value, dict)
            out[key] = without(value, *roles, prefix=f"{prefix}{key}.") if nested else value
    return out


def lasting(values: dict[str, Any]) -> dict[str, Any]:
    """The values that a result may depend on: not chat's, the devices', or when to save."""
    return without(values, "passing", "shown")


def as_file(c: ConfigDict, about: str) -> str:
    """A config file of what differs from the defaults, but for what is searched."""
    first, ours = (_flatten(without(x.to_dict(), "shown")) for x in (default(), c))
    changed = {key: value for key, value in ours.items() if first.get(key) != value}
    lines = "".join(f"    c.{key} = {value!r}\n" for key, value in changed.items())
    return (
        f'"""{about}"""\n\n'
        "from ml_collections import ConfigDict\n\nfrom reptune_jax.config import default\n\n\n"
        f"def get_config() -> ConfigDict:\n    c = default()\n{lines}    return c\n"
    )


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= _flatten(value, name + ".") if isinstance(value, dict) else {name: value}
    return flat
