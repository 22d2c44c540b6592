"""Program: what every arm of a study kept of the untuned model's accuracy on public suites.

    python -m reptune_jax.evals.capability --workdir=runs/sentiment --config.suites.data=DIR

Multiple choice by log-probabilities, tasks by what is answered (`suites.names`), of the arms in
`suites.arms` that the folder has: base, the persona that was chosen, steering at the chosen dose,
every finished run. Writes `results/capability_<condition>.parquet`; what is there of the same items
is not measured again.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from reptune_jax import distributed, program
from reptune_jax.config import CONTRASTS, SUITES
from reptune_jax.console import say
from reptune_jax.data import behavior as behaviors
from reptune_jax.data import neutral
from reptune_jax.evals import arms, results
from reptune_jax.evals.arms import Condition
from reptune_jax.evals.bench import say_missing
from reptune_jax.evals.results import SCHEMA, Row, sha, write_parquet
from reptune_jax.evals.stats import Interval
from reptune_jax.evals.suites import readers, scoring, tasks, verdicts
from reptune_jax.evals.suites.readers import Question
from reptune_jax.evals.suites.tasks import Task
from reptune_jax.evals.sweep import dual_runs
from reptune_jax.folder import RunName, Study
from reptune_jax.lm import Model
from reptune_jax.roles import digest
from reptune_jax.vectors import extraction
from reptune_jax.vectors.steering_vector import SteeringVector


class Planned(NamedTuple):
    """A condition that the folder has, by the name of its file, and how it is made."""

    name: str
    make: Callable[[Model], Condition]
    scale: float = 0.0  # of weights that are scaled; another one is another condition
    persona: str = ""  # identifies the one that it is under, which its name does not


def run(c: ConfigDict, workdir: Path, model: Model | None = None) -> list[Path]:
    """Measures what is missing and prints the table; the files of the results.

    Raises:
      ValueError: no suites are named, or one's rows are not there.
    """
    if not c.suites.names:
        raise ValueError(f"suites.names: got none, expected some of {', '.join(SUITES)}.")
    study = Study(workdir)
    study.check(c)
    names = dict.fromkeys(c.suites.names)
    asked: list[Question | Task] = []
    for name in names:
        read = tasks.read if name in tasks.TASKS else readers.read
        asked += read(name, c.suites.data, c.suites.limit)
    say(f"capability: {len({q.id for q in asked})} items of {', '.join(names)}")
    base = cache(lambda: base_of(c, study, model))
    paths = []
    for planned in conditions(c, study, c.suites.arms):
        path = study.capability(planned.name)
        with study.writing():
            measure(c, study, planned, path, asked, base)
        paths.append(path)
    found = pd.concat([results.read(path) for path in paths], ignore_index=True)
    print(table(verdicts.frame(found, c.suites.margin), c.suites.margin), flush=True)
    return paths


def base_of(c: ConfigDict, study: Study, model: Model | None) -> Model:
    """The untuned model; its chats are those of the study's vector, which may be of another day."""
    base = model or program.load_model(c)
    if distributed.exists(study.vector):
        extraction.fit(SteeringVector.load(study.vector), base)
    return base


def measure(
    c: ConfigDict,
    study: Study,
    planned: Planned,
    path: Path,
    asked: Sequence[Any],
    base: Callable[[], Model],
    ask: Callable[..., list[Row]] | None = None,
) -> None:
    """Writes a condition's rows; those of a test's very items that are there are kept.

    `asked` have a `test` and an `id`, and are questions unless another `ask` makes rows of them. A
    test is known by what is asked too: other rows of a file may have the same numbers.
    """
    before = _there(path)
    before = before[before.k == planned.scale] if planned.scale else before
    texts = _digests(asked)
    if planned.persona:
        texts = {
            test: digest({"asked": sha, "under": planned.persona}) for test, sha in texts.items()
        }
    items = pd.Series([q.id for q in asked]).groupby([q.test for q in asked]).agg(set)
    had = before.groupby("template").item_id.agg(set)
    noted = (results.made_for(path) if len(before) else None) or {}
    known = {
        test
        for test in had.index
        if test not in items
        or (had[test] == items[test] and noted.get(test, texts[test]) == texts[test])
    }
    missing = [q for q in asked if q.test not in known]
    if not missing:
        say(f"{path}: already there")
        return
    study.claim(c)
    cond = planned.make(base())
    say(f"asking {cond.title}")
    about = {"behavior": behaviors.load(c.behavior).name, "config_sha": digest(c.to_dict())}
    rows = (ask or _rows)(cond, about | cond.labels, missing, c.eval.batch)
    say_missing(cond, rows)
    kept = before[before.template.isin(known)].drop(columns="file", errors="ignore")
    noted = {t: sha for t, sha in noted.items() if t in known}
    noted |= {t: sha for t, sha in texts.items() if t not in known}
    write_parquet(path, [Row(**row) for row in kept.to_dict("records")] + rows, noted)
    say(f"{cond.title}: {len(rows)} rows -> {path}")


