"""Writes README's table of the studies in results/ from their summary.json.

Run as `python docs/assets/results.py`.
"""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- from results/ by docs/assets/results.py -->\n", "<!-- end -->"
# docs/results.md has them: what lost, what another costs, and what is too small to show a thing.
LEFT_OUT = (
    "sycophancy-persona", "sentiment-cost", "sentiment-8-labels", "honesty-quick", "honesty-cost",
)  # fmt: skip
RIVALS = ("prompt", "steer", "token", "random", "weights")
NOT_THE_VECTOR = "not shown better than random"  # moved, but so did the random direction


def table(results: Path) -> str:
    """A line for each kept study and sign: what dual did, and by how much it leads each rival."""
    head = ["study", "measure; seeds, items", "dual to untuned", "KL", *RIVALS]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for path in sorted(results.glob("*/summary.json")):
        if path.parent.name in LEFT_OUT:
            continue
        kept = json.loads(path.read_text(encoding="utf-8"))
        for dual in kept["dual"]:
            name = f"[{path.parent.name}](results/{path.parent.name}/README.md)"
            name += {1: " +", -1: " −"}[dual["sign"]]
            moved = dual["outcome"] in ("moved as asked", NOT_THE_VECTOR)
            measure = kept["primary"].split()[0].strip(",")
            evidence = f"{measure}; {kept['seeds']}, {kept['items']}"
            cells = [name, evidence, _shown(dual["delta"], moved)]
            cells += [dual["kl"], *(_lead(dual["against"].get(rival)) for rival in RIVALS)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _lead(found: dict[str, str] | None) -> str:
    """The difference in the arm's direction, bold where it is shown."""
    if found is None:
        return ""
    lead = found["advantage"].split(" [")[0]
    return _shown(lead, found["verdict"] != "no difference shown")


def _shown(text: str, is_shown: bool) -> str:
    return f"**{text}**" if is_shown else text


def with_table(page: str, results: Path) -> str:
    """README with the table anew."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + table(results) + END + rest.split(END, 1)[1]


if __name__ == "__main__":
    readme = ROOT / "README.md"
    page = with_table(readme.read_text(encoding="utf-8"), ROOT / "results")
    readme.write_text(page, encoding="utf-8")
