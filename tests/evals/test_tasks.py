"""Tasks that are answered in words: their checks, on answers that are right and that are not."""

import re

import numpy as np
import pytest

from reptune_jax import lm
from reptune_jax.data import behavior as behaviors
from reptune_jax.evals import arms
from reptune_jax.evals.arms import Condition
from reptune_jax.evals.suites import tasks
from reptune_jax.lm import Model
from reptune_jax.model.decode import MISSING
from tests.support import suites, tiny, tiny_behavior


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("4", "4"), ("It is 4.", "4"), ("2 + 2 = 4", "4"), ("-12", "-12"), ("\u221212", "-12"),
        ("1,004 apples", "1004"), ("3.50", "3.50"), ("4.0", "4"), ("", ""), ("four", ""),
    ],
)  # fmt: skip
def test_an_answer_s_number_is_its_last(text, number):
    assert tasks.last_number(text) == number


def test_arithmetic_is_right_where_python_says_so():
    asked = tasks.read("arithmetic", "")
    assert len({task.question for task in asked}) == len({task.id for task in asked}) == 200
    for task in asked:
        want = eval(re.fullmatch(r"What is (.*)\? Answer .*", task.question)[1])
        assert task.right(f"That is {want}.") and not task.right(f"{want + 1}")
        assert not task.right("") and not task.right(f"{want} or {want + 2}")
    assert len(tasks.read("arithmetic", "", 5)) == 5


@pytest.mark.parametrize("form", suites.FORMS)
def test_the_form_of_an_answer_is_checked(form):
    check = tasks._FORMS[form][1]
    right, *wrong = suites.FORMS[form]
    assert check(right) and not any(map(check, wrong))


def test_instructions_are_every_form_of_every_subject():
    asked = tasks.read("instructions", "")
    assert len({task.question for task in asked}) == len(suites.FORMS) * len(tasks._SUBJECTS) == 120
    fenced = '```json\n{"subject": "sea", "note": "wet"}\n```'
    assert next(task for task in asked if task.id.startswith("instructions-keys")).right(fenced)


def test_gsm8k_is_read_as_its_authors_do(tmp_path):
    (task,) = tasks.read("gsm8k", str(suites.write(tmp_path)))
    assert (task.test, task.id, task.question) == ("gsm8k", "gsm8k-0", "Two and two?")
    assert task.right("So it is 1004.") and not task.right("4")
    (tmp_path / "gsm8k/test.jsonl").write_text('{"question": "Two?", "answer": "two"}\n')
    with pytest.raises(ValueError, match=r"gsm8k/test\.jsonl.*no number behind ####.*Row 0"):
        tasks.read("gsm8k", str(tmp_path))


def test_answers_are_rows_and_what_is_not_finite_is_missing(tmp_path, monkeypatch):
    folder = tiny.make_llama(tmp_path / "model")
    model, shown = lm.load(str(folder), "float32"), []
    asked = tasks.read("arithmetic", "", 3) + tasks.read("instructions", "", 2)
    answers = iter([[9], None, [], [5], [5, 6]])

    def generate_each(self, prompts, new, *_, missing):
        assert missing
        shown.extend(prompts)
        found = []
        for _ in prompts:
            answer = next(answers)
            right = model.tokenizer.encode(" 7 ", add_special_tokens=False)
            found.append([MISSING] if answer is None else right if answer == [9] else answer or [5])
        return found

    monkeypatch.setattr(Model, "generate_each", generate_each)
    asked[0] = asked[0]._replace(right=lambda text: text == "7")
    persona = behaviors.load(tiny_behavior.write(tmp_path)).select(format="persona")[0]
    cond = arms.prompted(model, persona, 1)
    rows = tasks.rows(cond, {"behavior": "b", **cond.labels}, asked, 4)
    acc = {row.item_id: row.value for row in rows if row.metric == "acc"}
    assert [*acc] == [task.id for task in asked] and len(rows) == 2 * len(asked)
    assert acc[asked[0].id] == 1.0 and np.isnan(acc[asked[1].id]) and acc[asked[2].id] == 0.0
    turn = [{"role": "user", "content": asked[0].question}]
    assert shown[0] == model.encode_prompt(cond.under_persona(turn))
    assert shown[0] != Condition(model, "base").model.encode_prompt(turn)
    assert {row.value for row in rows if row.metric == "chance"} == {0.0}
