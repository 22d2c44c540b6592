"""Baking: an addition as a bias, an ablation by projection, both exact or refused."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import reptune_jax as rt
from reptune_jax.model.intervene import Steer
from tests.support import tiny
from tests.support import torch_reference as ref
from tests.support.steering_case import (
    TOLERANCE,
    assert_equals_torch,
    draw_batch,
    hooks,
    make_vector,
)


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return rt.load(str(tiny.make_llama(tmp_path_factory.mktemp("llama"), mlp_bias=True)))


@pytest.mark.parametrize("mlp_bias", [True, False])
def test_a_baked_model_is_the_steered_one_and_so_is_its_export(mlp_bias, tmp_path):
    folder = tiny.make_llama(tmp_path / "base", mlp_bias=mlp_bias)
    ours, theirs = rt.load(str(folder)), ref.load(folder)
    ids, mask = draw_batch()
    vector = 0.3 * make_vector(layers=[1, 2]).unit()
    baked = rt.bake(ours, vector)
    got = np.asarray(baked.forward(ids, mask).logits_BxTxV)
    want = np.asarray(ours.forward(ids, mask, steer=vector).logits_BxTxV)
    np.testing.assert_allclose(got, want, atol=TOLERANCE * np.abs(want).max())
    assert_equals_torch(got, theirs, ids, mask, hooks(vector.dose_NxD))
    assert ours.arch.mlp_bias == mlp_bias and ours.config.get("mlp_bias") == mlp_bias  # intact

    rt.save_hf(baked, tmp_path / "out")
    exported = ref.load(tmp_path / "out")
    assert exported.config.mlp_bias
    ids, mask = torch.tensor(ids).long(), torch.tensor(mask)
    with torch.no_grad():
        plain = ref.logits(exported, ids, mask).numpy()  # no hook
    assert_equals_torch(plain, theirs, ids.numpy(), mask.numpy(), hooks(vector.dose_NxD))


def test_bake_refuses_a_family_without_the_bias(tmp_path):
    ours = rt.load(str(tiny.make_qwen2(tmp_path)))
    with pytest.raises(ValueError, match=r"got a qwen2 model, expected one of llama.*no MLP bias"):
        rt.bake(ours, make_vector())


def family_case(name, folder):
    """(a random model of the family, a unit-norm vector for it)."""
    ours = rt.load(str(tiny.make_family(folder, name)))
    return ours, make_vector(N=ours.arch.N, D=ours.arch.D, layers=range(ours.arch.N)).unit()


@pytest.mark.parametrize("name", ["granite", "gpt2", "gpt_neox", "gpt_neox_serial"])
def test_other_families_whose_mlp_has_a_bias_are_baked_too(name, tmp_path):
    """Granite multiplies what a block writes; GPT-NeoX's blocks may be parallel."""
    ours, vector = family_case(name, tmp_path / "base")
    vector, (ids, mask) = 0.3 * vector.at(layers=[1]), draw_batch()
    want = np.asarray(ours.forward(ids, mask, steer=vector).logits_BxTxV)
    baked = rt.bake(ours, vector)
    got = np.asarray(baked.forward(ids, mask).logits_BxTxV)
    np.testing.assert_allclose(got, want, atol=TOLERANCE * np.abs(want).max())
    plain = np.asarray(ours.forward(ids, mask).logits_BxTxV)
    assert np.abs(plain - want).max() > 100 * TOLERANCE * np.abs(want).max()


def test_a_mode_that_does_not_exist_is_refused(ours):
    with pytest.raises(ValueError, match="mode: got 'clamp', expected 'add' or 'ablate'"):
        rt.bake(ours, make_vector(), mode="clamp")


@pytest.mark.parametrize("name", ["granite", "gpt2", "gemma", "phi3"])
def test_an_ablated_family_writes_nothing_along_the_direction(name, tmp_path):
    ours, vector = family_case(name, tmp_path / "base")
    vector, (ids, mask) = vector.at(layers=[1]), draw_batch()
    u_D = vector.directions_NxD[1] / np.linalg.norm(vector.directions_NxD[1])
    baked, real = rt.bake(ours, vector, mode="ablate"), mask.astype(bool)
    out = baked.forward(ids, mask, capture=True)
    residual = np.asarray(out.residual_NxBxTxD)[:, real]
    assert np.abs(residual @ u_D).max() < TOLERANCE * np.linalg.norm(residual, axis=-1).max()

    rt.save_hf(baked, tmp_path / "out")
    again = rt.load(str(tmp_path / "out")).forward(ids, mask)
    np.testing.assert_allclose(
        np.asarray(again.logits_BxTxV)[real], np.asarray(out.logits_BxTxV)[real], atol=1e-5
    )


