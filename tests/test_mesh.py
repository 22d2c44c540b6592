"""Sharded runs equal one device. A subprocess forces 8 devices on the CPU."""

import json

import jax
import numpy as np
import pytest

from reptune_jax import lm, mesh, tuned_run
from tests.support import eight_devices, tiny, tuning_mesh

MESHES = ("8x1x1", "1x8x1", "2x4x1", "2x2x2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def sharded(folder, tmp_path_factory):
    """What `tuning_mesh` found on 8 devices."""
    out = tmp_path_factory.mktemp("out")
    eight_devices.run("tuning_mesh", folder, out, *MESHES)
    return out


@pytest.fixture(scope="module")
def alone(folder):
    assert jax.device_count() == 1
    losses, state, _ = tuning_mesh.some_steps(lm.load(str(folder), "float32"))
    return losses, state


@pytest.mark.parametrize("shape", (*MESHES, "packed"))
def test_losses_and_weights_after_some_steps_are_those_of_one_device(shape, sharded, alone):
    losses, state = alone
    found = json.loads((sharded / f"{shape}.json").read_text())
    np.testing.assert_allclose(found["losses"], losses, rtol=1e-5)
    leaves = np.load(sharded / f"{shape}.npz")
    assert set(leaves.files) == set(state.trained)
    for path, leaf in state.trained.items():
        np.testing.assert_allclose(leaves[path], leaf, rtol=1e-5, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("shape", MESHES)
def test_moments_are_sharded_as_their_weights_and_stay_so(shape, sharded):
    found = json.loads((sharded / f"{shape}.json").read_text())
    assert found["before"] == found["after"]
    layout = found["before"]["attn/v/kernel"]
    _, fsdp, tensor = (int(n) for n in shape.split("x"))
    D, K, Dh = 64, 2, 16
    assert layout["weight"] == layout["mu"] == layout["nu"] == [2, D // fsdp, K // tensor, Dh]


def collectives(lines):
    """(kind, axes) -> (how many, MiB) of what is said before step 0."""
    start = next(i for i, line in enumerate(lines) if "collectives a step: kind" in line)
    rows = [line.partition("] ")[2].split() for line in lines[start + 1 : -1]]
    return {(kind, axes): (int(times), float(size)) for kind, axes, times, size in rows}


@pytest.mark.parametrize("shape", MESHES)
def test_what_a_step_sends_is_said_before_step_0(shape, sharded):
    found = json.loads((sharded / f"{shape}.json").read_text())
    said, sizes = (
        collectives(found["said"]),
        dict(zip(mesh.AXES, map(int, shape.split("x")), strict=True)),
    )
    axes = {axis for _, which in said for axis in which.split("+")}
    assert axes == {axis for axis, size in sizes.items() if size > 1}
    if sizes["fsdp"] > 1:  # weights, before they are used
        assert any(kind == "all-gather" and "fsdp" in which for kind, which in said)
    if sizes["tensor"] > 1:  # partial sums over heads and MLP columns
        assert said["all-reduce", "tensor"][1] > 0
    if shape == "8x1x1":
        # By hand: a ring sends each of the gradient's bytes twice, but for one share in eight, and
        # there are two micro-batches. What else is summed over devices is less than .01 MiB.
        trained = sum(np.prod(layout["weight"]) for layout in found["before"].values())
        assert f"training {trained:,} weights" in found["said"][0]
        sent = 2 * trained * 4 * 2 * 7 / 8 / 2**20
        assert said["all-reduce", "data"][1] == pytest.approx(sent, abs=0.01)


def test_a_checkpoint_saved_on_eight_devices_is_read_on_one(sharded, alone):
    run = tuned_run.load(sharded)
    trained, meta, step = run.trained, run.meta, run.step
    assert (meta["from"], step) == (MESHES[-1], tuning_mesh.STEPS)
    for path, leaf in alone[1].trained.items():
        np.testing.assert_allclose(trained[path], leaf, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_is_restored_onto_every_mesh(sharded):
    found = json.loads((sharded / "restored.json").read_text())
    assert set(found) == set(MESHES) and all(f["same layout"] for f in found.values())
    assert len({json.dumps(f["digests"]) for f in found.values()}) == 1


def test_what_does_not_divide_is_named(sharded):
    errors = json.loads((sharded / "errors.json").read_text())
    assert "blocks/attn/k/kernel [4, 64, 2, 16]: 2 over tensor=8" in errors["heads"]
    assert "batch: got 6 rows, expected a multiple of mesh data x fsdp = 8" in errors["batch"]
    assert "mesh: got {'data': 3, 'fsdp': 1, 'tensor': 1}" in errors["sizes"]
    assert "8 devices" in errors["sizes"] and "'fsdp': 16" in errors["too many"]


def test_one_device_has_one_mesh():
    assert mesh.make_mesh(-1).size == 1
    for sizes in ((-1, 2, 1), (2, 1, 1), (0, 1, 1), (-1, -1, 1), (1, -2, 1)):
        with pytest.raises(
            ValueError, match=r"^mesh: got .* expected sizes whose product is the 1"
        ):
            mesh.make_mesh(*sizes)


def test_a_weight_without_rule_is_an_error():
    with pytest.raises(ValueError, match="blocks/attn/z/kernel: no sharding rule"):
        mesh.spec("blocks/attn/z/kernel", 3)
