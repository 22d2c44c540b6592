"""The compiled step moves what the sharding rules say, to the byte; by the TPU's compiler too."""

import json

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from reptune_jax import mesh as meshes
from reptune_jax.cost import collectives
from tests.support import eight_devices, plan_case

MESHES = ("1x8x1", "2x4x1", "2x2x2")
CHIPS = (("v5e:2x2", "dots"), ("v5p:2x2x1", "full"))


@pytest.fixture(scope="module")
def forced():
    """What `plan_case` found on 8 devices."""
    run = eight_devices.run("plan_case", *MESHES, quick=False)
    assert "Involuntary full rematerialization" not in run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(params=[*MESHES, *CHIPS], ids=lambda p: p if isinstance(p, str) else "-".join(p))
def case(request):
    if request.param in MESHES:
        return request.getfixturevalue("forced")[request.param]
    topology, remat = request.param
    mesh = plan_case.mesh_for(topology)
    found = plan_case.compare(plan_case.ARCH, plan_case.BF16, mesh, 128, remat)
    return json.loads(json.dumps(found))  # as of the subprocess


@pytest.mark.parametrize("what", ["gathers", "activations", "constraints", "kernels"])
def test_the_step_is_what_the_rules_say(what, case):
    found, ruled = case[what]
    assert found == ruled


def test_gradients_are_summed_once_and_where_their_weights_lie(case):
    """Losses and norms, some numbers, are summed with them."""
    for found, ruled in zip(*case["gradients"], strict=True):
        assert ruled <= found < ruled + 1024


def test_what_embedding_head_and_loss_send_is_bounded(case):
    found, tables = case["rest"]
    assert 0 <= found < tables


def test_arrays_are_exchanged_along_one_axis_at_a_time(case):
    """Along several go sums of numbers, and token ids at most: never rows or weights."""
    found, tokens = case["several axes"]
    # 2x4x1: a weight's gradient is summed over both axes of the rows, one after the other.
    assert all(sent <= tokens for sent in found.values()), found


def test_a_device_holds_its_shards_and_the_state_is_donated(case):
    """TPUs fill small arrays up to tiles; unused numbers are no arguments."""
    (held, shards), (donated, state), (new, _) = case["arguments"], case["donated"], case["new"]
    assert shards - 64 <= held <= 1.01 * shards
    assert state <= donated <= 1.01 * state
    assert new < 8192  # metrics


def test_groups_are_read_in_the_order_of_their_devices():
    groups = "mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0))"
    hlo = f"""
ENTRY %main (a: f32[8]) -> f32[8] {{
  %a = f32[8] all-gather(%x), replica_groups={groups} {{'a'}}, dimensions={{0}}
  %c = f32[8] all-gather(%x), replica_groups={groups} {{'c'}}, dimensions={{0}}
}}
"""
    mesh = Mesh(np.array(jax.devices() * 8).reshape(2, 4, 1), meshes.AXES)
    assert collectives.traffic(hlo, mesh) == {
        ("all-gather", "fsdp"): (1, 32 * 3 / 4),
        ("all-gather", "data"): (1, 32 / 2),
    }