def ablating_hooks(hf_model, u_D):
    """Projects u out of whatever a module of the decoder writes to the residual."""

    def project(_, __, out):
        first = out[0] if isinstance(out, tuple) else out
        first = first - (first @ u_D)[..., None] * u_D
        return (first, *out[1:]) if isinstance(out, tuple) else first

    layers = hf_model.model.layers
    writers = [
        hf_model.model.embed_tokens,
        *(part for l in layers for part in (l.self_attn, l.mlp)),
    ]
    return [module.register_forward_hook(project) for module in writers]


@pytest.mark.parametrize("maker", ["llama_biases", "llama_tied", "qwen2"])
def test_a_baked_ablation_is_the_online_one_at_every_block(maker, tmp_path):
    make, overrides = tiny.VARIANTS[maker]
    folder = make(tmp_path / "base", **overrides)
    ours, theirs = rt.load(str(folder)), ref.load(folder)
    ids, mask = draw_batch()
    vector = make_vector().at(layers=[2])
    u_D = vector.directions_NxD[2] / np.linalg.norm(vector.directions_NxD[2])
    baked = rt.bake(ours, vector, mode="ablate")
    got = baked.forward(ids, mask, capture=True)
    real = mask.astype(bool)

    held = ablating_hooks(theirs, torch.tensor(u_D))
    with torch.no_grad():
        out = theirs(torch.tensor(ids).long(), torch.tensor(mask), output_hidden_states=True)
    for hook in held:
        hook.remove()
    logits, hidden = out.logits.numpy(), [h.numpy() for h in out.hidden_states[1:-1]]
    ours_NxBxTxD = np.asarray(got.residual_NxBxTxD)
    scale = np.abs(logits[real]).max()
    np.testing.assert_allclose(
        np.asarray(got.logits_BxTxV)[real], logits[real], atol=TOLERANCE * scale
    )
    for l, want in enumerate(hidden):
        atol = TOLERANCE * np.abs(want[real]).max()
        np.testing.assert_allclose(ours_NxBxTxD[l][real], want[real], atol=atol)
    assert np.abs(ours_NxBxTxD[:, real] @ u_D).max() < 1e-4  # nothing is left of it
    plain = np.asarray(ours.forward(ids, mask).logits_BxTxV)
    assert np.abs(plain[real] - logits[real]).max() > 0.02 * scale

    # Online ablation at every block finds nothing more to remove.
    N, B, T = ours.arch.N, *ids.shape
    everywhere = np.broadcast_to(u_D, (N, len(u_D)))
    steer = Steer(
        *map(jnp.asarray, (everywhere, np.zeros((N, B)), np.ones((N, B)), np.ones((B, T))))
    )
    again = np.asarray(baked.forward(ids, mask, steer=steer).logits_BxTxV)
    np.testing.assert_allclose(again[real], logits[real], atol=TOLERANCE * scale)

    rt.save_hf(baked, tmp_path / "out")
    exported = ref.load(tmp_path / "out")
    assert exported.config.tie_word_embeddings is False
    with torch.no_grad():
        final = exported(torch.tensor(ids).long(), torch.tensor(mask)).logits.numpy()
    np.testing.assert_allclose(final[real], logits[real], atol=TOLERANCE * scale)


def test_ablations_that_would_not_be_exact_are_refused(ours):
    with pytest.raises(ValueError, match=r"got directions at 4 layers, expected one"):
        rt.bake(ours, make_vector(), mode="ablate")
    gemma = dataclasses.replace(
        ours, arch=dataclasses.replace(ours.arch, family="gemma2", post_norm=True)
    )
    with pytest.raises(ValueError, match=r"got a gemma2 model, whose blocks norm what they add"):
        rt.bake(gemma, make_vector().at(layers=[1]), mode="ablate")


@pytest.mark.parametrize("mode", ["add", "ablate"])
def test_a_bake_into_16_bits_says_what_is_left_of_it(mode, tmp_path, capsys):
    folder = tiny.make_llama(tmp_path, mlp_bias=True)
    vector = make_vector(layers=[1]).unit()
    exact, coarse = rt.load(str(folder), "float32"), rt.load(str(folder), "bfloat16")
    rt.bake(exact, vector, mode)
    assert "merged into" not in capsys.readouterr().out
    before = np.asarray(coarse.params["blocks"]["mlp"]["down"]["bias"]).astype(np.float64)
    after = np.asarray(rt.bake(coarse, vector, mode).params["blocks"]["mlp"]["down"]["bias"])
    said = capsys.readouterr().out
    assert f"{folder}: merged into bfloat16: the stored weights changed by" in said
    if mode == "add":  # one leaf is all that changed
        dose = vector.dose_NxD.astype(np.float64)
        error = np.linalg.norm(after.astype(np.float64) - before - dose) / np.linalg.norm(dose)
        assert f"and {error:.0%} of it is rounding error" in said
