"""The plan, and what the real TPU compiler says of the programs this package runs."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from reptune_jax import mesh as meshes
from reptune_jax.cost import collectives, hardware
from reptune_jax.model import decode, families
from reptune_jax.model.cache import init_cache
from reptune_jax.model.prefix import Prefix
from reptune_jax.model.read import read_at_once
from reptune_jax.model.sampling import Sampling
from reptune_jax.model.transformer import whole
from reptune_jax.plan import abstract
from reptune_jax.plan import compiled as plan
from tests.support.plan_case import ARCH, BF16, TOPOLOGIES, mesh_for, settings


def kinds(hlo, mesh):
    return set(collectives.traffic(hlo, mesh))


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_extraction_compiles_for_a_tpu(topology):
    mesh = mesh_for(topology)
    rows = functools.partial(abstract.struct, mesh=mesh, spec=meshes.BATCH)
    tokens, mask = rows((8, 128), jnp.int32), rows((8, 128), jnp.int32)
    weights = abstract.params(ARCH, BF16, mesh)
    lowered = read_at_once.lower(
        whole(ARCH, BF16, meshes.rows_of(mesh)),
        weights,
        tokens,
        mask,
        Prefix(abstract.struct((1, 32), jnp.int32, mesh, PartitionSpec()), None),
        hidden=False,
        read_BxPxT=rows((8, 1, 128), jnp.float32),
    )
    compiled = lowered.compile()
    assert compiled.memory_analysis().temp_size_in_bytes > 0
    assert ("all-gather", "fsdp") in kinds(compiled.as_text(), mesh)
    # No stack of residuals: what is kept of a layer is one position a row.
    stack = ARCH.N * 8 * 128 * ARCH.D * 4 // mesh.size
    assert compiled.memory_analysis().output_size_in_bytes < stack // 16


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_cached_decoding_compiles_for_a_tpu(topology):
    mesh, B, T, new = mesh_for(topology), 8, 64, 32
    rows = functools.partial(abstract.struct, mesh=mesh, spec=meshes.BATCH)
    shared = functools.partial(abstract.struct, mesh=mesh, spec=PartitionSpec())
    decoder = decode.apart(whole(ARCH, BF16, meshes.rows_of(mesh)))  # as accelerators decode
    cache = jax.eval_shape(lambda: init_cache(ARCH, decoder.segments, B, T + new, BF16))
    where = meshes.cache_sharding(mesh, B, ARCH.K)
    cache = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), cache)
    key = jax.eval_shape(lambda: jax.random.key(0))
    lowered = decode.generate.lower(
        decoder,
        abstract.params(ARCH, BF16, mesh),
        rows((B, T), jnp.int32),
        rows((B, T), jnp.int32),
        cache,
        None,
        shared((1,), jnp.int32),
        Sampling(),
        jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=NamedSharding(mesh, PartitionSpec())),
        max_new=new,
    )
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    held = sum(a.size * 2 for a in jax.tree.leaves(cache)) // mesh.size
    assert memory.alias_size_in_bytes >= held  # the donated cache is written in place
    assert any("tensor" in axes for _, axes in kinds(compiled.as_text(), mesh))


# ---------------------------------------------------------------- the plan itself


def test_the_plan_is_printed_and_says_what_to_turn(tmp_path):
    shape = tmp_path / "config.json"
    shape.write_text(json.dumps(hardware._llama(256, 64, 96, 4, 4, 2)))

    def run(*flags):
        command = [sys.executable, "-m", "reptune_jax.plan", "--config=configs/scale.py", *flags]
        root = Path(__file__).parents[2]
        return subprocess.run(command, cwd=root, capture_output=True, text=True)

    small = (f"--model-config={shape}", "--config.train.layers=(1,3)", "--tokens=64")
    small += ("--config.loss.layers=(1,3)", "--config.train.batch=8", "--labels=8")
    fits = run("--topology=gpu:4", *small, "--config.train.remat=auto")
    assert fits.returncode == 0, fits.stderr
    for text in (
        "4 x NVIDIA H100",
        "forced CPU devices",
        "remat none",
        "temporaries",
        "all-",
        "steps cost at least ",
        "fits: ",
    ):
        assert text in fits.stdout, fits.stdout
    bad = run("--topology=v9:2x2")
    assert bad.returncode == 1 and "--topology: got 'v9:2x2', expected one of v4, v5e" in bad.stderr
    unknown = run("--topology=gpu:2", "--model-config=llama-9b")
    assert unknown.returncode == 1 and "expected a config.json or one of" in unknown.stderr


def test_a_gpu_has_no_float32_copy_of_the_frozen_weights():
    """As forced CPU devices would, which multiply bfloat16 in float32."""
    arch = families.from_config(hardware._llama(256, 256, 512, 8, 4, 2))
    c = settings(train__batch=1, train__remat="full")
    found = plan.make(c, arch, BF16, meshes.make_mesh(), T=8, L=4, kind="h100")
    assert found.memory["temporaries"] < found.memory["frozen weights"]


def test_advice_names_what_dominates():
    memory = {"frozen weights": 1, "trained weights": 1, "optimizer": 1, "temporaries": 9}
    alone = {"data": 1, "fsdp": 4, "tensor": 1}
    assert any("remat=full" in knob for knob in hardware.advice(memory, alone, "none"))
    assert not any("remat" in knob for knob in hardware.advice(memory, alone, "full"))
    copied = {"data": 4, "fsdp": 1, "tensor": 1}
    weights = memory | {"frozen weights": 90}
    assert any("mesh.fsdp" in knob for knob in hardware.advice(weights, copied, "full"))
    moments = memory | {"optimizer": 90}
    assert any("train.layers" in knob for knob in hardware.advice(moments, alone, "full"))


def test_chips_are_known_by_what_jax_calls_them():
    found = ("TPU v5 lite", "TPU v5p", "TPU v6 lite", "NVIDIA H200", "NVIDIA H100 80GB HBM3")
    names = ["TPU v5e", "TPU v5p", "TPU v6e", "NVIDIA H200 SXM", "NVIDIA H100 SXM"]
    assert [hardware.chip_of(kind).name for kind in found] == names
    assert hardware.chip_of("cpu") is None


HLO = """\
HloModule step

