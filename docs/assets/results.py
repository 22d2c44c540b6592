"""Writes README's table of the studies in results/ from their summary.json.

Run as `python docs/assets/results.py`.
"""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- from results/ by docs/assets/results.py -->\n", "<!-- end -->"
RIVALS = ("prompt", "steer", "token", "random", "weights")


def table(results: Path) -> str:
    """A line for each kept study and sign: what dual did, and who was ahead of whom."""
    head = ["study", "dual against the untuned model", "KL", *(f"vs {rival}" for rival in RIVALS)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for path in sorted(results.glob("*/summary.json")):
        kept = json.loads(path.read_text(encoding="utf-8"))
        for dual in kept["dual"]:
            side = {1: "+", -1: "−"}[dual["sign"]]
            name = f"[{path.parent.name}](results/{path.parent.name}/README.md) {side}"
            name += f": {kept['primary']}, {kept['items']} items, seeds: {kept['seeds']}"
            against = [_short(dual["against"].get(rival)) for rival in RIVALS]
            cells = [name, f"{dual['delta']}: {dual['outcome']}", dual["kl"], *against]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _short(found: dict[str, str] | None) -> str:
    """The verdict as a word, with the difference in the arm's direction."""
    if found is None:
        return ""
    word = found["verdict"].removeprefix("dual ").replace("no difference shown", "not shown")
    return f"{word} ({found['advantage'].split(' [')[0]})"


def with_table(page: str, results: Path) -> str:
    """README with the table anew."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + table(results) + END + rest.split(END, 1)[1]


if __name__ == "__main__":
    readme = ROOT / "README.md"
    page = with_table(readme.read_text(encoding="utf-8"), ROOT / "results")
    readme.write_text(page, encoding="utf-8")
