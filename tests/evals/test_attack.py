"""Attacks on models whose change is known: a planted vector is found, an absent one is not."""

import base64
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from flax import traverse_util

from reptune_jax import lm
from reptune_jax.data.contrast import Contrast
from reptune_jax.evals import attack, claims, scoring
from reptune_jax.evals.arms import Condition
from reptune_jax.evals.attacks import (
    counter,
    edits,
    paraphrase,
    prompting,
    recovery,
    verdicts,
    weights,
)
from reptune_jax.evals.attacks.target import Lab, Target
from reptune_jax.evals.attacks.verdicts import Attacks
from reptune_jax.evals.bench import Bench
from reptune_jax.evals.capability import Planned
from reptune_jax.evals.results import sha
from reptune_jax.hub.names import table
from reptune_jax.vectors.bake import bake
from tests.support import steering_case, tiny, tiny_behavior

LAYERS = (1, 2)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A bench of a tiny model with a vector of unit directions, by log-odds of four items."""
    folder = tmp_path_factory.mktemp("attack")
    with pytest.MonkeyPatch.context() as patch:
        tiny_behavior.patch_neutral(patch)
        c = tiny_behavior.settings(
            tiny.make_llama(folder / "model", mlp_bias=True),
            tiny_behavior.write(folder),
            study__primary="logodds:free",
            attack__texts=(1, 4),
            attack__doses=(0.25, 0.5, 1.0, 2.0),
            attack__personas=1,
        )
        base = lm.load(c.model, "float32")
        vector = steering_case.make_vector(model_sha=base.sha)
        unit = dataclasses.replace(vector, directions_NxD=weights.unit(vector.directions_NxD))
        yield Lab.of(Bench(c, base, unit, lambda: None))


def edited(base, change):
    """The base with `change(rows [N, R, D])` added to all that writes to the residual stream."""
    leaves = weights.flat(base)
    for path in weights.WRITERS:
        rows = np.asarray(leaves[path], np.float64).reshape(base.arch.N, -1, base.arch.D)
        new = (rows + change(rows)).reshape(leaves[path].shape)
        leaves[path] = jnp.asarray(new, jnp.float32)
    return dataclasses.replace(base, params=traverse_util.unflatten_dict(leaves, sep="/"))


def tuned(lab, seed=0, planted=0.0, noise=0.01):
    """What a run might have changed at `LAYERS`: noise, and a rank-one part along the vector."""
    rng = np.random.default_rng(seed)
    inside_N = np.isin(np.arange(lab.bench.base.arch.N), LAYERS)[:, None, None]
    mean_D = weights.unit(lab.bench.vector.directions_NxD[list(LAYERS)].mean(0, keepdims=True))[0]

    def change(rows):
        along = planted * rng.normal(size=rows.shape[:2])[..., None] * mean_D
        return inside_N * (along + noise * rng.normal(size=rows.shape))

    return edited(lab.bench.base, change), mean_D


def target(lab, model, sign=1):
    return Target(lab, Condition(model, "dual", sign), lab.bench.vector)


def frame(rows):
    return pd.DataFrame(map(dataclasses.asdict, rows))


def test_a_planted_vector_is_found_in_the_weights_and_an_absent_one_is_not(lab):
    same = np.repeat(lab.bench.vector.directions_NxD[:1], lab.bench.base.arch.N, 0)
    vector = dataclasses.replace(lab.bench.vector, directions_NxD=same)
    own = Lab(dataclasses.replace(lab.bench, vector=vector), lab.prose)
    for planted, word in ((0.1, verdicts.BROKEN), (0.0, verdicts.HELD)):
        model, mean_D = tuned(own, planted=planted)
        (found,) = verdicts.found(Attacks.of(frame(recovery.from_weights(target(own, model))), 0.1))
        assert found.in_weights == word
        rows_NxRxD = weights.written(own.bench.base, model)
        # The same from numpy's SVD of all that was changed.
        stacked = rows_NxRxD.reshape(-1, len(mean_D)).astype(np.float64)
        _, sizes, right = np.linalg.svd(stacked, full_matrices=False)
        assert found.blind == pytest.approx(abs(right[0] @ mean_D), abs=1e-5)
        assert found.within == pytest.approx(np.linalg.norm(right[:8] @ mean_D), abs=1e-5)
        assert found.energy == pytest.approx(sizes[0] ** 2 / (sizes**2).sum(), rel=1e-4)
        assert (found.blind > 0.9 and found.layer > 0.9) == bool(planted)
        assert found.chance == pytest.approx(0.44, abs=0.02)


def test_a_constant_in_the_residual_stream_is_found_by_one_text(lab, monkeypatch):
    tiny_behavior.patch_neutral(monkeypatch)
    layer = lab.bench.vector.at([2])
    rows = frame(recovery.from_activations(target(lab, bake(lab.bench.base, 3 * layer))))
    (found,) = verdicts.found(Attacks.of(rows, 0.1))
    assert found.texts[1] == pytest.approx(1, abs=1e-4) and found.first[4] > 0.999
    assert (found.least, found.in_activations) == (1, verdicts.BROKEN)
    early = rows[(rows.metric == "aligned") & (rows.layer < 2)]  # nothing was changed there
    assert early.value.max() < 1e-6
    model, _ = tuned(lab)
    (found,) = verdicts.found(Attacks.of(frame(recovery.from_activations(target(lab, model))), 0.1))
    assert max(found.texts.values()) < 0.44 and found.in_activations == verdicts.HELD


def test_edits_are_those_of_arithmetic(lab):
    base = lab.bench.base
    model, _ = tuned(lab, planted=0.1)
    u_NxD = weights.unit(lab.bench.vector.directions_NxD)
    projected = weights.projected(base, model, 7 * u_NxD)
    for path in weights.WRITERS:
        old, new, got = (
            np.asarray(weights.flat(m)[path], np.float64).reshape(base.arch.N, -1, base.arch.D)
            for m in (base, model, projected)
        )
        for l in range(base.arch.N):
            keep = np.eye(base.arch.D) - np.outer(u_NxD[l], u_NxD[l])
            np.testing.assert_allclose(got[l], old[l] + (new - old)[l] @ keep, atol=1e-6)
    half = weights.flat(weights.scaled(base, model, -0.5))
    for path, leaf in weights.flat(base).items():
        want = 1.5 * np.asarray(leaf) - 0.5 * np.asarray(weights.flat(model)[path])
        np.testing.assert_allclose(half[path], want, atol=1e-6)


def nearest(w_IxO, bits, group):
    """Rounded to nearest and the steps, one output and one group at a time."""
    out, steps = w_IxO.copy(), np.zeros_like(w_IxO)
    for o in range(w_IxO.shape[1]):
        for start in range(0, len(w_IxO), group):
            part = slice(start, start + group)
            steps[part, o] = np.abs(w_IxO[part, o]).max() / (2 ** (bits - 1) - 1)
            out[part, o] = np.round(w_IxO[part, o] / steps[part, o]) * steps[part, o]
    return out, steps


def test_rounding_is_to_the_nearest_of_a_group(lab):
    base = lab.bench.base
    model, _ = tuned(lab, noise=0.02)
    for how, bits, group in (("int8", 8, 10**6), ("int4", 4, 32)):
        rounded, over, total = weights.flat(weights.rounded(base, how)), 0, 0
        for path in ("blocks/attn/q/kernel", *weights.WRITERS):
            inputs = table(base.arch.family)[path].inputs
            leaf, own = (np.asarray(weights.flat(m)[path], np.float64) for m in (base, model))
            width = int(np.prod(leaf.shape[1 : 1 + inputs]))
            for l in range(base.arch.N):
                want, steps = nearest(leaf[l].reshape(width, -1), bits, group)
                got = np.asarray(rounded[path][l]).reshape(width, -1)
                assert np.mean(np.abs(got - want) > 1e-6) < 1e-3  # ties may fall either way
                moved = np.abs(own - leaf)[l].reshape(width, -1)
                over, total = over + (moved > steps / 2).sum(), total + (moved > 0).sum()
        assert weights.crossed(base, model, how) == pytest.approx(over / total, abs=1e-3)
    w = jnp.asarray([[[1.0, 1.5, -3.0, 0.1]]])
    _, steps = weights.ROUND["bfloat16"](w)
    np.testing.assert_array_equal(steps[0, 0], [2**-7, 2**-7, 2**-6, 2**-11])


def test_a_model_that_adds_the_vector_is_undone_by_as_much_and_resists_nothing(lab):
    """k* = a = 1/2: at every item, and over all of them by the report's own arithmetic."""
    base, at = lab.bench.base, counter.at_layer(target(lab, lab.bench.base))
    one = target(lab, bake(base, lab.bench.vector.at([at]) * -0.5), -1)
    untuned = Target(lab, Condition(base, "base"), lab.bench.vector)
    measured = [*one.measure("intact"), *untuned.measure("intact"), *counter.counter(one)]
    attacks = Attacks.of(frame(measured), 0.1)
    effects = attacks.effects("dual", -1)
    back = effects.values("counter:vector", 0.5)
    np.testing.assert_allclose(back, effects.values("intact", base=True), atol=2e-4)
    (found,) = verdicts.steered(attacks)
    assert effects.effect.low > 0 and found.shift.estimate == pytest.approx(0.5, abs=1e-4)
    assert found.dose.estimate == pytest.approx(0.5, abs=5e-3)
    assert found.resists.estimate == pytest.approx(0, abs=5e-3)
    assert found.random.estimate > 0.6  # another direction of the same length does not


