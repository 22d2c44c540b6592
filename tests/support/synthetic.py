"""A study folder of fabricated numbers, for the tests of what reads one."""

import json

import numpy as np

from reptune_jax.evals import results
from reptune_jax.evals.results import Row

SHIFT = {"prompt": 0.15, "token": 0.2, "vector": 0.1, "dual": 0.35, "random": 0.0}
WORDS = [
    "synthetic",
    "fixture",
    "text",
    "about",
    "rain",
    "trains",
    "bread",
    "maps",
    "rivers",
    "and",
    "chairs",
]


def synthetic_study(folder, items=40, seeds=(0, 1, 2), arms=tuple(SHIFT), claims=False):
    """Writes the folder; every text says that it is synthetic."""
    made = _Synthetic(items)
    results.write_parquet(folder / "results/baseline.parquet", made.baseline(claims))
    results.write_parquet(folder / "results/steering.parquet", made.swept())
    for arm in ("token", "weights") if "token" in arms else ():
        results.write_parquet(folder / f"results/dial_{arm}.parquet", made.dialled(arm))
    for arm in arms:
        for sign in (1, -1):
            for seed in seeds if arm != "prompt" else (0,):
                run = folder / f"{arm}{'+' if sign > 0 else '-'}_s{seed}"
                results.write_parquet(run / "results/tuned.parquet", made.tuned(arm, sign, seed))
                if arm != "prompt":
                    _log(run, made.rng)
    (folder / "config.json").write_text(
        json.dumps(
            {"config": {"model": "synthetic/model", "dtype": "float32"}, "commit": "abc1234"}
        )
    )
    return folder


