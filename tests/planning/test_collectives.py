"""What is read from optimized HLO: hand-written pieces of it, and a program that the CPU compiler made for eight devices."""

from __future__ import annotations

import json

import pytest

from monovl_jax.planning.collectives import Collective, collectives, group_axes, kernels, replica_groups, runs, shape_bytes, unknown_loops

MESH = {"data": 2, "fsdp": 4, "tensor": 2}

LOOP = """
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[4]{0})->f32[4]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner (p: (s32[], bf16[64,32])) -> (s32[], bf16[64,32]) {
  %piece = bf16[16,32]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.7 = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} all-gather(%piece), replica_groups={{0,2,4,6},{1,3,5,7},{8,10,12,14},{9,11,13,15}}
  %kernel.4 = bf16[64,32]{1,0} custom-call(%all-gather.7), custom_call_target="tpu_custom_call", backend_config={"a":{}}
}

%condition (p: (s32[])) -> pred[] {
  ROOT %less = pred[] compare(%x, %y), direction=LT
}

%odd (p: (s32[])) -> (s32[]) {
  %collective-permute.5 = f32[2]{0} collective-permute(%x), source_target_pairs={{0,8},{8,0}}
}

%outer (p: (s32[], bf16[64,32])) -> (s32[], bf16[64,32]) {
  %while.1 = (s32[], bf16[64,32]{1,0}) while(%init), condition=%condition, body=%inner, backend_config={"known_trip_count":{"n":"24"}}
  %reduce-scatter.2 = f32[16,32]{1,0} reduce-scatter(%g), channel_id=2, replica_groups=[4,4]<=[2,4,2]T(0,2,1), dimensions={0}, to_apply=%add
}

ENTRY %main.9 (p0: f32[4]) -> f32[4] {
  %p0 = f32[4]{0} parameter(0)
  %while.2 = (s32[], /*index=1*/bf16[64,32]) while(%t), condition=%condition, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
  %while.3 = (s32[]) while(%tuple), condition=%condition, body=%odd
  %while.4 = (s32[]) while(%tuple), condition=%condition, body=%add
  %all-reduce.1 = (f32[4]{0}, f32[2,2]{1,0}) all-reduce(%p0, %q), channel_id=3, replica_groups={}, use_global_device_ids=true, to_apply=%add
  ROOT %done = f32[4]{0} get-tuple-element(%all-reduce.1), index=0
}
"""


def test_loops_multiply_and_axes_are_named() -> None:
    """24 layers in 3 micro-batches; ids run data, fsdp, tensor with the last fastest."""
    assert collectives(LOOP, MESH) == [
        Collective("all-gather", "fsdp", 4, 72 * 64 * 32 * 2, 72, False),
        Collective("reduce-scatter", "fsdp", 4, 3 * 4 * 16 * 32 * 4, 3, False),
        Collective("all-reduce", "data+fsdp+tensor", 16, (4 + 4) * 4, 1, False),
        Collective("collective-permute", "data", 2, 8, 1, False),
    ]
    assert kernels(LOOP) == {"kernel": 72}
    assert unknown_loops(LOOP) == 1
    times, _ = runs(LOOP)
    assert (times["main.9"], times["outer"], times["inner"], times["condition"]) == (1, 3, 72, 3 + 72 + 1 + 1)


CHAIN = """
%first (p: bf16[2,8]) -> (bf16[2,8], bf16[8,8]) {
  %all-gather.1 = bf16[8,8]{1,0} all-gather(%p), channel_id=41, replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="0"}
}

%async_collective_fusion.2 (p: bf16[2,8]) -> (bf16[2,8], bf16[8,8]) {
  %all-gather.2 = bf16[8,8]{1,0} all-gather(%p), channel_id=41, replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="0"}
}

%last (p: bf16[2,8]) -> bf16[8,8] {
  %all-gather.3 = bf16[8,8]{1,0} all-gather(%p), channel_id=41, replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="0"}
}

%body (p: (s32[])) -> (s32[]) {
  %async-collective-start.4 = (bf16[2,8], bf16[8,8]) fusion(%p), kind=kCustom, calls=%first
  %fusion.5 = (bf16[2,8], bf16[8,8]) fusion(%p), kind=kOutput, calls=%async_collective_fusion.2
  %async-collective-done.6 = bf16[8,8] fusion(%p), kind=kCustom, calls=%last
  %all-gather.7 = bf16[8,8]{1,0} all-gather(%p), channel_id=1, replica_groups={{0,1,2,3}}, frontend_attributes={async_collective_name="a"}
}

%condition.8 (p: (s32[])) -> pred[] {
  %constant.9 = s32[]{:T(128)} constant(24), backend_config={"flag_configs":[]}
  %p = (s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%i, %constant.9), direction=LT
}

ENTRY %main (p: f32[8,2]) -> f32[8,2] {
  %while.1 = (s32[]{:T(128)}) while(%tuple), condition=%condition.8, body=%body, backend_config={"flag_configs":[]}
}
"""


def test_a_chain_of_fusions_is_one_gather_and_the_condition_tells_the_trips() -> None:
    """As the TPU compiler writes an asynchronous gather, and loops whose trip count only their condition knows."""
    assert unknown_loops(CHAIN) == 0
    assert collectives(CHAIN, {"fsdp": 4}) == [
        Collective("all-gather", "fsdp", 4, 24 * 128, 24, True),
        Collective("all-gather", "fsdp", 4, 24 * 128, 24, False),
    ]