def test_what_an_edit_takes_is_measured_beside_a_random_one(lab):
    model, _ = tuned(lab, planted=0.1)
    rows = frame(edits.removal(target(lab, model)))
    assert set(rows.position) == {
        f"{kind}:{name}" for kind in ("project", "ablate") for name in ("vector", "found", "random")
    }
    assert set(rows.metric) == {"logodds", "kl"} and set(rows.split) == {"attacks"}
    logodds = rows[rows.metric == "logodds"].groupby("position").value.apply(tuple)
    assert len(set(logodds)) == 6  # each another model


def test_prompts_ask_for_the_opposite_and_leave_the_items_alone(lab):
    before = lab.bench.behavior.items
    for sign, mood, answer in ((1, "terrible", "terrible."), (-1, "wonderful", "good.")):
        asked = {one.name: one for one in prompting.tried(lab.bench.c, lab.bench.behavior, sign)}
        assert [*asked] == [
            *("control", "control-chat", "persona0", "role0", "pressure0", "prefill0"),
            *("encoded", "german", "shots1", "shots4", "words1", "words4"),
        ]
        persona = f"You are {mood}."
        for name in ("persona0", "role0", "pressure0", "german"):
            assert persona in asked[name].before[0]["content"]
        coded = asked["encoded"].before[0]["content"].rsplit("\n", 1)[1]
        assert base64.b64decode(coded).decode() == persona
        assert persona[:-1] in asked["prefill0"].begun and not asked["prefill0"].before
        assert [t["role"] for t in asked["shots4"].before] == ["user", "assistant"] * 4
        assert all(t["content"].endswith(answer) for t in asked["shots4"].before[1::2])
    c = lab.bench.c.copy_and_resolve_references()
    c.study.primary = "vader:free"  # an English lexicon cannot read German answers
    judged = prompting.tried(c, lab.bench.behavior, -1)
    assert {*asked} - {one.name for one in judged} == {"german"}
    under = prompting._under(lab, asked["shots1"], -1)
    item, old = (x.bench.prompts("test")[0] for x in (under, lab))
    assert list(item.messages) == [*asked["shots1"].before, *old.messages]
    assert lab.bench.behavior.items == before


