"""The Hopper kernels: values and gradients against the reference, what must not leak, what must not be computed, what compiles.

Run by the interpreter, and on the GPU itself where the default device is a Hopper:
    JAX_PLATFORMS=cuda pytest --slow tests/pallas_kernels/test_gpu.py
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Routing, aot_gpu, gpu, make_routing, routed_linear, routed_swiglu
from pallas_kernels.device import hopper_cores
from pallas_kernels.routing import GPU_ROWS, SMALL
from tests.pallas_kernels import gpu_interpreter
from tests.pallas_kernels.helpers import LAYERS, TOLERANCE, close, make_inputs, masks, same, stack
from tests.quick import quick_jit

WIDTHS = (128, 256)
BIG = (300, *WIDTHS)
MASKS = masks(BIG[0])
BF16 = TOLERANCE["bfloat16"]


@functools.cache
def interpret() -> Any:
    return False if hopper_cores() else gpu_interpreter.parameters(uninitialized_memory="nan")


@pytest.fixture(autouse=True)
def a_clean_interpreter() -> Iterator[None]:
    yield
    gpu_interpreter.reset()


def layer(kind: str, x: jax.Array, weights: Any, routing: Routing, implementation: str) -> jax.Array:
    options = {"interpret": interpret()} if implementation == "pallas_gpu" else {}
    if kind == "swiglu":
        return routed_swiglu(x, weights, routing, implementation, **options)  # type: ignore[arg-type]
    kernels, biases = zip(*weights, strict=True)
    return routed_linear(x, kernels, routing, biases, implementation, **options)  # type: ignore[arg-type]


@functools.cache
def compiled(kind: str, implementation: str = "pallas_gpu") -> Callable:
    """(x, weights, expert, dy) -> (y, (dx, dweights))."""

    def run(x, weights, expert, dy):
        routing = make_routing(expert, row_multiple=GPU_ROWS)
        y, pull = jax.vjp(lambda x, w: layer(kind, x, w, routing, implementation), x, weights)
        return y, pull(dy)

    return quick_jit(run)


def agree(kind: str, mask: str, dtype: str = "bfloat16") -> None:
    x, weights, dy = make_inputs(kind, BIG, dtype)
    expert = MASKS[mask]
    got = compiled(kind)(x, weights, expert, dy)
    close(got, compiled(kind, "reference")(x, weights, expert, dy), BF16)
    assert not np.any(np.asarray(got[0])[expert < 0]) and not np.any(np.asarray(got[1][0])[expert < 0])


@pytest.mark.parametrize("kind", ["linear", pytest.param("swiglu", marks=pytest.mark.slow)])
def test_equals_the_reference(kind: str) -> None:
    agree(kind, "random")


@pytest.mark.slow
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", LAYERS)
def test_equals_the_reference_for_every_mask(kind: str, mask: str) -> None:
    agree(kind, mask)


@pytest.mark.slow
def test_gate_and_up_alone_are_those_that_are_saved() -> None:
    x, weights, _ = make_inputs("swiglu", BIG, "bfloat16")
    experts = tuple(tuple(w.astype(x.dtype) for w in ws) for ws in weights)
    backend = gpu.Gpu(2, interpret())

    def both(x, experts, expert):
        routing = make_routing(expert, row_multiple=GPU_ROWS)
        slots = backend.to_slots(x, routing)
        made = backend.swiglu_fwd(slots, experts, routing)[1:], backend.gate_up(slots, experts, routing)
        return jax.tree.map(lambda a: backend.to_tokens(a, routing), made)

    saved, alone = quick_jit(both)(x, experts, MASKS["random"])
    same(alone, saved)


@pytest.mark.slow
def test_float16_equals_the_reference() -> None:
    agree("linear", "random", "float16")


@pytest.mark.slow
def test_many_tiles_of_every_size_equal_the_reference() -> None:
    """Widths of several column tiles and of several steps, more steps than buffers, and tiles that a program takes over from another."""
    x, weights, dy = make_inputs("swiglu", (520, 384, 640), "bfloat16")
    expert = masks(520)["random"]
    close(compiled("swiglu")(x, weights, expert, dy), compiled("swiglu", "reference")(x, weights, expert, dy), BF16)


# ---- what must not leak --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAYERS)
def test_bad_numbers_stay_where_they_are(kind: str) -> None:
    run, expert = compiled(kind), MASKS["random"]
    x, weights, dy = make_inputs(kind, BIG, "bfloat16")
    y, (dx, dw) = run(x, weights, expert, dy)

    visual = tuple(np.full_like(w, np.nan) for w in weights[1])
    y_bad, (dx_bad, dw_bad) = run(x, (weights[0], visual), expert, dy)
    text = expert == 0
    same((y_bad[text], dx_bad[text], dw_bad[0]), (y[text], dx[text], dw[0]))
    assert not np.any(np.asarray(y_bad)[expert < 0]) and not np.isfinite(np.asarray(y_bad, np.float32)[expert == 1]).any()

    bad = np.asarray(np.nan, x.dtype)
    in_padding = np.where((expert < 0)[:, None], bad, x), np.where((expert < 0)[:, None], bad, dy)
    same(run(in_padding[0], weights, expert, in_padding[1]), (y, (dx, dw)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAYERS)
def test_an_idle_expert_reaches_nothing(kind: str) -> None:
    expert = np.where(np.arange(BIG[0]) < 90, 0, -1).astype(np.int32)
    x, (text, visual), dy = make_inputs(kind, BIG, "bfloat16")
    y, (dx, dw) = compiled(kind)(x, (text, visual), expert, dy)
    y_bad, (dx_bad, dw_bad) = compiled(kind)(x, (text, tuple(np.full_like(w, np.nan) for w in visual)), expert, dy)
    same((y_bad, dx_bad, dw_bad[0]), (y, dx, dw[0]))
    assert not any(np.any(w) for w in dw_bad[1])


@pytest.mark.parametrize("mask", MASKS)
def test_every_tile_with_tokens_is_visited_once_by_its_owner(mask: str) -> None:
    expert = MASKS[mask]
    routing = quick_jit(functools.partial(make_routing, row_multiple=GPU_ROWS))(expert)
    tile, owner, used = (np.asarray(a) for a in gpu._visits(routing))
    visited = list(zip(tile[: used[0]].tolist(), owner.tolist(), strict=False))
    slot = np.asarray(routing.slot)
    assert len(set(visited)) == len(visited)
    assert set(visited) == {(s // GPU_ROWS, e) for s, e in zip(slot.tolist(), expert.tolist(), strict=True) if e >= 0}


# ---- under transformations -----------------------------------------------------------------------------------------------------------


def test_in_scan_and_under_remat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced only: jax.checkpoint takes no effects, which the interpreter's kernels have and real ones have not."""
    monkeypatch.setitem(globals(), "interpret", lambda: False)
    x, expert = make_inputs("swiglu", (140, 128, 128), "bfloat16")[0], MASKS["random"][:140]
    weights = stack(*(make_inputs("swiglu", (140, 128, 128), seed=s)[1] for s in (1, 2)))

    def loss(weights, x, expert):
        routing = make_routing(expert, row_multiple=GPU_ROWS)

        def step(x, w):
            return x + layer("swiglu", x, w, routing, "pallas_gpu"), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(step), x, weights)[0].astype(jnp.float32) ** 2)

    with on_a_hopper():
        jaxpr = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(weights, x, expert))
    assert "remat" in jaxpr and "wgmma" in jaxpr


