"""Generation and scoring, held against full forwards, torch, and transformers' own generate."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import reptune_jax as rt
from reptune_jax.model.cache import init_cache
from reptune_jax.model.intervene import steer_all
from reptune_jax.model.padding import pad
from tests.support import tiny
from tests.support import torch_reference as ref

TOLERANCE = 1e-4  # of the largest logit; log-probabilities in nats
PROMPTS = [
    "Tell me.",
    "What do you think of the weather in the mountains, and how should a good day there end?",
    "Is the claim true or false? The answer is:",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_llama(tmp_path_factory.mktemp("llama"), rope_parameters=tiny.LLAMA3_ROPE)


@pytest.fixture(scope="module")
def ours(folder):
    return rt.load(str(folder))


@pytest.fixture(scope="module")
def theirs(folder):
    return ref.load(folder)


def torch_logp(model, ids):
    """log p of every next token after each prefix of `ids`, [T, V]."""
    ids = torch.tensor([ids])
    with torch.no_grad():
        return ref.logits(model, ids, torch.ones_like(ids))[0].log_softmax(-1).numpy()


def make_vector(layers=(1, 2), scale=2.0):
    noise = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    noise *= np.isin(np.arange(4), layers)[:, None] * scale
    return rt.SteeringVector(noise, np.ones(4, np.float32), 0 * noise, tuple(layers), {})


# ---------------------------------------------------------------- the cache


def test_cached_decoding_gives_the_logits_of_the_full_forward(ours):
    ids = np.random.default_rng(0).integers(4, tiny.VOCAB, (3, 24)).astype(np.int32)
    mask = np.array([np.arange(24) >= start for start in (0, 5, 11)]).astype(np.int32)  # left
    want = np.asarray(ours.forward(ids, mask).logits_BxTxV)

    @partial(jax.jit, static_argnames="T")
    def step(tokens, cache, slot, T):
        hidden, cache = ours.decoder.apply(
            {"params": ours.params}, tokens, jnp.asarray(mask), cache=cache, slot=slot
        )
        return ours.decoder.apply({"params": ours.params}, hidden, method="logits"), cache

    logits, cache = step(
        ids[:, :16], init_cache(ours.arch, ours.decoder.segments, 3, 24, jnp.float32), 0, T=16
    )
    steps = [logits]
    for t in range(16, 24):
        logits, cache = step(ids[:, t : t + 1], cache, t, T=1)
        steps.append(logits)
    got, real = np.concatenate(steps, axis=1), mask.astype(bool)
    assert np.abs(got - want)[real].max() < 1e-5 * np.abs(want).max()
    assert {name: c.shape for name, c in cache["blocks"].items()} == dict.fromkeys(
        "kv", (4, 3, 2, 24, 16)
    )


def test_a_prompt_alone_and_in_a_batch_give_the_same_text(ours):
    together = ours.generate(PROMPTS, max_new_tokens=12)
    assert len(set(together)) == len(PROMPTS)
    assert together == ours.generate(PROMPTS, max_new_tokens=12, batch_size=1)


# ---------------------------------------------------------------- generation


@pytest.mark.parametrize(
    ("variant", "chat"), [("llama_llama3", True), ("llama_biases", False), ("qwen2_tied", True)]
)
def test_greedy_text_is_that_of_transformers(variant, chat, tmp_path):
    maker, overrides = tiny.VARIANTS[variant]
    folder = maker(tmp_path, bos=True, **overrides)
    torch_one = ref.load(folder)
    want = ref.greedy(torch_one, AutoTokenizer.from_pretrained(folder), PROMPTS, 24, chat)
    got = rt.load(str(folder)).generate(PROMPTS, max_new_tokens=24, chat=chat)
    assert got == want
    assert len(set(got)) == len(PROMPTS) and all(got)


def test_a_stop_token_ends_its_row_only(ours, theirs):
    ids = [ours.encode_prompt(p) for p in PROMPTS]
    tokens, mask = pad(ids, ours.pad_id, left=True)
    free = ours.generate_ids(tokens, mask, 12)
    stop = int(free[0, 4])
    assert stop not in free[0, :4]
    stopping = dataclasses.replace(ours, stop_ids=(tiny.END_ID, stop))
    new = stopping.generate_ids(tokens, mask, 12)
    for row, free_row in zip(new, free, strict=True):
        ends = [*np.flatnonzero(np.isin(free_row, stopping.stop_ids)), 11]
        np.testing.assert_array_equal(row[: ends[0] + 1], free_row[: ends[0] + 1])
        assert set(row[ends[0] :]) == {free_row[ends[0]]}
    assert stopping.cut(new[0]) == free[0, :5].tolist()
    assert stopping.generate_each(ids, 12)[0] == free[0, :5].tolist()
    with torch.no_grad():
        all_ids = theirs.generate(
            torch.tensor(tokens).long(),
            attention_mask=torch.tensor(mask).long(),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=list(stopping.stop_ids),
            pad_token_id=tiny.PAD_ID,
        )[:, tokens.shape[1] :]
    for row, their_row in zip(new, all_ids.tolist(), strict=True):
        cut = stopping.cut(row)
        assert their_row[: len(cut)] == cut
        assert set(their_row[len(cut) :]) <= {tiny.PAD_ID}


def test_generation_ends_when_every_row_has_stopped(ours):
    ids = ours.encode_prompt(PROMPTS[0])
    tokens, mask = pad([ids, ids], ours.pad_id, left=True)
    free = ours.generate_ids(tokens, mask, 12)
    stopping = dataclasses.replace(ours, stop_ids=(int(free[0, 2]),))
    new = stopping.generate_ids(tokens, mask, 12)
    first = free[0].tolist().index(free[0, 2])
    assert (new[:, first:] == free[0, 2]).all()


def test_a_model_without_a_stop_token_generates_to_the_end(ours):
    """No token id may be taken for a stop token by default, 0 least of all."""
    ids = ours.encode_prompt(PROMPTS[0])
    endless = dataclasses.replace(ours, stop_ids=())
    assert endless.pad_id == tiny.PAD_ID
    assert len(endless.generate_each([ids], 12)[0]) == 12


def test_sampling_is_reproducible_by_seed_and_follows_the_temperature(ours):
    say = partial(ours.generate, PROMPTS, max_new_tokens=12)
    assert say(temperature=1.0, seed=3) == say(temperature=1.0, seed=3)
    assert say(temperature=1.0, seed=3) != say(temperature=1.0, seed=4)
    assert say(temperature=1e-4) == say(temperature=0.0)


def test_samples_have_the_models_distribution(ours, theirs):
    ids = ours.encode_prompt(PROMPTS[0])
    tokens, mask = pad([ids], ours.pad_id, left=True, rows=2048)
    logp_V = torch_logp(theirs, ids)[-1]
    for temperature in (0.5, 1.5):
        logq_V = torch.tensor(logp_V / temperature).log_softmax(-1).numpy()
        q_V = np.exp(logq_V)
        drawn = ours.generate_ids(tokens, mask, 1, temperature)[:, 0]
        entropy, spread = -(q_V * logq_V).sum(), np.sqrt((q_V * logq_V**2).sum())
        assert -logq_V[drawn].mean() == pytest.approx(entropy, abs=4 * spread / np.sqrt(2048))


def test_steered_generation_is_that_of_torch_hooks(ours, theirs, folder):
    vector = make_vector()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for dose in (1.0, -1.0):
        vectors = {l: torch.tensor(dose * vector.directions_NxD[l]) for l in vector.layers}
        want = ref.greedy(theirs, tokenizer, PROMPTS, 12, vectors=vectors)
        got = ours.generate(PROMPTS, max_new_tokens=12, steer=dose * vector)
        assert got == want
        assert got != ours.generate(PROMPTS, max_new_tokens=12)


def test_the_last_token_column_of_a_steer_is_for_the_generated_tokens(ours):
    ids = [ours.encode_prompt(p) for p in PROMPTS]
    tokens, mask = pad(ids, ours.pad_id, left=True)
    B, T = tokens.shape
    steer = steer_all(jnp.asarray(make_vector().directions_NxD), jnp.ones(4), B, T + 1)
    only_new = steer.replace(token_BxT=steer.token_BxT.at[:, :T].set(0))
    plain = ours.generate_ids(tokens, mask, 12)
    new = ours.generate_ids(tokens, mask, 12, steer=only_new)
    np.testing.assert_array_equal(new[:, 0], plain[:, 0])  # read off the unsteered prompt
    assert (new != plain).any()
    # the same edit as a full forward over prompt and answer
    both = np.concatenate([tokens, new], axis=1)
    real = np.concatenate([mask, np.ones_like(new)], axis=1)
    at = jnp.asarray(np.arange(T + 12) >= T, jnp.float32)
    logits = ours.forward(both, real, steer=steer.replace(token_BxT=jnp.tile(at, (B, 1))))
    want = np.asarray(logits.logits_BxTxV)[:, T - 1 : -1].argmax(-1)
    for row, wanted in zip(new, want, strict=True):
        n = len(ours.cut(row))
        np.testing.assert_array_equal(row[:n], wanted[:n])


def test_a_steer_bound_to_a_batch_is_refused_where_rows_are_reordered(ours):
    steer = steer_all(jnp.ones((4, 64)), jnp.ones(4), 3, 32)
    ids = [ours.encode_prompt(p) for p in PROMPTS]
    for call in (
        lambda: ours.generate(PROMPTS, steer=steer),
        lambda: ours.loglikelihood([("a", "b")], steer=steer),
        lambda: ours.next_logp(ids, np.zeros((3, 1), int), steer=steer),
    ):
        with pytest.raises(ValueError, match=r"steer: got a Steer.*expected a SteeringVector"):
            call()


# ---------------------------------------------------------------- log-probabilities

PAIRS = [
    ("Is the following claim true or false?", " The answer is: yes"),
    ("Tell me what you think", " of the weather"),
    ("You are", " an assistant. You are an assistant."),
    ("", "question answer"),
    ("a", " b"),
]


def boundary(tokenizer, context, continuation):
    """Joint ids, and the first token whose text goes past the context, found by decoding."""
    ids = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
    for i in range(len(ids)):
        if len(tokenizer.decode(ids[: i + 1])) > len(context):
            return ids, i
    raise AssertionError


@pytest.mark.parametrize("bos", [False, True])
def test_loglikelihood_is_that_of_torch(bos, tmp_path):
    folder = tiny.make_qwen2(tmp_path, bos=bos)
    ours = rt.load(str(folder))
    torch_one = ref.load(folder)
    got = ours.loglikelihood(PAIRS)
    for (context, continuation), (logp, _) in zip(PAIRS, got, strict=True):
        ids, start = boundary(ours.tokenizer, context, continuation)
        if bos or start == 0:
            ids, start = [tiny.BOS_ID if bos else tiny.END_ID, *ids], start + 1
        logp_TxV = torch_logp(torch_one, ids)
        want = sum(logp_TxV[t - 1, ids[t]] for t in range(start, len(ids)))
        assert logp == pytest.approx(want, abs=TOLERANCE * len(ids))


def test_is_greedy_says_whether_every_token_is_the_argmax(ours):
    prompt = ours.encode_prompt(PROMPTS[1])
    answer = ours.generate_each([prompt] * 3, 12)[0]
    assert len(answer) > 5
    wrong_last, wrong_first = answer.copy(), answer.copy()
    wrong_last[-1] = wrong_first[0] = tiny.VOCAB - 1
    ids = [prompt + a for a in (answer, wrong_last, wrong_first, answer[:1])]
    scores = ours.score_ids(ids, [len(prompt)] * 4)
    assert [greedy for _, greedy in scores] == [True, False, False, True]


def test_scores_do_not_depend_on_the_batch(ours):
    want = ours.loglikelihood(PAIRS)
    for order, size in ((PAIRS[::-1], 5), (PAIRS, 1)):
        got = ours.loglikelihood(order, batch_size=size)
        got = got[::-1] if order is not PAIRS else got
        np.testing.assert_allclose([v for v, _ in got], [v for v, _ in want], atol=TOLERANCE)
    assert ours.loglikelihood([]) == []


def test_long_continuations_are_scored_whole(ours, theirs):
    """Longer than one bucket of 32, beside a short one."""
    ids = np.random.default_rng(1).integers(4, tiny.VOCAB, 80).tolist()
    got = ours.score_ids([ids, ids[:6]], [3, 2], batch_size=2)
    logp_TxV = torch_logp(theirs, ids)
    for (value, _), start, stop in zip(got, (3, 2), (80, 6), strict=True):
        want = sum(logp_TxV[t - 1, ids[t]] for t in range(start, stop))
        assert value == pytest.approx(want, abs=TOLERANCE * stop)


def test_next_logp_is_that_of_torch_steered_or_not(ours, theirs):
    ids = [ours.encode_prompt(p) for p in PROMPTS]
    candidates = np.array([[5, 9], [300, 17], [60, 61]])
    vector = make_vector()
    vectors = {l: torch.tensor(vector.directions_NxD[l]) for l in vector.layers}
    for steer, hooks in ((None, {}), (vector, vectors)):
        got = ours.next_logp(ids, candidates, steer=steer, batch_size=2)
        for row, wanted, prompt in zip(got, candidates, ids, strict=True):
            one = torch.tensor([prompt])
            logits = ref.steered_logits(theirs, one, torch.ones_like(one), hooks)
            want = logits[0, -1].log_softmax(-1)[torch.tensor(wanted)]
            np.testing.assert_allclose(row, want, atol=TOLERANCE)


def test_what_cannot_be_scored_or_continued_is_refused(ours):
    with pytest.raises(ValueError, match="continuation: got '', which has no token of its own"):
        ours.loglikelihood([("a", "")])
    with pytest.raises(ValueError, match="prompt 1: got no tokens, expected at least one"):
        ours.generate(["Hi", ""], chat=False)


# ---------------------------------------------------------------- a real model


@pytest.mark.slow
def test_smollm2_greedy_text_is_that_of_transformers():
    if tiny.smollm2_path() is None:
        pytest.skip("no SmolLM2-135M-Instruct GGUF here")
    ours, torch_one = tiny.smollm2(), tiny.smollm2_in_torch().eval()
    topics = [
        "rain",
        "cats",
        "chess",
        "Rome",
        "salt",
        "moonlight",
        "bread",
        "maps",
        "owls",
        "tea",
        "jazz",
        "time",
        "ice",
        "gold",
        "bees",
    ]
    prompts = [f"Tell me about {t}." for t in topics] + [
        "Is 17 a prime number?",
        "Write a haiku.",
        "Translate 'good morning' into French.",
        "What is 12 + 30?",
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Why is it dark?"},
        ],
    ]
    want = ref.greedy(torch_one, ours.tokenizer, prompts, max_new_tokens=24)
    got = ours.generate(prompts, max_new_tokens=24, batch_size=20)
    assert len(prompts) >= 20 and got == want