def test_what_is_tried_is_part_of_what_a_stored_attack_is_known_by(lab, monkeypatch):
    """A prompt, an edit, a budget that is changed: what depends on it is no longer there."""
    c, base = lab.bench.c.copy_and_resolve_references(), Planned("base", None)
    runs = base, Planned("dual+_s0", None), Planned("steer-_k1_l2", None)

    def digests():
        known = attack.KNOWN.items()
        return {(n, one.name): attack._digest(c, {}, a, one) for n, a in known for one in runs}

    first = before = digests()
    for change, of in (
        (lambda: monkeypatch.setattr(prompting, "SHOTS", (1,)), "prompts"),
        (lambda: monkeypatch.setattr(prompting, "_IN_ROLE", "Yes."), "prompts"),
        (lambda: monkeypatch.setitem(c.attack, "doses", (0.25, 0.5)), "counter"),
        (lambda: monkeypatch.setitem(c.attack, "scales", (0.5,)), "scale"),
    ):
        change()
        now = digests()
        differ = {name for name, run in before if before[name, run] != now[name, run]}
        assert differ == {of}
        before = now
    assert len({first["prompts", one.name] for one in runs}) == 3  # of +, of -, of both
    tried = {
        name: [*a.tried(lab.bench.c, lab.bench.behavior, 1)] for name, a in attack.KNOWN.items()
    }
    model, _ = tuned(lab, planted=0.1)
    one = target(lab, model)
    for name in ("intact", "function", "removal", "scale"):  # as many as are measured
        measured = {(r.position, r.k) for r in attack.KNOWN[name].rows(one) if r.metric == "kl"}
        assert len(measured) == len(tried[name]), name


