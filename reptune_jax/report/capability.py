"""What every arm kept of the untuned model's accuracy on public suites, as a table."""

from reptune_jax import config as configs
from reptune_jax.evals.suites import verdicts
from reptune_jax.report import captions
from reptune_jax.report.blocks import Block, Table, interval, number
from reptune_jax.report.study import Setting, Study


def blocks(study: Study) -> list[Block]:
    """The table; nothing where no suite was asked."""
    stored = study.config.get("config", {}).get("suites", {})
    margin = float(stored.get("margin", configs.default().suites.margin))
    found = verdicts.frame(study.rows, margin)
    rows = [
        [
            r.test + (", per character" if r.metric == "acc_norm" else ""),
            Setting(r.arm, r.sign, r.k, r.layer).name,
            interval(r.acc, signed=False),
            number(r.chance),
            interval(r.change),
            r.verdict or "–",
            f"{r.items}" + (f", {r.missing} missing" if r.missing else ""),
            str(r.acc.n_seeds),
        ]
        for r in found.itertuples()
    ]
    header = [
        "Suite", "Arm", "Accuracy [95 % CI]", "Chance", "Δ vs base [95 % CI]", "Verdict", "Items",
        "Seeds",
    ]  # fmt: skip
    caption = captions.CAPABILITY.format(margin=margin)
    return [Table("Accuracy on public suites", caption, header, rows)] if rows else []
