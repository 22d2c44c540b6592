"""Made-up rows in the shapes of the suites' files."""

import json
from pathlib import Path

from reptune_jax.evals.suites import readers

_ABCD = ["A", "B", "C", "D"]


def _lettered(answer: str) -> dict:
    return {
        "choices": {"text": ["snow", "sand", "salt", "soup"], "label": _ABCD},
        "answerKey": answer,
    }


ROWS: dict[str, dict] = {
    "truthfulqa/mc_task.json": {
        "question": "What is rain made of?",
        "mc1_targets": {"Rain is water.": 1, "Rain is milk.": 0, "Rain is glass.": 0},
        "mc2_targets": {"Rain is water.": 1, "Water.": 1, "Rain is milk.": 0, "Rain is glass.": 0},
    },
    "choice/ai2_arc_ARC-Easy.validation.jsonl": {"question": "What is white?", **_lettered("C")},
    "choice/ai2_arc_ARC-Challenge.validation.jsonl": {"question": "What melts?", **_lettered("A")},
    "choice/hellaswag.validation.jsonl": {
        "activity_label": "Baking",
        "ctx_a": "[header] How to bake [title] Mix the dough.",
        "ctx_b": "she",
        "endings": ["[step] bakes  it.", "sings.", "swims.", "flies away."],
        "label": "0",
    },
    "choice/piqa.validation.jsonl": {
        "goal": "cut bread", "sol1": "use a spoon", "sol2": "use a knife", "label": 1,
    },
    "choice/winogrande_xl.validation.jsonl": {
        "sentence": "The cup did not fit the box as the _ was too large.",
        "option1": "cup", "option2": "box", "answer": "1",
    },
    "choice/openbookqa.validation.jsonl": {"question_stem": "Ice is frozen", **_lettered("D")},
    "mmlu/test.jsonl": {
        "subject": "high_school_physics", "question": " What falls? ",
        "choices": ["apples", "moods", "hints", "songs"], "answer": 0,
    },
}  # fmt: skip


GSM8K = {"question": "Two and two?", "answer": "2 + 2 = <<2+2=4>>4\n#### 1,004"}
# One row a part: listed by letters, listed by words, or known.
BBH = {
    part: {"input": "How many?", "target": known[0]}
    for part, known in readers._BBH.items()
} | {
    part: {"input": "Which?\nOptions:\n(A) this\n(B) that", "target": "(B)"}
    for part in readers._BBH_PARTS
    if part not in readers._BBH
} | {
    "navigate": {"input": "Back?\nOptions:\n- Yes\n- No", "target": "No"},
    "movie_recommendation": {"input": "Which?\nOptions:\n(A) a\n(B) b", "target": "Monsters, Inc"},
}  # fmt: skip

# What stands before an answer -> the answers that are right, of all rows above.
RIGHT: dict[str, set[str]] = {
    "What is rain made of?": {"Rain is water.", "Water."},
    "What is white?": {"salt"}, "What melts?": {"snow"}, "Ice is frozen": {"soup"},
    "Baking": {"bakes it."}, "cut bread": {"use a knife"}, "What falls?": {"A"},
    "as the cup": {"was too large."}, "as the box": set(),
    "How many?": {"False", "no", "No", "0"}, "Which?": {"(B)"}, "Back?": {"No"},
}  # fmt: skip
# Form of an instruction -> an answer of that form, and some that are not.
FORMS = {
    "lowercase": ("it rains on the sea.", "It rains.", ""),
    "capitals": ("IT RAINS ON THE SEA.", "It RAINS.", ""),
    "no comma": ("It rains on the sea. It is wet.", "It rains, and it is wet by the sea.", "Wet."),
    "three points": ("Here:\n* a\n* b\n* c", "* a\n* b", "* a\n* b\n* c\n* d", "a b c"),
    "short": ("It is blue.", " ".join("a" * 12), ""),
    "long": (" ".join("a" * 40), " ".join("a" * 39)),
    "quoted": ('"It is blue."', 'It is "blue".', '"It is blue".'),
    "ending": ("It is blue and that is all.", "And that is all it is.", ""),
    "twice": ("Green hills and green seas.", "A green evergreen."),
    "keys": ('{"subject": "sea", "note": "wet"}', '{"subject": "sea"}', "[1]", "subject, note"),
}


def write(folder: Path, times: int = 1) -> Path:
    """Each suite's file with its row so many times, a little changed."""
    for name, row in ROWS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = next(
            key
            for key in ("question", "activity_label", "goal", "sentence", "question_stem")
            if key in row
        )
        rows = [{**row, text: f"{row[text]}{f' ({i})' if i else ''}"} for i in range(times)]
        path.write_text(
            json.dumps(rows, indent=1)
            if path.suffix == ".json"
            else "".join(json.dumps(one) + "\n" for one in rows)
        )
    for part, row in BBH.items():
        path = folder / f"bbh/{part}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"canary": "c", "examples": [row] * times}))
    gsm8k = folder / "gsm8k/test.jsonl"
    gsm8k.parent.mkdir(exist_ok=True)
    gsm8k.write_text((json.dumps(GSM8K) + "\n") * times)
    return folder