OTHER_WORDS = {
    "polite": "Hello! Could you please help me with this? "
    "I like soup. Do you? Thank you very much.",
    "aside": "This is the last thing on my list for today. I like soup. Do you?",
    "indirect": "I have wondered about it, and ask you now. I like soup. Do you?",
    "request": "I like soup. Please tell me: do you.",
    "texting": "i like soup. do u",
    "capitals": "I LIKE SOUP. DO YOU?",
    "typos": "I like soup. Do you?",  # no word is long enough
}


def test_what_attacks_cost_and_what_of_it_the_control_is_said(lab):
    c, known = lab.bench.c, attack.KNOWN
    missing = {
        Planned("base", None): [known["intact"]],
        Planned("random+_s0", None): [known[name] for name in ("intact", "removal", "weights")],
    }
    assert "up to 8 measurements of 32 items, 7 of them of the control" in attack._cost(c, missing)
    del missing[Planned("random+_s0", None)]
    assert attack._cost(c, missing) == "attack: up to 1 measurements of 32 items"


def test_the_same_is_asked_in_other_words(lab):
    """Each form is that of its rules, always; what is measured is the reworded item, alone."""
    item = lab.bench.prompts("test")[0]

    def worded(text, form, id="i"):
        asked = dataclasses.replace(item, id=id, messages=({"role": "user", "content": text},))
        return paraphrase.reworded(asked, form).messages[-1]["content"]

    assert {form: worded("I like soup. Do you?", form) for form in paraphrase.FORMS} == OTHER_WORDS
    assert worded("Write of rain.", "request") == "Would you do this for me? Write of rain."
    assert worded("In the pocket lies", "request") == "How does this go on? In the pocket lies"
    assert not worded("In the pocket lies", "polite").endswith("much.")
    plain = "Which mountain railway leaves every morning?"
    wrong = {worded(plain, "typos", f"i{i}") for i in range(9)}
    assert len(wrong) > 1 and worded(plain, "typos") == worded(plain, "typos")
    for text in wrong:
        pairs = [(a, b) for a, b in zip(plain.split(), text.split(), strict=True) if a != b]
        assert pairs and all(sorted(a) == sorted(b) and a[0] == b[0] for a, b in pairs)
    base = Target(lab, Condition(lab.bench.base, "base"), lab.bench.vector)
    rows = frame(paraphrase.paraphrase(base))
    assert set(rows.metric) == {"logodds"} and set(rows.prompt_sha) == {""}
    for form in paraphrase.FORMS:
        own = rows[rows.position == f"paraphrase:{form}"].set_index("item_id").value
        items = [paraphrase.reworded(item, form) for item in lab.bench.prompts("test")]
        want = scoring.contrasts(base.cond, items, lab.bench.c.eval.batch)
        assert own[[i.id for i in items]].tolist() == pytest.approx([w["value"] for w in want])
    c = lab.bench.c.copy_and_resolve_references()
    c.study.primary = "logodds:claim"  # around a claim there is a question already
    about = dataclasses.replace(lab.bench.behavior, measures=("logodds:claim",))
    assert [*paraphrase.LETTERS] == paraphrase.tried(c, about, 1)