%cond (p: (s32[], f32[8])) -> pred[] {
  %n = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%cond.3 (p: (f32[8], u32[])) -> pred[] {
  %n = u32[]{:T(128)} constant(8)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body.3 (p: (f32[8], u32[])) -> (f32[8], u32[]) {
  %two = u32[]{:T(128)} constant(2)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=1
  %next = u32[]{:T(128)} add(%i, %two)
  %piece = f32[8] collective-permute(%y), channel_id=9, source_target_pairs={{0,1},{1,0}}
}

%body.2 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %ag = bf16[64]{0} all-gather(%x), replica_groups=[2,2]<=[4], dimensions={0}
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %ag = bf16[64,32]{1,0} all-gather(%x), replica_groups={{0,1},{2,3}}, dimensions={0}
}

%branch (p: f32[8]) -> f32[8] {
  %never = f32[1000] all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  %v = (s32[], f32[8]) while(%t), condition=%cond, body=%body.2
  %u = (f32[8], u32[]) while(%t), condition=%cond.3, body=%body.3
  %r = f32[8,4]{1,0} all-reduce(%y), replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add
  %m = f32[8] all-reduce(%y), replica_groups=mesh['axis_0'=2,'axis_1'=2,'axis_2'=1] {'axis_0','axis_2'}, to_apply=%add
  %begin = f32[64]{0} all-gather(%x), channel_id=3, replica_groups=[2,2]<=[4], dimensions={0}
  %end = f32[64]{0} all-gather(%x), channel_id=3, replica_groups=[2,2]<=[4], dimensions={0}
  %s = (f32[8]{0}, f32[32]{0}) all-gather-start(%z), replica_groups=[1,4]<=[4], dimensions={0}
  %c = f32[8] conditional(%q, %a, %b), branch_computations={%branch, %branch}
  %alone = f32[8] all-reduce(%y), replica_groups={{0},{1},{2},{3}}, to_apply=%add
  %swap = f32[8] collective-permute(%y), source_target_pairs={{0,0},{1,2},{2,1},{3,3}}
  %still = f32[8] collective-permute(%y), source_target_pairs={{0,0},{1,1},{2,2},{3,3}}
}
"""  # noqa: E501


def test_collectives_are_weighed_by_how_often_they_run():
    devices = np.array(jax.devices() * 4).reshape(2, 2, 1)
    found = collectives.traffic(HLO, Mesh(devices, meshes.AXES))
    assert found == {
        ("all-gather", "data+fsdp"): (1, 128 * 3 / 4),
        ("all-gather", "fsdp"): (7 + 5 + 1, 7 * 64 * 32 * 2 / 2 + 5 * 64 * 2 / 2 + 64 * 4 / 2),
        ("all-reduce", "data"): (2, 2 * 128 / 2 + 2 * 32 / 2),
        ("collective-permute", "data+fsdp"): (1, 32),
        ("collective-permute", "fsdp"): (4, 4 * 32),
    }
    assert collectives.lines(found, "GiB")[1].split() == ["all-gather", "data+fsdp", "1", "0.00"]
    assert collectives.lines({}) == ["collectives a step: none"]
