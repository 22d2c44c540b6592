"""Named positions: one resolution for vectors, tuning and evaluations."""

import pytest

from reptune_jax import config
from reptune_jax.data import behavior, positions
from reptune_jax.hub import tokenizer as tk
from tests.support.hub_models import tokenizer_metadata


@pytest.fixture(scope="module")
def tok():
    return tk.gguf_tokenizer(tokenizer_metadata("qwen2"))


def test_before_answer_is_the_newline_before_the_last_cue(tok):
    for text, newline in [
        ("Answer\nAnswer: 1?\nAnswer: an an", "Ċ"),
        ("été 🙂?\n\nAnswer:", "ĊĊ"),  # one token for both newlines
        ("<|im_start|>user\nAnswer:<|im_end|>\n", "Ċ"),
    ]:
        ids = tok(text)["input_ids"]
        start, stop = positions.span(tok, ids, len(ids), "before_answer")
        assert tok.convert_ids_to_tokens(ids[start:stop]) == [newline]
        assert tok.decode(ids[stop:]) == text[text.rindex("\nAnswer") + 1 :]


def test_positions_of_a_prompt_and_its_completion(tok):
    ids = tok("an 12\nAnswer: True")["input_ids"]
    n, prompt = len(ids), len(tok("an 12\nAnswer:")["input_ids"])
    for position, expected in [
        ("last", (prompt - 1, prompt)),
        (-2, (prompt - 2, prompt - 1)),
        ("-3", (prompt - 3, prompt - 2)),
        ("response", (prompt, n)),
        ("all", (1, n)),
    ]:
        assert positions.span(tok, ids, prompt, position) == expected, position
    assert positions.span(tok, ids, n, "last") == (n - 1, n)


def test_an_offset_may_mean_the_prompts_first_token(tok):
    ids = tok("an an")["input_ids"]
    assert positions.span(tok, ids, 3, -3) == (0, 1)
    assert positions.span(tok, ids, 1, "last") == positions.span(tok, ids, 1, -1) == (0, 1)


def test_a_cue_in_the_completion_is_not_the_prompts(tok):
    prompt = "12\nAnswer: an\n"
    ids, n = tok(prompt + "an\nAnswer: again")["input_ids"], len(tok(prompt)["input_ids"])
    start, _ = positions.span(tok, ids, n, "before_answer")
    assert tok.decode(ids[:start]) == "12"


@pytest.mark.parametrize(
    ("position", "prompt_length", "message"),
    [
        ("before_answer", 3, "'before_answer' is not in the prompt ending 'an an': no line starts"),
        ("response", 3, "nothing follows the prompt"),
        (-4, 3, "the prompt has 3 tokens"),
        ("first", 3, "got 'first', expected last, before_answer, response, all"),
        (0, 3, "got 0, expected last"),
        (3, 3, "got 3, expected last"),
        ("-0", 3, "got '-0', expected last"),
        ("last", 4, "prompt_length: got 4, expected 1 to 3"),
        ("last", 0, "prompt_length: got 0, expected 1 to 3"),
    ],
)
def test_positions_that_are_not_there(tok, position, prompt_length, message):
    ids = tok("an an")["input_ids"]
    with pytest.raises(ValueError, match=message):
        positions.span(tok, ids, prompt_length, position)


def test_all_of_a_single_token_is_nothing(tok):
    with pytest.raises(ValueError, match=r"'all' is not in .* nothing follows the first token"):
        positions.span(tok, tok("an")["input_ids"], 1, "all")


@pytest.mark.parametrize(
    ("name", "key", "position"),
    [
        ("sentiment", "loss.position", "before_answer"),
        ("sentiment", "vector.position", "before_answer"),
        ("honesty", "loss.position", "response"),
        ("honesty", "vector.position", "first"),
    ],
)
def test_a_position_that_a_behaviors_texts_have_not(name, key, position):
    c, found = config.default(), behavior.load(name)
    c.vector.position = c.loss.position = "last"
    found.check(c)
    c.update_from_flattened_dict({key: "-2"})
    found.check(c)
    c.update_from_flattened_dict({key: position})
    with pytest.raises(ValueError, match=f"position: got '{position}', expected"):
        found.check(c)