def _digests(asked: Sequence[Any]) -> dict[str, str]:
    """What identifies the items of each test: all that is asked, and what is right."""
    found: dict[str, list[Any]] = {}
    for q in sorted(asked, key=lambda q: q.id):
        told = {k: v for k, v in q._asdict().items() if not callable(v)}
        told |= {k: sorted(v) for k, v in told.items() if isinstance(v, frozenset)}
        found.setdefault(q.test, []).append(told)
    return {test: digest({"asked": of}) for test, of in found.items()}


def _rows(
    cond: Condition, labels: dict[str, Any], asked: Sequence[Question | Task], batch: int
) -> list[Row]:
    """Of choices by their log-probabilities, of tasks by what is answered."""
    choices = [q for q in asked if isinstance(q, Question)]
    answered = [q for q in asked if isinstance(q, Task)]
    found = scoring.rows(cond, labels, choices, batch) if choices else []
    return found + tasks.rows(cond, labels, answered, batch)


def conditions(c: ConfigDict, study: Study, asked: Iterable[str]) -> Iterator[Planned]:
    """Those of the arms that the folder has; what is not there is said, and left out."""
    of: dict[str, Callable[[ConfigDict, Study], list[Planned]]] = {
        "base": lambda c, study: [Planned("base", lambda base: Condition(base, "base"))],
        "prompt": _prompted,
        "steer": _steered,
        **{arm: partial(_contrasted, arm) for arm in CONTRASTS},
    }
    for arm in dict.fromkeys(asked):
        found = of[arm](c, study) if arm in of else _tuned(study, arm)
        if not found:
            say(f"{arm}: not measured, {study.path} has none that is finished")
        yield from found


def _prompted(c: ConfigDict, study: Study) -> list[Planned]:
    """The personas that were chosen on validation: known by the prompts of unrelated chats."""
    rows = _there(study.baseline)
    shown = rows[(rows.arm == "prompt") & (rows.split == "chats")]
    found = []
    for sign, own in shown.groupby("sign"):
        prompts = dict(zip(own.item_id, own.prompt_sha, strict=True))
        make = partial(_chosen_persona, c, int(sign), prompts)
        found.append(Planned(f"prompt{_mark(sign)}", make, persona=digest(prompts)))
    return found


def _chosen_persona(c: ConfigDict, sign: int, shown: dict[str, str], base: Model) -> Condition:
    """The persona under which the base reads these chats as these prompts."""
    chats = [chat for chat in neutral.load_neutral("chats", "test") if chat["id"] in shown][:3]
    for persona in behaviors.load(c.behavior).select(format="persona"):
        cond = arms.prompted(base, persona, sign)
        turns = ((chat["id"], cond.under_persona(chat["messages"])) for chat in chats)
        if chats and all(sha(base.encode_prompt(said)) == shown[id] for id, said in turns):
            return cond
    raise ValueError(
        f"prompt {sign:+d}: got the prompts of a persona that is none of {c.behavior}, expected "
        "one of its own. Leave prompt out of suites.arms."
    )


