"""What `select` chooses against choices that are fixed in advance, at equal KL, on test prompts.

    python -m benchmarks.choices --study runs/helpfulness --workdir runs/choices \\
        [--budget .05] [--prompts 60] [--documents 4]

Of a study folder's model, behavior and settings. `select` searches on validation as it does alone.
Then every choice is brought to the same KL on validation prose, and measured once on test: log-odds
of the given answers, against untuned and against what was selected, paired by prompt. The fixed
choices: repeng's (pair-centred PCA, the blocks from the 17th to the 5th from the end), the paper's
(mean difference at layer 15 of 40), and every single layer of the mean difference. Prints Markdown.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from reptune_jax import depth, program, ranges, stored_config
from reptune_jax.data import behavior as behaviors
from reptune_jax.data import neutral
from reptune_jax.evals import arms, scoring, stats
from reptune_jax.evals.arms import Condition
from reptune_jax.folder import Study
from reptune_jax.lm import Model
from reptune_jax.select import Search, Setting
from reptune_jax.select import run as select


class Choice(NamedTuple):
    """A way to steer, and the dose that costs the budget."""

    name: str
    setting: Setting
    dose: float


class Tested(NamedTuple):
    """A choice on test."""

    choice: Choice
    kl: float  # nats/token on neutral prose
    effect_I: np.ndarray  # log-odds less the untuned model's, toward the sign


def fixed(c: ConfigDict, N: int) -> Iterator[tuple[str, Setting]]:
    """What others would take without looking at the behavior."""
    zone = max(N - 17, 0), max(1, min(13, N - 4))
    yield "repeng's zone", Setting("pca_center", c.vector.position, *zone)
    yield "the paper's depth", Setting("mean_diff", c.vector.position, round(15 / 40 * N))
    for layer in range(N):
        yield f"layer {layer}", Setting("mean_diff", c.vector.position, layer)


def chosen(c: ConfigDict, workdir: Path) -> Choice:
    """What `select` writes as a config."""
    made: dict[str, Any] = {}
    exec(compile(select(c, workdir).read_text(encoding="utf-8"), "select.py", "exec"), made)
    best = made["get_config"]()
    depth.settle(best)
    how = best.steer.width, best.steer.operation, best.steer.tokens
    setting = Setting(best.vector.method, best.vector.position, best.steer.layers[0], *how)
    return Choice("select", setting, best.steer.doses[-1])


def tested(c: ConfigDict, search: Search, choices: list[Choice], prompts: int) -> list[Tested]:
    """Each on the first test prompts, and its KL on test documents."""
    model, items = search.model, search.behavior.select("test", "free")[:prompts]
    prose = neutral.prose(model, "test", c.steer.documents)
    known = scoring.refer(model, prose, c.eval.batch)

    def logodds(cond: Condition) -> np.ndarray:
        return np.array([row["value"] for row in scoring.contrasts(cond, items, c.eval.batch)])

    base_I, found = logodds(Condition(model, "base")), []
    for choice in choices:
        method, position, layer = choice.setting[:3]
        how = choice.setting.of(c, choice.dose, c.select.max_kl).steer
        at = search.vector(method, position), layer, choice.dose, c.sign
        cond = arms.steered(model, *at, how)
        labels = {"behavior": search.behavior.name} | cond.labels
        rows = scoring.retention_rows(cond, labels, known, c.eval.batch)
        kl = float(np.mean([row.value for row in rows if row.metric == "kl"]))
        found.append(Tested(choice, kl, c.sign * (logodds(cond) - base_I)))
        print(f"  {choice.name}: {found[-1].effect_I.mean():+.2f} at KL {kl:.4f}", flush=True)
    return found


def report(found: list[Tested], clusters: list[str]) -> Iterator[str]:
    """The selected, the named ones, and the best, middle and worst of all single layers."""
    selected, others = found[0], found[1:]
    single = sorted((t for t in others if t.choice.name.startswith("layer")), key=_mean)
    named = [t for t in others if not t.choice.name.startswith("layer")]
    shown = {"best": single[-1], "median": single[len(single) // 2], "worst": single[0]}
    yield "| choice | setting | dose | KL, test prose | effect, nats | select ahead by |"
    yield "|---|---|---|---|---|---|"
    for name, one in [("select", selected), *((t.choice.name, t) for t in named), *shown.items()]:
        name = name if one in (selected, *named) else f"{one.choice.name}, the {name} of all"
        effect = _interval(one.effect_I, clusters)
        ahead = "" if one is selected else _interval(selected.effect_I - one.effect_I, clusters)
        yield (
            f"| {name} | {one.choice.setting} | {one.choice.dose:g} | {one.kl:.4f} | {effect} "
            f"| {ahead} |"
        )
    better = sum(_mean(t) > _mean(selected) for t in single)
    yield ""
    yield f"Single layers with a larger mean effect on test: {better} of {len(single)}."


def _mean(one: Tested) -> float:
    return float(one.effect_I.mean())


def _interval(values_I: np.ndarray, clusters: list[str]) -> str:
    x = stats.bootstrap_mean(values_I, clusters)
    return f"{x.estimate:+.2f} [{x.low:+.2f}, {x.high:+.2f}]"


def compare(c: ConfigDict, workdir: Path, prompts: int, model: Model | None = None) -> list[str]:
    """The lines of the report."""
    depth.settle(c)
    choices = [chosen(c, workdir)]
    behavior = behaviors.load(c.behavior)
    search = Search(c, Study(workdir), model or program.load_model(c), behavior)
    for name, setting in fixed(c, search.model.arch.N):
        if dose := search.largest_dose(setting):
            choices.append(Choice(name, setting, dose))
        else:
            print(f"  {name}: no dose keeps to the budget", flush=True)
    clusters = [item.cluster for item in behavior.select("test", "free")[:prompts]]
    return list(report(tested(c, search, choices, prompts), clusters))


def main() -> None:
    """As the module says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--study", required=True)
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--sign", type=int, default=1, choices=(1, -1))
    parser.add_argument("--budget", type=float, default=0.05)
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--documents", type=int, default=4)
    given = parser.parse_args()
    c = stored_config.get_config(given.study)
    c.sign, c.select.max_kl, c.steer.documents = given.sign, given.budget, given.documents
    c.study.primary = "logodds:free"
    print("\n".join(compare(ranges.check(c), given.workdir, given.prompts)))


if __name__ == "__main__":
    main()