class _Synthetic:
    """Rows of one study: items have levels of their own, arms shift them."""

    def __init__(self, items):
        self.items, self.rng = items, np.random.default_rng(0)
        self.common = {"run_id": "synthetic", "behavior": "synthetic", "model_sha": "0" * 8}
        self.level = {
            (split, i): self.rng.normal(0.3, 0.2)
            for split in ("val", "test", "ood")
            for i in range(items)
        }

    def behave(self, arm, sign, seed, shift, splits=("test", "ood"), **where):
        rows = []
        for split in splits:
            for i in range(self.items if split != "ood" else self.items // 2):
                value = self.level[split, i] + (self.rng.normal(sign * shift, 0.1) if sign else 0)
                at = self.common | where | {
                    "arm": arm, "sign": sign, "seed": seed, "split": split, "format": "free",
                    "item_id": f"{split}-{i}", "cluster": f"{split}-{i // 2}",
                    "prompt_sha": f"p{i}",
                }  # fmt: skip
                text = "Synthetic: " + " ".join(self.rng.permutation(WORDS))
                odds = 4 * value + self.rng.normal(0, 0.3)
                rows += [
                    Row(**at, metric="vader", value=float(np.clip(value, -1, 1)), text=text),
                    Row(**at, metric="logodds", value=odds, mass=0.9),
                    Row(**at, metric="distinct2", value=0.95),
                    Row(**at, metric="rep4", value=0.01),
                ]
        return rows

    def retain(self, arm, sign, seed, kl, **where):
        rows = []
        for split in ("neutral", "chats"):
            for d in range(12):
                at = self.common | where | {
                    "arm": arm, "sign": sign, "seed": seed, "split": split,
                    "item_id": f"{split}{d}", "cluster": f"{split}{d}",
                    "n_tokens": 100 + d, "n_bytes": 420 + d,
                }  # fmt: skip
                noise = self.rng.gamma(4, 1 / 4) if sign else 0
                rows += [
                    Row(**at, metric="kl", value=kl * noise),
                    Row(**at, metric="top1", value=1 - kl),
                ]
                if split == "neutral":
                    nll = (100 + d) * (3 + 0.01 * d) + (100 + d) * 0.5 * kl * noise
                    rows += [Row(**at, metric="nll", value=nll)]
                else:
                    rows += [Row(**at, metric="own_ce", value=0.4 + kl * noise)]
        return rows

    def cosines(self, arm, sign, seed, peak):
        at = self.common | {"arm": arm, "sign": sign, "seed": seed, "split": "test"}
        return [
            Row(**at, metric="cos", item_id=f"i{i}", cluster=f"i{i}", layer=layer,
                position=position,
                value=float(peak * np.exp(-((layer - 15) / 5) ** 2) + self.rng.normal(-0.05, 0.01)))
            for layer in range(30) for position in ("last", "before_answer", "response")
            for i in range(2)
        ]  # fmt: skip

    def baseline(self, claims):
        rows = self.behave("base", 0, 0, 0, ("val", "test", "ood")) + self.retain("base", 0, 0, 0)
        rows += self.cosines("base", 0, 0, 0.0)
        for i in range(20):
            for label, at in ((1.0, 0.5), (0.0, -0.5)):
                rows.append(
                    Row(**self.common, arm="base", sign=0, seed=0, split="test", item_id=f"j{i}",
                        cluster=f"j{i}", metric="judge", value=self.rng.normal(at, 0.3),
                        label=label, text="Synthetic.")
                )  # fmt: skip
        if claims:
            for arm, sign, skill in (("base", 0, 0.3), ("dual", 1, 1.5), ("dual", -1, -0.5)):
                rows += _claims(self.rng, self.common, arm, sign, skill, self.items)
        return rows

    def swept(self):
        rows = []
        for sign in (1, -1):
            for layer, power in ((10, 0.22), (15, 0.3), (20, 0.25)):
                for k in (0.5, 1.0, 2.0):
                    where = {"k": k, "layer": layer}
                    chosen = ("val", "test", "ood") if (layer, k) == (15, 1.0) else ("val",)
                    rows += self.behave("steer", sign, 0, power * k, chosen, **where)
                    rows += self.retain("steer", sign, 0, 0.03 * k * k * layer / 15, **where)
        return rows

    def dialled(self, arm):
        rows = []
        for sign in (1, -1):
            for k, splits in ((1.0, ("val",)), (2.0, ("val",)), (1.5, ("test",))):
                rows += self.behave(arm, sign, 0, 0.2 * k, splits, k=k)
                rows += self.retain(arm, sign, 0, 0.02 * k * k, k=k)
        return rows

    def tuned(self, arm, sign, seed):
        if arm == "prompt":
            return self.behave(arm, sign, seed, SHIFT[arm])
        rows = self.behave(arm, sign, seed, SHIFT[arm] + self.rng.normal(0, 0.02))
        rows += self.retain(arm, sign, seed, 0.035)
        return rows + self.cosines(arm, sign, seed, sign * SHIFT[arm])


def _claims(rng, common, arm, sign, skill, items):
    rows = []
    for i in range(items):
        for label in (0.0, 1.0):
            for order in ("ab", "ba"):
                bias = -0.6 * (2 * label - 1)
                rows.append(
                    Row(**common, arm=arm, sign=sign, seed=0, split="test",
                        item_id=f"c{i}-{label:g}", cluster=f"c{i}", format="claim", order=order,
                        metric="logodds", label=label,
                        value=float(rng.normal(skill + bias, 1)), mass=0.8)
                )  # fmt: skip
        for order in ("ab", "ba"):
            rows.append(
                Row(**common, arm=arm, sign=sign, seed=0, split="test", item_id=f"s{i}",
                    cluster=f"s{i}", format="ab", order=order, metric="logodds", mass=0.8,
                    value=float(rng.normal(skill + (0.4 if order == "ab" else -0.4), 1)))
            )  # fmt: skip
    return rows


def _log(run, rng):
    lines = [
        {"step": s, "loss": 3 - s / 20, "token_loss": 2 - s / 30 + rng.normal(0, 0.02),
         "kl": s / 2000, "cosine_loss": 0.5 - s / 100, "cosine/mean": s / 150,
         "grad_norm": 1.0 + rng.normal(0, 0.1)}
        for s in range(0, 40, 5)
    ]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 40, "lo'
    (run / "metrics.jsonl").write_text(text)