def _steered(c: ConfigDict, study: Study) -> list[Planned]:
    """At the dose that was tested; of two, the larger KL within what `dual` costs."""
    rows = _there(study.steering)
    tested = rows[(rows.arm == "steer") & (rows.split == "test")]
    found = []
    for sign, own in tested.groupby("sign"):
        costs = {at: _kl(rows, sign, *at) for at in sorted({*zip(own.layer, own.k, strict=True)})}
        budget = _dual_kl(study, int(sign))
        # A twentieth over: a dose interpolated to equal KL never meets it exactly.
        within = {at: kl for at, kl in costs.items() if kl <= 1.05 * budget}
        at = max(within, key=within.__getitem__) if within else min(costs, key=costs.__getitem__)
        where = int(at[0]), float(at[1]), int(sign)
        name = f"steer{_mark(sign)}_k{at[1]:g}_l{at[0]}"
        found.append(Planned(name, partial(_steer_at, c, study, where)))
    return found


def _dual_kl(study: Study, sign: int) -> float:
    """Mean KL of the tuned dual runs on the documents of the test; without a limit if unknown."""
    each = [results.read(run.results) for run in dual_runs(study, sign)]
    found = [rows[(rows.metric == "kl") & (rows.split == "neutral")] for rows in each]
    kl = float(np.mean([np.average(f["value"], weights=f["n_tokens"]) for f in found] or [np.inf]))
    return kl if math.isfinite(kl) else np.inf


def _steer_at(c: ConfigDict, study: Study, where: tuple[int, float, int], base: Model) -> Condition:
    return arms.steered(base, SteeringVector.load(study.vector), *where, c.steer)


def _contrasted(arm: str, c: ConfigDict, study: Study) -> list[Planned]:
    """At the scale that was tested."""
    rows = _there(study.dial(arm))
    found = []
    for at in rows[rows.split == "test"].groupby(["sign", "seed", "k"]).groups:
        sign, seed, scale = int(at[0]), int(at[1]), float(at[2])
        toward, away = (study.run(RunName(CONTRASTS[arm], s, seed)).path for s in (sign, -sign))
        make = partial(arms.contrasted, arm, toward=toward, away=away, scale=scale)
        found.append(Planned(str(RunName(arm, sign, seed)), make, scale))
    return found


def _tuned(study: Study, arm: str) -> list[Planned]:
    """The finished runs of an arm, as they were trained."""
    runs = [run for run in study.runs() if run.finished()]
    named = [(RunName.parse(run.path.name), run.path) for run in runs]
    return [
        Planned(str(name), partial(arms.tuned, run=path))
        for name, path in named
        if name is not None and name.arm == arm
    ]


def _kl(rows: pd.DataFrame, sign: int, layer: int, dose: float) -> float:
    """nats/token on neutral prose."""
    at = (rows.sign == sign) & (rows.layer == layer) & (rows.k == dose)
    kl = rows[at & (rows.metric == "kl") & (rows.split == "neutral")]
    return float(np.average(kl["value"], weights=kl.n_tokens)) if len(kl) else np.inf


def _there(path: Path) -> pd.DataFrame:
    """The rows of a file; none where it is not there."""
    if not distributed.exists(path):
        return pd.DataFrame(columns=SCHEMA.names)
    return results.read(path)


def _mark(sign: int) -> str:
    return "+" if sign > 0 else "-"


def table(found: pd.DataFrame, margin: float) -> str:
    """The verdicts as lines of text."""
    lines = [("suite", "arm", "accuracy", "chance", "change to base", "verdict", "items")]
    for r in found.itertuples():
        scale = f" k {r.k:g}" if r.k else ""
        arm = r.arm if r.arm == "base" else f"{r.arm} {_mark(r.sign)}{scale}"
        change = r.change
        lines.append(
            (
                r.test if r.metric == "acc" else f"{r.test} ({r.metric})",
                arm,
                _interval(r.acc, ""),
                f"{r.chance:.3f}",
                "" if change is None else _interval(change, "+"),
                r.verdict,
                f"{r.items}" + (f", {r.missing} values missing" if r.missing else ""),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    return "\n".join([*text, f"retained: a loss of {margin:g} or more is excluded (95 %)."])


def _interval(x: Interval, plus: str) -> str:
    return f"{x.estimate:{plus}.3f} [{x.low:{plus}.3f}, {x.high:{plus}.3f}]"


if __name__ == "__main__":
    program.main(run, __doc__, of_study=True)
