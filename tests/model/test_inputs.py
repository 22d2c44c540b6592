"""What a caller hands over: refused by name, or computed as what it means."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import reptune_jax as rt
from reptune_jax.model import inputs
from reptune_jax.model.intervene import steer_all
from tests.support import tiny
from tests.support import torch_reference as ref

V = tiny.VOCAB
IDS = np.array([[7, 8, 9, 10], [11, 12, 13, 14]], np.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def ours(folder):
    return rt.load(str(folder))


@pytest.fixture(scope="module")
def vector():
    noise = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    return rt.SteeringVector(noise, np.ones(4, np.float32), 0 * noise, (0, 1, 2, 3), {})


def changed(row, column, value):
    ids = IDS.astype(np.int64)
    ids[row, column] = value
    return ids


@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [
        (changed(1, 2, V), None, f"tokens_BxT: got id {V}, expected ids from 0 to {V - 1}"),
        (changed(0, 0, -1), None, "tokens_BxT: got id -1, expected ids from 0"),
        (jnp.asarray(changed(0, 0, -1)), None, "tokens_BxT: got id -1, expected ids from 0"),
        (changed(0, 0, 2**32 + 7), None, f"got id {2**32 + 7}"),  # 7, after a cast to int32
        (IDS.astype(np.float32), None, "tokens_BxT: got float32, expected whole numbers"),
        (IDS > 7, None, "tokens_BxT: got bool, expected whole numbers"),
        ([[7, 8], [9]], None, "tokens_BxT: got rows of unequal length"),
        ([7, 8, 9], None, r"tokens_BxT: got shape \[3\], expected \[B, T\].*One text is one row"),
        (IDS[:, :0], None, r"tokens_BxT: got shape \[2, 0\], expected \[B, T\]"),
        (IDS, IDS, r"mask_BxT: got \[7, 8, 9, 10, 11\], expected 1 on real tokens"),
        (IDS, np.full((2, 4), 0.5), r"mask_BxT: got \[0.5\], expected 1"),
        (IDS, np.ones((2, 3)), r"mask_BxT: got shape \[2, 3\], expected .* \[2, 4\]"),
        (IDS, [[1, 1, 1, 1], [1, 0, 1, 1]], "mask_BxT: row 1 has holes"),
        (IDS, [[0, 0, 0, 0], [1, 1, 1, 1]], "mask_BxT: row 0 has padding only"),
    ],
)
def test_arrays_that_no_model_can_read(tokens, mask, message, ours):
    for call in (ours.forward, lambda t, m: ours.generate_ids(t, m, 2)):
        with pytest.raises(ValueError, match=message):
            call(tokens, mask)


def test_padding_on_the_right_is_for_forward_only(ours):
    mask = [[1, 1, 1, 0], [1, 1, 1, 1]]
    ours.forward(IDS, mask)
    with pytest.raises(ValueError, match="mask_BxT: row 0 ends in padding, expected padding on"):
        ours.generate_ids(IDS, mask, 2)


def test_every_way_to_say_the_same_gives_torchs_logits(ours, folder):
    theirs = ref.load(folder)
    mask = np.array([[0, 1, 1, 1], [1, 1, 1, 1]])
    want = ref.logits(theirs, torch.tensor(IDS).long(), torch.tensor(mask)).detach().numpy()
    for tokens in (IDS.tolist(), IDS.astype(np.int64), IDS.astype(np.uint16), jnp.asarray(IDS)):
        for given in (mask, mask.astype(bool), mask.astype(float), jnp.asarray(mask)):
            got = np.asarray(ours.forward(tokens, given).logits_BxTxV)
            np.testing.assert_allclose(got[0, 1:], want[0, 1:], atol=1e-3)
            np.testing.assert_allclose(got[1], want[1], atol=1e-3)


def test_tracers_are_taken_as_they_are(ours):
    inside = jax.jit(lambda t, m: ours.forward(t, m).logits_BxTxV)
    want = ours.forward(IDS).logits_BxTxV
    np.testing.assert_allclose(inside(IDS, np.ones_like(IDS)), want, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[7], [V]], f"prompt 1: got id {V}, expected ids from 0 to {V - 1}"),
        ([[7, -1]], "prompt 0: got id -1"),
        ([[7.0, 8.0]], "prompt 0: got float64, expected whole numbers"),
        ([[7], []], "prompt 1: got no tokens, expected at least one"),
        ([7, 8], r"rows of ids: got \[7, 8\], expected lists of token ids. Ids of one text"),
        ("Hi there", "rows of ids: got 'Hi there', expected lists of token ids"),
        (["Hi", "there"], r"rows of ids: got \['Hi', 'there'\], expected lists"),
        ([[[7]]], "rows of ids: got"),
    ],
)
def test_rows_that_no_model_can_read(rows, message, ours):
    for call in (
        lambda: ours.generate_each(rows, 2),
        lambda: ours.score_ids(rows, [1] * len(rows)),
        lambda: ours.next_logp(rows, np.zeros((len(rows), 1), int)),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_rows_may_be_arrays(ours):
    want = ours.generate_each(IDS.tolist(), 3)
    assert (
        ours.generate_each(IDS, 3) == ours.generate_each([jnp.asarray(r) for r in IDS], 3) == want
    )


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ([0, 1], "starts: got 0 for row 0 of 4 tokens, expected 1 to 3"),
        ([1, 4], "starts: got 4 for row 1 of 4 tokens, expected 1 to 3"),
        ([1, -1], "starts: got -1 for row 1"),
        ([1, 1.0], "starts: got 1.0 for row 1"),
        ([1], "starts: got 1 for 2 rows"),
    ],
)
def test_what_is_scored_lies_within_a_row(starts, message, ours):
    with pytest.raises(ValueError, match=message):
        ours.score_ids(IDS.tolist(), starts)


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ([[V], [1]], f"candidates_IxC: got id {V}"),
        ([[-1], [1]], "candidates_IxC: got id -1"),
        ([[0.5], [1]], "candidates_IxC: got float64"),
        ([[1]], r"candidates_IxC: got shape \[1, 1\], expected \[2, C\]"),
        ([1, 2], r"candidates_IxC: got shape \[2\], expected \[2, C\]"),
    ],
)
def test_candidates_are_ids_of_each_prompt(candidates, message, ours):
    with pytest.raises(ValueError, match=message):
        ours.next_logp(IDS.tolist(), candidates)


def test_one_text_where_a_list_is_expected(ours):
    turns = [{"role": "user", "content": "Hi"}]
    for call, message in [
        (lambda: ours.generate("Hi there"), r"prompts: got 'Hi there', .*one is \[prompt\]"),
        (lambda: ours.generate(turns[0]), r"prompts: got .*one is \[prompt\]"),
        (lambda: ours.generate(None), r"prompts: got None, .*one is \[prompt\]"),
        (lambda: ours.generate(turns), r"prompts: got .*turns of a single chat are \[turns\]"),
        (lambda: ours.generate([[7, 8]]), "prompts: got .*Token ids go to `generate_each`"),
        (lambda: ours.loglikelihood("ab"), "pairs: got 'ab', expected a list of"),
        (lambda: ours.loglikelihood(("ab", "cd")), r"pairs: got .*one is \[\(context"),
        (lambda: ours.loglikelihood([("a",)]), "pairs: got .*expected a list of"),
        (lambda: rt.extract(ours, ("Yes", "No")), r"pairs: got .*pair is \[\(positive"),
        (lambda: rt.extract(ours, [("a", "b", "c")]), "pairs: got .*expected a list of"),
        (lambda: rt.extract(ours, "ab"), "pairs: got 'ab', expected a list of"),
        (lambda: rt.extract(ours, [("a", 3)]), "pairs: got .*expected a list of"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    assert len(ours.generate([turns], max_new_tokens=1)) == 1
    assert ours.generate([]) == []
    assert len(ours.generate((p for p in ("Hi", "there")), max_new_tokens=1)) == 2


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"max_new_tokens": 0}, "max_new: got 0, expected a whole number from 1 on"),
        ({"max_new_tokens": 2.5}, "max_new: got 2.5"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"temperature": -1.0}, "temperature: got -1.0, expected 0"),
        ({"temperature": float("nan")}, "temperature: got nan, expected 0"),
    ],
)
def test_numbers_that_mean_nothing(asked, message, ours):
    with pytest.raises(ValueError, match=message):
        ours.generate(["Hi"], **asked)


@pytest.mark.parametrize("steer", [3, "cheer.safetensors", {"layer": 3}, np.ones((4, 64))])
def test_what_steers_is_a_vector(steer, ours):
    for call in (
        lambda: ours.forward(IDS, steer=steer),
        lambda: ours.generate(["Hi"], steer=steer),
        lambda: ours.loglikelihood([("a", "b")], steer=steer),
        lambda: ours.next_logp([[7]], [[8]], steer=steer),
    ):
        with pytest.raises(ValueError, match=r"steer: got .*expected a SteeringVector, such as"):
            call()


def test_a_steer_of_another_batch_or_model_is_refused(ours):
    ready = steer_all(jnp.ones((4, 64)), jnp.ones(4), 2, 4)
    ours.forward(IDS, steer=ready)
    with pytest.raises(ValueError, match=r"steer.add_NxB: got shape \[4, 2\], expected \[4, 1\]"):
        ours.forward(IDS[:1], steer=ready)
    with pytest.raises(ValueError, match=r"steer.token_BxT: got shape \[2, 4\], expected \[2, 5\]"):
        ours.generate_ids(IDS, None, 2, steer=ready)
    with pytest.raises(ValueError, match=r"steer.direction_NxD: got shape \[3, 64\]"):
        ours.forward(IDS, steer=ready.replace(direction_NxD=jnp.ones((3, 64))))


def test_a_dose_of_zero_is_legal(ours, vector):
    plain = ours.generate(["Hi"], max_new_tokens=4)
    assert ours.generate(["Hi"], max_new_tokens=4, steer=0 * vector) == plain


def test_a_layer_may_be_said_as_a_number(vector):
    for layer in (2, np.int64(2), [2], (2, 2), range(2, 3), np.array([2])):
        one = vector.at(layers=layer)
        assert one.layers == (2,) and all(type(l) is int for l in one.layers)
        np.testing.assert_array_equal(one.directions_NxD, vector.at([2]).directions_NxD)
    for wrong in (4, -1, 2.0, "2", [2.0], [1, 9]):
        with pytest.raises(ValueError, match=r"layers: got \[.*expected some of \[0, 1, 2, 3\]"):
            vector.at(layers=wrong)


def test_a_check_costs_no_copy_where_nothing_is_to_change():
    mask = np.ones_like(IDS)
    tokens, same = inputs.token_arrays(IDS, mask, V)
    assert tokens is IDS and same is mask
    device = jnp.asarray(IDS)
    assert inputs.token_arrays(device, mask, V)[0] is device


def test_a_models_repr_fits_on_a_screen(ours, folder, vector):
    size = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())
    want = f"Model('{folder}', llama, 4 layers of width 64, {size:,} parameters, float32)"
    assert repr(ours) == want
    assert repr(vector) == (
        "SteeringVector(of no model, 4 of 4 layers, width 64, norm raw, agreement unknown)"
    )


def test_rows_are_compared_with_the_context_before_anything_is_computed(ours):
    assert ours.context == 256  # of the tiny model's config.json
    ids = [7] * 257
    message = "prompt 1: got 257 tokens, expected at most 256, the model's context.*Cut 1 off"
    with pytest.raises(ValueError, match=message):
        ours.generate_each([[7], ids], 2)
    with pytest.raises(ValueError, match=message):
        ours.score_ids([[7, 8], ids], [1, 1])
    with pytest.raises(ValueError, match=message):
        ours.next_logp([[7], ids], np.zeros((2, 1), np.int32))
    with pytest.raises(ValueError, match=r"prompt 0: got .* tokens, expected at most 256"):
        ours.generate(["x" * 1_000_000])
    with pytest.raises(ValueError, match=r"prompt 0: got .* tokens, expected at most 256"):
        rt.extract(ours, [("x" * 1_000_000, "y")])