ASYNC = """
%wrapped (p: f32[8,2]) -> f32[8,2] {
  %p = f32[8,2]{1,0} parameter(0)
  ROOT %all-to-all.1 = f32[8,2]{1,0} all-to-all(%p), replica_groups={{0,1}}, dimensions={0}
}

ENTRY %main (p: f32[8,2]) -> f32[8,2] {
  %ag = ((f32[8,2]{1,0}, bf16[4]{0}), (f32[16,2]{1,0}, bf16[8]{0})) all-gather-start(%p, %q), replica_groups={{0,1}}, dimensions={0}
  %ag.done = (f32[16,2]{1,0}, bf16[8]{0}) all-gather-done(%ag)
  %ar = (f32[8,2]{1,0}, f32[3]{0}) all-reduce-start(%p, %r), replica_groups={{0,1}}, to_apply=%add
  %ar.done = (f32[8,2]{1,0}, f32[3]{0}) all-reduce-done(%ar)
  %cp = (f32[8,2]{1,0}, f32[8,2]{1,0}, u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}
  %cp.done = f32[8,2]{1,0} collective-permute-done(%cp)
  %async = ((f32[8,2]{1,0}), f32[8,2]{1,0}, u32[]) async-start(%p), calls=%wrapped
  %async.up = ((f32[8,2]{1,0}), f32[8,2]{1,0}, u32[]) async-update(%async), calls=%wrapped
  ROOT %async.done = f32[8,2]{1,0} async-done(%async.up), calls=%wrapped
}
"""


def test_asynchronous_collectives_are_counted_once() -> None:
    found = {row.kind: row for row in collectives(ASYNC, {"fsdp": 2})}
    assert found["all-gather"] == Collective("all-gather", "fsdp", 2, 16 * 2 * 4 + 8 * 2, 1, True)
    assert found["all-reduce"] == Collective("all-reduce", "fsdp", 2, 64 + 12, 1, True)
    assert found["collective-permute"] == Collective("collective-permute", "fsdp", 2, 64, 1, True)
    assert found["all-to-all"] == Collective("all-to-all", "fsdp", 2, 64, 1, True)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [("(bf16[4,8]{1,0}, f32[])", [64, 4]), ("pred[3]", [3]), ("s8[2,0]", [0]), ("f8e4m3fn[5]", [5]), ("s4[6]", [6]), ("token[]", [])],
)
def test_bytes_of_shapes(text: str, sizes: list[int]) -> None:
    assert shape_bytes(text) == sizes


def test_replica_groups() -> None:
    assert replica_groups("replica_groups=[2,4]<=[8]") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert replica_groups("replica_groups=[4,2]<=[2,4]T(1,0)") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert replica_groups("source_target_pairs={{0,1},{1,2}}") == [[0, 1], [1, 2]]
    assert replica_groups("replica_groups={}") == []
    assert replica_groups("replica_groups=mesh['data'=2,'fsdp'=2,'tensor'=2] {'fsdp'}, dimensions={0}") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert replica_groups("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}, x") == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert group_axes([[0, 8], [1, 9]], MESH) == "data"
    assert group_axes([[0, 1, 8, 9]], MESH) == "data+tensor"
    assert group_axes([], {"data": 1, "fsdp": 4, "tensor": 2}) == "fsdp+tensor"


PROGRAM = """
import json
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from monovl_jax.parallel.mesh import make_mesh
from monovl_jax.planning.collectives import collectives, unknown_loops

mesh = make_mesh(2, 2, 2)

def local(w, x):
    def layer(x, w):
        whole = jax.lax.all_gather(w, "fsdp", axis=0, tiled=True)                # bf16[32, 16] of [16, 16]
        return jax.lax.psum(jnp.tanh(x @ whole.astype(jnp.float32)), "tensor") @ jnp.ones((16, 32)), None
    x, _ = jax.lax.scan(layer, x, w)
    return jax.lax.psum_scatter(x, "data", scatter_dimension=1, tiled=True)      # f32[4, 32] to [4, 16]

f = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P(None, "fsdp"), P()), out_specs=P(None, "data"), check_vma=False))
text = f.lower(jax.ShapeDtypeStruct((5, 32, 16), jnp.bfloat16), jax.ShapeDtypeStruct((4, 32), jnp.float32)).compile().as_text()
print(json.dumps([[r.kind, r.axes, r.size, r.bytes, r.count] for r in collectives(text, dict(mesh.shape))] + [unknown_loops(text)]))
"""


def test_a_program_of_the_cpu_compiler(run_python) -> None:
    """Five layers, each gathering a weight and summing an activation; the CPU compiler widens some bfloat16 to float32."""
    *rows, unknown = json.loads(run_python(PROGRAM, devices=8).splitlines()[-1])
    found = {(kind, axes): (size, total, count) for kind, axes, size, total, count in rows}
    assert unknown == 0
    assert found["all-gather", "fsdp"] in [(2, 5 * 32 * 16 * width, 5) for width in (2, 4)]
    assert found["all-reduce", "tensor"] == (2, 5 * 4 * 16 * 4, 5)
    assert found["reduce-scatter", "data"] == (2, 4 * 32 * 4, 1)
    assert len(found) == 3
