"""LoRA: adapters equal merged weights, their gradients the chain rule's, and a run resumes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from reptune_jax import config, lm, ranges, train, tuned_run
from reptune_jax.cost import flops
from reptune_jax.evals import arms
from reptune_jax.model import lora
from reptune_jax.model.transformer import unembed, whole
from reptune_jax.tuning import base_cache, partition
from reptune_jax.tuning import step as steps
from reptune_jax.tuning.objective import make_objective
from tests.support import eight_devices, lora_case, tiny, tiny_behavior, tuning_case
from tests.support.runs import Stop, read_log, stop_at

gradient = jax.jit(steps.gradient, static_argnums=(0, 5))
NO = jnp.asarray(False)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return lm.load(str(tiny.make_llama(tmp_path_factory.mktemp("llama"))), "float32")


@pytest.fixture(scope="module")
def case(model):
    """Adapters on every projection of layers 1 and 2, B not zero."""
    case = tuning_case.case(model, lora_case.settings(train__modules=lora_case.ALL))
    case.state = case.state.replace(trained=lora_case.moved(case.state.trained))
    return case


def about(model, case):
    return partition.about(model.arch, case.train)


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def test_adapters_are_a_collection_beside_the_base_models_tree(model, case):
    assert set(case.state.trained) == {
        f"{path}/{leaf}"
        for path in ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")
        for leaf in (lora.A, lora.B)
    }
    shapes = {path: leaf.shape for path, leaf in case.state.trained.items()}
    assert shapes["attn/v/lora_a"] == (2, 64, 4) and shapes["attn/v/lora_b"] == (2, 4, 2, 16)
    assert shapes["attn/o/lora_a"] == (2, 4, 16, 4) and shapes["attn/o/lora_b"] == (2, 4, 64)
    merged = partition.merge(case.state.trained, case.objective.frozen, jnp.float32)
    whole_tree = flat(merged["tuned"])
    assert whole_tree.keys() == flat(model.params["blocks"]).keys()
    for path, leaf in flat(model.params["blocks"]).items():
        assert (np.asarray(whole_tree[path]) == np.asarray(leaf)[1:3]).all(), path


def test_an_adapter_computes_what_merged_weights_do(model, case):
    batch = tuning_case.batch(model)
    tokens, mask = batch.examples.tokens_BxT, batch.examples.mask_BxT

    @jax.jit
    def adapted(trained):
        params = partition.merge(trained, case.objective.frozen, jnp.float32)
        beside = lora.variables(trained, case.objective.scale, "tuned", jnp.float32)
        with lora.applied():
            hidden, _ = case.decoder.apply({"params": params, **beside}, tokens, mask)
        return unembed(case.decoder, params, hidden)

    params = tuning_case.tuned(model, case.state.trained, (1, 3), about(model, case)).params
    hidden, _ = whole(model.arch).apply({"params": params}, tokens, mask)
    want = np.asarray(unembed(whole(model.arch), params, hidden))
    base = np.asarray(model.forward(tokens, mask).logits_BxTxV)
    got = np.asarray(adapted(case.state.trained))
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())
    assert np.abs(want - base).max() > 0.05 * np.abs(base).max()
    fresh = tuning_case.case(model, lora_case.settings(train__modules=lora_case.ALL)).state.trained
    np.testing.assert_array_equal(np.asarray(adapted(fresh)), np.asarray(adapted(fresh)))
    np.testing.assert_allclose(adapted(fresh), base, atol=1e-5)  # B begins at zero


def test_gradients_are_the_chain_rules_from_whole_weights(model, case):
    """dA = s dW B^T and dB = s A^T dW, dW being the gradient of the merged weights themselves."""
    batch = tuning_case.batch(model)
    ours, (mean_J, _) = gradient(
        case.decoder, case.state.trained, case.objective, batch, case.objective.weight_J, 1
    )
    params = tuning_case.tuned(model, case.state.trained, (1, 3), about(model, case)).params
    c = tuning_case.settings(train__modules=("attn/./kernel", "mlp/.*kernel"))
    trained, frozen = partition.split(params, c.train.layers, c.train.modules)
    task = make_objective(c, tuning_case.vector(model), frozen)
    of_whole, (want_J, _) = gradient(case.decoder, trained, task, batch, task.weight_J, 1)
    np.testing.assert_allclose(mean_J, want_J, rtol=1e-5, atol=1e-6)
    scale = 8.0 / 4
    for path, dw in of_whole.items():
        path = path.removesuffix("/kernel")
        a, b = (np.asarray(case.state.trained[f"{path}/{leaf}"]) for leaf in (lora.A, lora.B))
        a_LxIxR, b_LxRxO = a.reshape(2, -1, 4), b.reshape(2, 4, -1)
        dw_LxIxO = np.asarray(dw).reshape(2, a_LxIxR.shape[1], b_LxRxO.shape[2])
        da = scale * np.einsum("lio,lro->lir", dw_LxIxO, b_LxRxO)
        db = scale * np.einsum("lir,lio->lro", a_LxIxR, dw_LxIxO)
        for got, want in ((ours[f"{path}/{lora.A}"], da), (ours[f"{path}/{lora.B}"], db)):
            want = want.reshape(got.shape)
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


def test_steps_of_every_arm_move_adapters_and_nothing_else(model):
    v, seen, programs = tuning_case.vector(model), {}, set()
    before = {path: np.array(leaf) for path, leaf in flat(model.params).items()}
    for arm in config.TUNED_ARMS:
        c = config.armed(lora_case.settings(arm=arm))
        case = tuning_case.case(model, c, v.random_like(0) if c.vector.random else v)
        start = {path: np.array(leaf) for path, leaf in case.state.trained.items()}
        step, state = steps.make_step(case.decoder, case.train), case.state
        programs.add(step)
        for seed in range(2):
            batch = tuning_case.batch(model, seed=seed, neutral=True)  # one shape for all
            if c.loss.match:
                goals = base_cache.add_goals(batch.examples, model, (1, 3), 4)
                batch = batch.replace(examples=goals)
            state, _ = step(state, case.objective, batch, NO)
        assert set(state.trained) == {f"attn/{m}/{leaf}" for m in "vo" for leaf in (lora.A, lora.B)}
        for path, leaf in state.trained.items():
            assert leaf.dtype == jnp.float32 and (np.asarray(leaf) != start[path]).mean() > 0.9
        seen[arm] = np.asarray(state.trained["attn/v/lora_b"]).tobytes()
    assert len(set(seen.values())) == len(config.TUNED_ARMS)
    # One for all, one for `preventative`, which steers while it trains, one for those with goals.
    assert len(programs) == 1 and programs.pop()._cache_size() == 3
    for path, leaf in flat(model.params).items():
        assert (np.asarray(leaf) == before[path]).all(), path


def test_adapters_begin_as_pefts_by_the_seed_alone(model):
    def begin(seed, modules=("attn/v",)):
        c = lora_case.settings(train__modules=modules)
        return partition.begin(model.arch, model.params, c.train, seed)[0]

    a = np.asarray(begin(0)["attn/v/lora_a"])
    bound = 64**-0.5
    assert np.abs(a).max() <= bound and a.std() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert (a == np.asarray(begin(0, ("attn/v", "mlp"))["attn/v/lora_a"])).all()
    assert (a != np.asarray(begin(1)["attn/v/lora_a"])).mean() > 0.99
    assert (a[0] != a[1]).mean() > 0.99
    assert not np.asarray(begin(0)["attn/v/lora_b"]).any()


def test_what_cannot_have_adapters_is_refused(model):
    with pytest.raises(ValueError, match=r"'mlp_norm' matches no projection.*attn/k, attn/o"):
        tuning_case.case(model, lora_case.settings(train__modules=("attn/v", "mlp_norm")))
    c = lora_case.settings(model="x")
    c.train.lora.rank = -1
    with pytest.raises(ValueError, match=r"train.lora.rank: got -1, expected 0 or more"):
        ranges.check(c)


def test_the_cost_counts_adapters_and_no_whole_weights(model):
    c = lora_case.settings()
    case, batch = tuning_case.case(model, c), tuning_case.batch(model)
    line = flops.describe(model.arch, case.train, case.state.trained, batch)
    size = 2 * 4 * ((64 + 2 * 16) + (64 + 64))  # layers x rank x (in + out) of v and o
    assert line.startswith(f"training {size:,} weights of LoRA adapters of rank 4 (attn/v, attn/o")
    plain = flops.step_flops(model.arch, (1, 3), size, 64, 16, 10)
    lora_ = flops.step_flops(model.arch, (1, 3), size, 64, 16, 10, adapters=size)
    assert plain["weights"] == lora_["weights"] == 2 * 64 * size
    assert lora_["forward"] - plain["forward"] == 2 * 64 * size
    assert lora_["activations"] - plain["activations"] == 2 * 64 * size


def test_sharded_steps_are_those_of_one_device(model, tmp_path):
    out = tmp_path / "sharded.npz"
    eight_devices.run("lora_case", model.name, out, "2x2x2")
    losses, state = lora_case.three_steps(model)
    found = np.load(out)
    np.testing.assert_allclose(found["losses"], losses, rtol=1e-5)
    for path, leaf in state.trained.items():
        np.testing.assert_allclose(found[path], leaf, atol=2e-5, err_msg=path)


# ---------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        tiny_behavior.patch_neutral(patch)
        behavior = tiny_behavior.write(tmp_path_factory.mktemp("behavior"))
        changes = {"train__lora__rank": 2, "train__lora__alpha": 8.0, "train__steps": 4}
        c = tiny_behavior.settings(model.name, behavior, **changes)
        return c, train.run(c, tmp_path_factory.mktemp("study"), model)


def test_a_stopped_run_resumes_to_the_same_bits(finished, model, monkeypatch, tmp_path):
    c, folder = finished
    tiny_behavior.patch_neutral(monkeypatch)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(Stop):
            train.run(c, tmp_path, model)
    resumed = train.run(c, tmp_path, model)
    assert read_log(resumed) == read_log(folder)
    ours, theirs = tuned_run.load(resumed).trained, tuned_run.load(folder).trained
    assert ours.keys() == theirs.keys()
    assert all(leaf.tobytes() == ours[path].tobytes() for path, leaf in theirs.items())


def test_another_rank_or_target_is_refused(finished, model):
    c, folder = finished
    for key, value in (("train.lora.rank", 3), ("train.modules", ("attn/q",))):
        other = c.copy_and_resolve_references()
        other.update_from_flattened_dict({key: value})
        with pytest.raises(ValueError, match=rf"holds a run of another config: {key}"):
            train.run(other, folder.parent, model)


def test_a_checkpoint_says_what_its_adapters_are_and_an_evaluation_merges_them(finished, model):
    _, folder = finished
    run = tuned_run.load(folder)
    trained, meta, step = run.trained, run.meta, run.step
    assert meta["lora"] == {"rank": 2, "alpha": 8.0, "targets": ["attn/o", "attn/v"]}
    assert meta["layers"] == [1, 3] and step > 0
    tuned = flat(arms.tuned(model, folder).model.params)
    for path, base in flat(model.params).items():
        got, base = np.asarray(tuned[path]), np.asarray(base)
        if path not in ("blocks/attn/v/kernel", "blocks/attn/o/kernel"):
            assert (got == base).all(), path
            continue
        name = path.removeprefix("blocks/").removesuffix("/kernel")
        a, b = trained[f"{name}/{lora.A}"], trained[f"{name}/{lora.B}"]
        assert (got[[0, 3]] == base[[0, 3]]).all()
        want = base[1:3].reshape(2, -1) + 4.0 * np.einsum(
            "lir,lro->lio", a.reshape(2, -1, 2), b.reshape(2, 2, -1)
        ).reshape(2, -1)
        np.testing.assert_allclose(got[1:3].reshape(2, -1), want, atol=1e-6)
        assert np.abs(got - base).max() > 1e-4
