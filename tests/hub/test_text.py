"""Raw text to ids by one rule, held against what tokenizers and templates write."""

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer

import reptune_jax as rt
from reptune_jax.hub import text as texts
from reptune_jax.hub.templates import chat_text
from reptune_jax.tuning import retention
from tests.support import tiny, tiny_behavior
from tests.support import torch_reference as ref

TURNS = [{"role": "user", "content": "What do you think?"}]
PAIRS = [("I love it. They are", "I hate it. They are"), ("Good day in", "Bad day in")]


def make(folder, bos=True, eos=False, template_bos=True):
    """A tokenizer that puts BOS before, and EOS behind, or neither."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.make_tokenizer(folder, bos=bos))
    if eos:
        single = f"{tiny.BOS} $A {tiny.END}" if bos else f"$A {tiny.END}"
        special = [(tiny.BOS, tiny.BOS_ID), (tiny.END, tiny.END_ID)]
        tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=special
        )
    if not template_bos:
        tokenizer.chat_template = tokenizer.chat_template.removeprefix("{{ bos_token }}")
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_llama(tmp_path_factory.mktemp("bos"), bos=True)


@pytest.fixture(scope="module")
def ours(folder):
    return rt.load(str(folder))


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_what_the_tokenizer_puts_before_and_never_behind(bos, eos, tmp_path):
    tokenizer = make(tmp_path, bos, eos)
    whole = tokenizer("Tell me")["input_ids"]
    assert (whole[0] == tiny.BOS_ID, whole[-1] == tiny.END_ID) == (bos, eos)
    assert texts.encode(tokenizer, "Tell me") == (whole[:-1] if eos else whole)
    assert texts.put_before(tokenizer) == ([tiny.BOS_ID] if bos else [])
    assert texts.encode(tokenizer, "") == texts.put_before(tokenizer)


def test_a_text_that_begins_with_bos_is_not_doubled(tmp_path):
    tokenizer = make(tmp_path)
    want = tokenizer("Tell me")["input_ids"]
    assert (
        texts.encode(tokenizer, tiny.BOS + "Tell me") == want == texts.encode(tokenizer, "Tell me")
    )
    assert want.count(tiny.BOS_ID) == 1 and tokenizer(tiny.BOS + "Tell me")["input_ids"] != want


@pytest.mark.parametrize("template_bos", [False, True])
def test_a_rendered_chat_has_the_templates_ids(template_bos, tmp_path):
    tokenizer = make(tmp_path, template_bos=template_bos)
    want = tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, return_dict=False)
    rendered = chat_text(tokenizer, TURNS)
    assert texts.encode(tokenizer, rendered) == want
    assert (want[0] == tiny.BOS_ID) == template_bos
    if template_bos:  # cut off, as people do who expect the tokenizer to add it
        assert texts.encode(tokenizer, rendered.removeprefix(tiny.BOS)) == want


def test_pairs_are_scored_after_the_same_bos(ours, folder):
    theirs = ref.load(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    given = [("Tell me", " of it"), (tiny.BOS + "Tell me", " of it"), ("", "Tell me of it")]
    got = [logp for logp, _ in ours.loglikelihood(given)]
    ids = tokenizer("Tell me of it")["input_ids"]
    logits = ref.logits(theirs, torch.tensor([ids]), torch.ones((1, len(ids)), dtype=torch.long))
    logp_TxV = logits[0].detach().log_softmax(-1).numpy()
    picked = [logp_TxV[t - 1, ids[t]] for t in range(1, len(ids))]
    n = len(tokenizer("Tell me")["input_ids"])
    want = [sum(picked[n - 1 :])] * 2 + [sum(picked)]
    np.testing.assert_allclose(got, want, atol=1e-3)
    assert texts.encode_pair(tokenizer, "", tiny.BOS + "Tell me", 2)[1] == 1


def test_vectors_are_read_after_the_same_bos(ours):
    vector = rt.extract(ours, PAIRS, position="last")
    means = []
    for side in (0, 1):
        ids = [ours.tokenizer(pair[side])["input_ids"] for pair in PAIRS]
        assert all(row[0] == tiny.BOS_ID for row in ids)
        rows = [ours.forward([row], capture=True).residual_NxBxTxD[:, 0, -1] for row in ids]
        means.append(np.mean(np.asarray(rows, np.float64), axis=0))
    np.testing.assert_allclose(vector.directions_NxD, means[0] - means[1], atol=1e-4)
    marked = rt.extract(ours, [(tiny.BOS + a, tiny.BOS + b) for a, b in PAIRS])
    assert marked.digest == vector.digest


def test_generating_from_raw_text_is_transformers_own(ours, folder):
    theirs = ref.load(folder)
    ids = AutoTokenizer.from_pretrained(folder)("Tell me", return_tensors="pt")
    with torch.no_grad():
        all_ids = theirs.generate(
            **ids, max_new_tokens=5, do_sample=False, pad_token_id=tiny.PAD_ID
        )
    new = all_ids[0, ids["input_ids"].shape[1] :].tolist()
    for text in ("Tell me", tiny.BOS + "Tell me"):
        assert ours.generate_each([ours.encode_prompt(text, chat=False)], 5)[0] == new


def test_a_rendered_chat_that_is_rendered_again_is_said(ours, capsys):
    rendered = chat_text(ours.tokenizer, TURNS)
    for text in (rendered, rendered.removeprefix(tiny.BOS), tiny.BOS + "Tell me"):
        ours.generate([text, "Tell me"], max_new_tokens=1)
        assert "1 of 2 look like rendered chats" in capsys.readouterr().out
    ours.generate([rendered], max_new_tokens=1, chat=False)
    ours.generate([TURNS, "Tell me"], max_new_tokens=1)
    assert capsys.readouterr().out == ""
    assert ours.encode_prompt(rendered, chat=False) == ours.encode_prompt(TURNS)


def test_neutral_text_and_its_pieces_begin_as_text_does(ours, monkeypatch):
    tiny_behavior.patch_neutral(monkeypatch)
    found = [p for p in retention.pieces(ours, "train", 16, 2) if not p.own]
    assert len(found) > 4
    for piece in found:
        assert piece.ids[0] == tiny.BOS_ID and tiny.BOS_ID not in piece.ids[1:]
        assert len(piece.ids) <= 16
    first = tiny_behavior.neutral("prose", "train")[0]["text"]
    assert found[0].ids == ours.tokenizer(first)["input_ids"][:16]
    said = [t for p in found for t in p.ids[1:]]
    whole = [
        ours.tokenizer(d["text"], add_special_tokens=False)["input_ids"]
        for d in tiny_behavior.neutral("prose", "train")
    ]
    assert said[: 2 * 15] == whole[0][: 2 * 15]  # nothing is lost between two pieces


def test_half_a_character_is_refused_by_name_wherever_text_is_taken(ours):
    half = "so \ud800 far"
    for take in (
        lambda: ours.generate([half], 1),
        lambda: ours.generate([half], 1, chat=False),
        lambda: ours.generate([[{"role": "user", "content": half}]], 1),
        lambda: ours.loglikelihood([("well", half)]),
        lambda: rt.extract(ours, [(half, "bad")]),
        lambda: rt.extract(ours, [(("Well?", half), ("Well?", "bad"))]),
    ):
        with pytest.raises(ValueError, match=r"half a surrogate pair in .*so \\ud800 far"):
            take()