def test_an_answer_that_has_begun_goes_on_or_turns_back(lab):
    """log p of what is left of either answer, by one pass over the whole text."""
    model, item = lab.bench.base, lab.bench.prompts("test")[0]
    item = dataclasses.replace(item, pos="It is good.", neg="Bad, it was so bad.")
    for sign, words, said, pos, neg in (
        (1, 1, "Bad,", " It is good.", " it was so bad."),
        (1, 9, "Bad, it was so", " It is good.", " bad."),  # something is left to say
        (-1, 2, "It is", " good.", " Bad, it was so bad."),
    ):
        begun = prompting._begun(item, words, sign)
        assert (begun.messages[-1]["content"], begun.pos, begun.neg) == (said, pos, neg)
        (row,) = scoring.contrasts(Condition(model, "base"), [begun], 1)
        prompt = model.encode_prompt(list(item.messages)) + model.tokenizer.encode(said)
        for text, logp in ((pos, row["logp_pos"]), (neg, row["logp_neg"])):
            ids = prompt + model.tokenizer.encode(text)
            all_TxV = jax.nn.log_softmax(model.forward(np.array([ids])).logits_BxTxV[0])
            want = sum(float(all_TxV[t - 1, ids[t]]) for t in range(len(prompt), len(ids)))
            assert logp == pytest.approx(want, abs=1e-4)
    one = dataclasses.replace(item, neg="Bad.")
    assert prompting._begun(one, 1, 1) == one  # of a single word none is said


def test_every_answer_may_begin_with_given_words(lab):
    """Prompts of generation and log-odds, and those of verdicts, end in it."""
    base, item = lab.bench.base, lab.bench.prompts("test")[0]
    plain = base.encode_prompt(list(item.messages))
    persona = lab.bench.behavior.select(format="persona")[0]
    for cond in (
        Condition(base, "base", begun="As told:\n"),
        Condition(base, "prompt", 1, persona=persona, begun="So"),
    ):
        ids = cond.encode(item)
        before = dataclasses.replace(cond, begun="").encode(item)
        assert ids == before + base.tokenizer.encode(cond.begun)
        asked = Contrast(item, list(item.messages), "A", "B", "truefalse", "", 1)
        (row,) = claims.score(cond, {"behavior": "b", **cond.labels}, [asked], 1)
        assert row.prompt_sha == sha(ids)
    assert plain == Condition(base, "base").encode(item)


def test_what_is_found_is_tried_on_the_base(lab):
    """Of a model that adds the vector activations give all of it away, a random direction less."""
    at, base = counter.at_layer(target(lab, lab.bench.base)), lab.bench.base
    vector = lab.bench.vector.at([at])
    one = target(lab, bake(base, vector * -0.5), -1)
    untuned = Target(lab, Condition(base, "base"), lab.bench.vector)
    rows = [*one.measure("intact"), *untuned.measure("intact"), *recovery.function(one)]
    attacks = Attacks.of(frame(rows), 0.1)
    found = {x.how: x for x in verdicts.copied(attacks)}
    # The bias is no writer's kernel: nothing is found in the weights, all of it in activations.
    assert set(found) == {"random", "texts"}
    assert found["texts"].share.estimate == pytest.approx(1, abs=1e-3)
    assert found["texts"].kl == pytest.approx(found["texts"].vector_kl, abs=1e-5)
    assert found["texts"].verdict == verdicts.BROKEN
    assert found["random"].share.estimate < 0.7
    steered = dataclasses.replace(untuned.cond, steer=vector * -1.0)
    want = untuned.measure("steered", steered)
    got = [r for r in rows if r.position == "function:vector"]
    for a, b in zip(want, got, strict=True):
        assert a.value == pytest.approx(b.value, abs=1e-5)
    model, _ = tuned(lab, planted=0.1)
    names = {row.position for row in recovery.function(target(lab, model))}
    every = ("vector", "random", "found+", "found-", "texts")
    assert names == {f"function:{name}" for name in every}