@pytest.mark.slow
def test_vmap_over_tokens() -> None:
    inputs = [make_inputs("linear", (20, 128, 128), "bfloat16", seed=s) for s in range(2)]
    weights, x = jax.tree.map(jnp.asarray, inputs[0][1]), np.stack([i[0] for i in inputs])

    def run(x, implementation):
        routing = make_routing(jnp.asarray(np.arange(20, dtype=np.int32) % 2), row_multiple=GPU_ROWS)
        return layer("linear", x, weights, routing, implementation)

    want, got = (quick_jit(jax.vmap(functools.partial(run, implementation=i)))(x) for i in ("reference", "pallas_gpu"))
    close(got, want, BF16)


# ---- choice and errors -----------------------------------------------------------------------------------------------------------------


def on_a_hopper():
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("chip",), abstract_device=device))


@pytest.mark.parametrize(("implementation", "kernel"), [("pallas_gpu", True), (None, False)])
def test_a_hopper_runs_the_kernels_by_name_alone(implementation: Any, kernel: bool) -> None:
    x, weights, _ = make_inputs("linear", (SMALL, *WIDTHS), "bfloat16")

    def run(x, weights, expert):
        kernels, biases = zip(*weights, strict=True)
        return routed_linear(x, kernels, make_routing(expert), biases, implementation)

    with on_a_hopper():
        jaxpr = str(jax.make_jaxpr(run)(x, weights, np.zeros(SMALL, np.int32)))
    assert ("wgmma" in jaxpr) == kernel


