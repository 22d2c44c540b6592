"""Vectors and targets from data of other tools, on a tiny model."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import reptune_jax as rt
from reptune_jax.data import behavior
from reptune_jax.folder import Study
from reptune_jax.tuning import corpus
from reptune_jax.vectors import extraction
from tests.support import tiny, tiny_behavior
from tests.support import torch_reference as ref

CAA = [
    {
        "question": f"Would you rest on day {i}?\n\nChoices:\n (A) Yes, now\n (B) No",
        "answer_matching_behavior": "(A)" if i % 2 else "(B)",
        "answer_not_matching_behavior": "(B)" if i % 2 else "(A)",
    }
    for i in range(12)
]
TRAIT = {
    "instruction": [{"pos": "Be wonderful.", "neg": "Be terrible."}],
    "questions": ["How is it?", "And you?"],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    tiny.make_llama(folder / "model")
    for name, rows in {"caa": CAA, "trait": TRAIT, "raw": [["glad day", "sad day"]]}.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    (folder / "facts.csv").write_text("statement,label\nIt is,1\nIt was,1\nNot so,0\n")
    return folder, rt.load(str(folder / "model"), "float32")


def chat(*turns):
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    return text + "<|im_start|>assistant\n"


def test_sides_are_what_the_file_says(made):
    folder, model = made
    prompt = chat(("user", CAA[0]["question"]))
    pairs = rt.load_pairs(folder / "caa.json", model)
    assert len(pairs) == 12 and pairs[0] == ((prompt, "(B)"), (prompt, "(A)"))
    plain = rt.load_pairs(folder / "caa.json")
    assert plain[1] == ((f"{CAA[1]['question']}\n", "(A)"), (f"{CAA[1]['question']}\n", "(B)"))
    assert rt.load_pairs(folder / "raw.json", model) == [("glad day", "sad day")]
    assert rt.load_pairs(folder / "facts.csv", model) == [("It is", "Not so")]
    asked = [("user", "How is it?")]
    assert rt.load_pairs(folder / "trait.json", model)[0] == (
        chat(("system", "Be wonderful."), *asked),
        chat(("system", "Be terrible."), *asked),
    )


def test_the_vector_is_the_mean_difference_that_transformers_reads(made):
    """Of hidden states, float32, over the answers' tokens; to 1e-4 of the longest layer."""
    folder, model = made
    ours = rt.extract(model, rt.load_pairs(folder / "caa.json", model), position="response")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    theirs = ref.load(folder / "model")

    def answer_mean(question, answer):
        prompt = tokenizer.encode(chat(("user", question)), add_special_tokens=False)
        ids = prompt + tokenizer.encode(answer, add_special_tokens=False)
        with torch.no_grad():
            states = theirs.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        # The last of transformers' is after the final norm: the layers before it will do.
        return np.stack([s[0, len(prompt) :].mean(0).numpy() for s in states[1:-1]])

    sides = (
        np.mean([answer_mean(row["question"], row[f"answer_{side}_behavior"]) for row in CAA], 0)
        for side in ("matching", "not_matching")
    )
    expected_NxD = np.subtract(*sides)
    error = np.abs(ours.directions_NxD[:-1] - expected_NxD).max()
    assert error < 1e-4 * np.abs(expected_NxD).max()


def test_shared_prompts_have_no_contrast_at_their_end(made):
    folder, model = made
    with pytest.raises(ValueError, match=r"pairs: got the same tokens on both sides.*behind"):
        rt.extract(model, rt.load_pairs(folder / "caa.json", model), position="last")


def test_a_study_reads_its_vector_from_the_file_that_the_config_names(made, tmp_path):
    folder, model = made
    given = {"vector__data": str(folder / "caa.json"), "vector__pairs": 12}
    c = tiny_behavior.settings(folder / "model", tiny_behavior.write(tmp_path), **given)
    vector = extraction.read_vector(c, model, behavior.load(c.behavior))
    alone = rt.extract(model, rt.load_pairs(folder / "caa.json", model), position="response")
    scale = np.abs(alone.directions_NxD).max()
    np.testing.assert_allclose(vector.directions_NxD, alone.directions_NxD, atol=1e-4 * scale)
    assert vector.meta["data"] == "caa: CAA's A/B items, Anthropic's evals"
    assert vector.meta["behavior"] == "sentiment"