@pytest.mark.parametrize(
    ("shape", "dtype", "row_multiple", "on_gpu", "message"),
    [
        ((96, *WIDTHS), "bfloat16", 128, False, r"\(96, 128\): this program is traced for 'cpu'; use 'xla'"),
        ((96, 128, 200), "bfloat16", 128, True, r"\(128, 200\) must be multiples of 128; pad the weights"),
        ((96, *WIDTHS), "float32", 128, True, "float32; cast it to bfloat16 or float16"),
        ((96, *WIDTHS), "bfloat16", 64, True, "blocks of 64 rows, not a multiple of 128; give make_routing row_multiple=128"),
    ],
)
def test_a_choice_that_cannot_run(shape: tuple, dtype: str, row_multiple: int, on_gpu: bool, message: str) -> None:
    tokens, d, f = shape

    def run(x, kernel, expert):
        routing = make_routing(expert, row_multiple=row_multiple)
        return routed_linear(x, (kernel, kernel), routing, implementation="pallas_gpu")

    with on_a_hopper() if on_gpu else contextlib.nullcontext(), pytest.raises(ValueError, match=message):
        jax.eval_shape(run, *(jax.ShapeDtypeStruct(s, t) for s, t in (((tokens, d), dtype), ((d, f), dtype), ((tokens,), "int32"))))


def test_slots_with_a_tpus_gaps_are_refused() -> None:
    """The kernels would visit the empty tile, and not the last one."""
    routing = make_routing(jnp.zeros(520, jnp.int32), row_multiple=512, tile_rows=512)
    x, k = jax.ShapeDtypeStruct((520, 128), jnp.bfloat16), jax.ShapeDtypeStruct((128, 128), jnp.bfloat16)
    with on_a_hopper(), pytest.raises(ValueError, match="made for a TPU's tiles of 512 rows; give make_routing tile_rows=0"):
        jax.eval_shape(lambda x, k: routed_linear(x, (k, k), routing, implementation="pallas_gpu"), x, k)


# ---- compiled for a chip nobody has here -----------------------------------------------------------------------------------------------


@pytest.fixture
def compiler() -> dict[str, str]:
    if reason := aot_gpu.missing():
        pytest.skip(reason)
    return aot_gpu.environment()


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [4096, 16384])
def test_an_h100_is_compiled_for(tokens: int, compiler: dict[str, str]) -> None:
    """At the 2B shapes, nothing spilled, all of it within the shared memory of a program. Seven kernels, one more under full remat, three
    more if text were trained."""
    programs = aot_gpu.report(tokens)["programs"]
    assert [p["kernel_calls"] for p in programs.values()] == [2, 7, 8, 3]
    kernels = [k for p in programs.values() for k in p["kernels"]]
    assert {k["kernel"] for k in kernels} == {
        "routed_linear", "routed_linear_dx", "routed_gate_up", "routed_gate_up_saved", "routed_gate_up_again", "routed_gate_up_dh",
        "routed_gate_up_dx", "routed_weight_gradient",
    }  # fmt: skip
    for k in kernels:
        assert k["spill_stores"] == k["spill_loads"] == 0, k
        assert k["registers"] <= 168 and k["shared_memory"] <= 232448, k


FROZEN = """
import re, jax, jax.numpy as jnp
from pallas_kernels import aot_gpu, make_routing, routed_swiglu

def loss(trained, frozen, x, expert):
    routing = make_routing(expert)
    def step(x, w):
        return x + routed_swiglu(x, w, routing, "pallas_gpu"), None
    layers = trained if frozen is None else (frozen, trained)
    return jnp.sum(jax.lax.scan(jax.checkpoint(step), x, layers)[0].astype(jnp.float32))

ffn = tuple(jax.ShapeDtypeStruct((2, *s), jnp.bfloat16) for s in ((128, 256), (128, 256), (256, 128)))
rest = jax.ShapeDtypeStruct((256, 128), jnp.bfloat16), jax.ShapeDtypeStruct((256,), jnp.int32)
for trained, frozen in (((ffn, ffn), None), (ffn, ffn)):
    program = aot_gpu.compile_for_h100(jax.grad(loss), trained, frozen, *rest)
    print("calls", len(re.findall("custom_call_target=.mosaic_gpu", program.as_text())))
"""


@pytest.mark.slow
def test_a_frozen_expert_has_no_weight_gradient_when_compiled(run_python: Callable[..., str], compiler: dict[str, str]) -> None:
    """In a scan over layers under remat: three kernels fewer."""
    names = ("JAX_PLATFORMS", "PATH", "XLA_FLAGS")
    printed = run_python(FROZEN, **{name: compiler[name] for name in names})
    both, one = (int(n) for n in re.findall(r"calls (\d+)", printed))
    assert both - one == 3