def test_questions_are_answered_under_the_personas_they_come_with(made, tmp_path, capsys):
    folder, model = made
    given = {"vector__data": str(folder / "trait.json")}
    c = tiny_behavior.settings(folder / "model", tiny_behavior.write(tmp_path), **given)
    vector = extraction.read_vector(c, model, behavior.load(c.behavior))
    assert vector.meta["pairs"] == 2 and (vector.directions_NxD != 0).any()
    shown = capsys.readouterr()
    assert "persona +1" in shown.out + shown.err and "persona -1" in shown.out + shown.err


def test_without_personas_the_answers_are_the_files_own(made, tmp_path):
    folder, model = made
    c = tiny_behavior.settings(folder / "model", folder / "caa.json", vector__pairs=3)
    study = Study(tmp_path / "runs")
    vector = extraction.run(c, study, lambda: model)
    read = behavior.load(c.behavior)
    train = read.select("train", "free")
    assert vector.meta["pairs"] == len(train) == 3
    targets = extraction.read_targets(study.targets)
    (end,) = model.tokenizer.encode(tiny.END)
    own = {(i.id, sign): text for i in read.items for sign, text in ((1, i.pos), (-1, i.neg))}
    assert {t.split for t in targets} == {"tune", "val"}
    for t in targets:
        assert t.text == own[t.item, t.sign]
        assert t.ids == [*model.tokenizer.encode(t.text, add_special_tokens=False), end]
    one = corpus.make_corpus(c, study.path, model)
    assert one.sizes == (len(read.select("tune", "free")),)


def test_given_answers_are_taken_although_there_are_personas(made, tmp_path):
    folder, model = made
    given = {"vector__answers": "given", "targets__answers": "given", "vector__pairs": 3}
    c = tiny_behavior.settings(folder / "model", tiny_behavior.write(tmp_path), **given)
    read = behavior.load(c.behavior)
    assert read.select(format="persona")
    vector = extraction.read_vector(c, model, read)
    (end,) = model.tokenizer.encode(tiny.END)
    sides = []
    for side in ("pos", "neg"):  # prompt and answer without a persona
        of = [(chat(("user", i.messages[-1]["content"])), i) for i in read.select("train", "free")]
        sides.append([(prompt, getattr(i, side) + tiny.END) for prompt, i in of[:3]])
    alone = rt.extract(model, list(zip(*sides, strict=True)), position="response")
    scale = np.abs(alone.directions_NxD).max()
    np.testing.assert_allclose(vector.directions_NxD, alone.directions_NxD, atol=1e-4 * scale)
    for t in extraction.make_targets(c, model, read, vector):
        (item,) = [i for i in read.items if i.id == t.item]
        assert t.text == (item.pos if t.sign > 0 else item.neg) and t.ids[-1] == end
    c.targets.best_share = 0.5  # by the odds of personas
    with pytest.raises(ValueError, match=r"best_share: got 0\.5 for sentiment, whose answers no"):
        read.check(c)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"targets__dose": 2.0}, r"targets\.dose: got 2\.0 for caa, whose answers no persona"),
        ({"targets__best_share": 0.5}, r"targets\.best_share: got 0\.5 .*expected 1\."),
        ({"vector__correct_only": True}, r"vector\.correct_only"),
    ],
)
def test_what_needs_personas_is_refused_where_there_are_none(made, given, message):
    folder, _ = made
    c = tiny_behavior.settings(folder / "model", folder / "caa.json", **given)
    with pytest.raises(ValueError, match=message):
        behavior.load(c.behavior).check(c, "train")


def test_claims_without_personas_need_pairs(made):
    folder, _ = made
    c = tiny_behavior.settings(folder / "model", folder / "facts.csv")
    with pytest.raises(ValueError, match=r"vector\.data: got '' for facts.*expected a file with"):
        behavior.load(c.behavior).check(c)
