"""The TPU kernels, run by the interpreter: values and gradients against the reference, what must not leak, what must not be computed."""

from __future__ import annotations

import collections
import functools
import importlib.util
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import Routing, api, make_routing, routed_linear, routed_swiglu, routing, tpu
from pallas_kernels.aot_tpu import kernels_of
from pallas_kernels.routing import SMALL, gap
from tests.pallas_kernels.helpers import LAYERS, TOLERANCE, close, make_inputs, masks, same, stack
from tests.quick import quick_jit

WIDTHS = (128, 256)
BIG = (150, *WIDTHS)
MASKS = masks(BIG[0])


SMALL_TILES = (
    (routing, "BLOCKS", 4),
    (routing, "TPU_LEAST_ROWS", 8),
    (tpu, "TPU_ROWS", {"v5e": 32}),
    (tpu, "TPU_LEAST_ROWS", 8),
    (tpu, "MOVE_ROWS", 16),
    (tpu, "COLUMNS", (128,)),
)
"""Tiles of 32 x 128, so that tiny inputs have blocks of several tiles, tiles partly full, and weights of several columns."""


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, value in SMALL_TILES:
        monkeypatch.setattr(module, name, value)


def layer(
    kind: str, x: jax.Array, weights: Any, routing: Routing, implementation: str, interpret: Any = True, recomputed: bool = False
) -> jax.Array:
    interpret = implementation == "pallas_tpu" and interpret
    if kind == "swiglu":
        return routed_swiglu(x, weights, routing, implementation, interpret=interpret, recomputed=recomputed)
    kernels, biases = zip(*weights, strict=True)
    return routed_linear(x, kernels, routing, biases, implementation, interpret=interpret)


@functools.cache
def compiled(kind: str, implementation: str = "pallas_tpu", interpret: Any = True) -> Callable:
    """(x, weights, expert, dy) -> (y, (dx, dweights))."""

    def run(x, weights, expert, dy):
        routing = make_routing(expert, row_multiple=32, tile_rows=32)
        y, pull = jax.vjp(lambda x, w: layer(kind, x, w, routing, implementation, interpret), x, weights)
        return y, pull(dy)

    return quick_jit(run)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", LAYERS)
def test_equals_the_reference(kind: str, dtype: str) -> None:
    x, weights, dy = make_inputs(kind, BIG, dtype)
    for mask, expert in MASKS.items():
        got = compiled(kind)(x, weights, expert, dy)
        try:
            close(got, compiled(kind, "reference")(x, weights, expert, dy), TOLERANCE[dtype])
        except AssertionError as error:
            raise AssertionError(mask) from error
        assert not np.any(np.asarray(got[0])[expert < 0]) and not np.any(np.asarray(got[1][0])[expert < 0]), mask


@st.composite
def routed(draw) -> tuple[tuple[int, int, int], np.ndarray, int]:
    shape = draw(st.sampled_from([(1, *WIDTHS), BIG]))
    seed = draw(st.integers(0, 2**32 - 1))
    shares = np.asarray(draw(st.tuples(*[st.integers(0, 5)] * 3).filter(any)))
    return shape, np.random.default_rng(seed).choice([-1, 0, 1], shape[0], p=shares / shares.sum()).astype(np.int32), seed


@settings(max_examples=20, deadline=None)
@given(routed())
@example(((1, *WIDTHS), np.int32([0]), 0))
@example(((1, *WIDTHS), np.int32([1]), 0))
@example(((1, *WIDTHS), np.int32([-1]), 0))
@pytest.mark.parametrize("kind", LAYERS)
def test_equals_the_reference_for_any_mask(kind: str, case: tuple) -> None:
    shape, expert, seed = case
    x, weights, dy = make_inputs(kind, shape, seed=seed)
    close(compiled(kind)(x, weights, expert, dy), compiled(kind, "reference")(x, weights, expert, dy), 1e-5)


def test_ragged_equals_the_reference() -> None:
    for kind in LAYERS:
        x, weights, dy = make_inputs(kind, BIG)
        got, want = (compiled(kind, i)(x, weights, MASKS["random"], dy) for i in ("ragged", "reference"))
        close(got, want, 1e-5)


# ---- what must not leak --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kind", LAYERS)
def test_bad_numbers_stay_where_they_are(kind: str, bad: float) -> None:
    run, expert = compiled(kind), MASKS["random"]
    x, weights, dy = make_inputs(kind, BIG)
    y, (dx, dw) = run(x, weights, expert, dy)
    for e in (0, 1):
        poisoned = tuple(tuple(np.full_like(w, bad) for w in ws) if i != e else ws for i, ws in enumerate(weights))
        y_bad, (dx_bad, dw_bad) = run(x, poisoned, expert, dy)
        mine = expert == e
        same((y_bad[mine], dx_bad[mine], dw_bad[e]), (y[mine], dx[mine], dw[e]))
        assert not np.any(np.asarray(y_bad)[expert < 0]) and not np.isfinite(y_bad[expert == 1 - e]).any()

    in_padding = np.where((expert < 0)[:, None], np.float32(bad), x), np.where((expert < 0)[:, None], np.float32(bad), dy)
    same(run(in_padding[0], weights, expert, in_padding[1]), (y, (dx, dw)))

    x[np.flatnonzero(expert == 1)[3]] = bad
    y_bad, (dx_bad, dw_bad) = run(x, weights, expert, dy)
    text = expert == 0
    same((y_bad[text], dx_bad[text], dw_bad[0]), (y[text], dx[text], dw[0]))


@pytest.mark.parametrize("kind", LAYERS)
def test_an_idle_expert_reaches_nothing(kind: str) -> None:
    expert = np.where(np.arange(BIG[0]) < 90, 0, -1).astype(np.int32)
    x, (text, visual), dy = make_inputs(kind, BIG)
    y, (dx, dw) = compiled(kind)(x, (text, visual), expert, dy)
    y_bad, (dx_bad, dw_bad) = compiled(kind)(x, (text, tuple(np.full_like(w, np.nan) for w in visual)), expert, dy)
    same((y_bad, dx_bad, dw_bad[0]), (y, dx, dw[0]))
    assert not any(np.any(w) for w in dw_bad[1])


# ---- what each step touches ------------------------------------------------------------------------------------------------------------


def place_of(routing: Routing) -> tpu.Place:
    tiles = np.asarray(routing.blocks) * (routing.block_rows // 32)
    counts = np.asarray(routing.counts).tolist()
    empty, more = zip(*(gap(count, 32) for count in counts), strict=True)
    return tpu.Place((np.cumsum(tiles) - tiles).tolist(), counts, empty, more)


@pytest.mark.parametrize("mask", MASKS)
def test_every_tile_is_computed_by_the_owner_of_its_tokens(mask: str) -> None:
    expert = MASKS[mask]
    routing = quick_jit(functools.partial(make_routing, row_multiple=32, tile_rows=32))(expert)
    place, slots = place_of(routing), np.asarray(routing.slot)
    tiles = range(len(routing.source) // 32)
    for t in tiles:
        for e in (0, 1):
            tokens = np.flatnonzero((slots // 32 == t) & (expert == e))
            assert np.clip(place.valid(e, t, 32), 0, 32) == len(tokens)
    assert place.last(32) == max((t for t in tiles if any(place.valid(e, t, 32) > 0 for e in (0, 1))), default=0)


@pytest.mark.parametrize("kind", LAYERS)
def test_no_block_of_an_idle_expert_but_the_first_is_read(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block of each weight at each step, from the kernel's own index maps."""
    specs: list[Any] = []
    make = pltpu.PrefetchScalarGridSpec

    def remember(**options: Any) -> Any:
        specs.append(options)
        return make(**options)

    monkeypatch.setattr(pltpu, "PrefetchScalarGridSpec", remember)
    x, weights, _ = jax.tree.map(jnp.asarray, make_inputs(kind, BIG, bias=False))
    routing = make_routing(jnp.asarray(MASKS["all_text"]), row_multiple=32, tile_rows=32)
    jax.eval_shape(lambda x: layer(kind, x, weights, routing, "pallas_tpu"), x)
    assert len(specs) == 3, "the layer is one kernel, between two that move rows"
    specs = specs[1:2]
    place = np.concatenate(place_of(routing))
    steps = [(i, j) for i in range(specs[0]["grid"][0]) for j in range(specs[0]["grid"][1])]
    of_weights = [[max(int(b) for b in s.index_map(*at, place)) for at in steps] for s in specs[0]["in_specs"][1:]]
    text, visual = of_weights[: len(of_weights) // 2], of_weights[len(of_weights) // 2 :]
    assert all(set(blocks) == {0} for blocks in visual) and all(set(blocks) == {0, 1} for blocks in text)
    if kind == "linear":
        assert text[0] == sorted(text[0]), "each block is read once"


@pytest.mark.parametrize("generation", ["v5p", "v6e"])
@pytest.mark.parametrize(("kind", "recomputed"), [("linear", False), ("swiglu", False), ("swiglu", True)])
def test_every_generation_computes_the_same(kind: str, recomputed: bool, generation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores, two kernels in place of one, and results that are not read again; without a TPU the other tests take the v5e's."""
    monkeypatch.setattr(api, "tpu_generation", lambda: generation)
    expert = jnp.asarray(MASKS["random"])
    x, weights, dy = make_inputs(kind, BIG)

    def run(x, weights, dy):
        routing = make_routing(expert, row_multiple=32, tile_rows=32)
        y, pull = jax.vjp(lambda x, w: layer(kind, x, w, routing, "pallas_tpu", recomputed=recomputed), x, weights)
        return y, pull(dy)

    close(quick_jit(run)(x, weights, dy), compiled(kind, "reference")(x, weights, expert, dy), 1e-5)


def test_one_buffer_where_two_leave_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "tpu_generation", lambda: "v5p")
    takes = [tpu._reduced_bytes(4, WIDTHS[0], 6, 1, 5, True, buffers, 32, 128) for buffers in (1, 2)]
    monkeypatch.setattr(tpu, "_budget", lambda generation: sum(takes) // 2)
    expert = jnp.asarray(MASKS["random"])
    x, weights, dy = make_inputs("swiglu", BIG)

    def run(x, weights, dy):
        routing = make_routing(expert, row_multiple=32, tile_rows=32)
        y, pull = jax.vjp(lambda x, w: layer("swiglu", x, w, routing, "pallas_tpu"), x, weights)
        return y, pull(dy)

    (kernel,) = (k for k in kernels_of(run, x, weights, dy) if k["name"] == "routed_ffn_dx")
    blocks = kernel["grid_mapping"].block_mappings
    assert [b.pipeline_mode for b in blocks if b.pipeline_mode] == [pl.Buffered(1)] * 2, "dy and dx"
    close(quick_jit(run)(x, weights, dy), compiled("swiglu", "reference")(x, weights, expert, dy), 1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_tiles_of_half_the_rows_compute_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where wider layers leave VMEM for smaller tiles only: the slots that an expert leaves empty are then a whole tile."""
    choose = tpu.Tpu._tiles
    monkeypatch.setattr(tpu.Tpu, "_tiles", lambda *a, **k: (lambda rows, columns, sub: (rows // 2, columns, sub))(*choose(*a, **k)))
    x, weights, dy = make_inputs(kind, BIG)
    expert = np.repeat(np.int32([0, 1, -1]), [35, 70, BIG[0] - 105])
    routing = make_routing(jnp.asarray(expert), row_multiple=32, tile_rows=32)
    assert routing.slot.tolist()[15:17] == [15, 32], "slots 16 to 31 are the tile"

    def run(x, weights, dy):
        y, pull = jax.vjp(lambda x, w: layer(kind, x, w, routing, "pallas_tpu"), x, weights)
        return y, pull(dy)

    close(quick_jit(run)(x, weights, dy), compiled(kind, "reference")(x, weights, expert, dy), 1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_wide_tiles_are_computed_in_a_loop_over_their_columns(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tpu, "COLUMNS", (256, 128))
    monkeypatch.setattr(tpu, "UNROLLED", 1)
    monkeypatch.setattr(tpu, "LEAST_CHUNK", 128)
    x, weights, dy = make_inputs(kind, (40, 256, 256))
    expert = jnp.asarray(MASKS["random"][:40])

    def run(x, weights, dy):
        routing = make_routing(expert, row_multiple=32, tile_rows=32)
        y, pull = jax.vjp(lambda x, w: layer(kind, x, w, routing, "pallas_tpu", recomputed=True), x, weights)
        return y, pull(dy)

    assert "length=2\n" in str(jax.make_jaxpr(run)(x, weights, dy))
    close(quick_jit(run)(x, weights, dy), compiled(kind, "reference")(x, weights, expert, dy), 1e-5)


@pytest.mark.parametrize("tiles", [1, 2, 9, 34])
def test_two_cores_share_the_tiles_at_the_end(tiles: int) -> None:
    assert [tpu._tile_of_step(s, tiles, 1) for s in range(tiles)] == list(range(tiles))[::-1]
    steps = [int(tpu._tile_of_step(s, tiles, 2)) for s in range(tiles)]
    first, second = steps[: (tiles + 1) // 2], steps[(tiles + 1) // 2 :]
    assert sorted(steps) == list(range(tiles)) and first == sorted(first)[::-1] and second == sorted(second)[::-1]
    assert {tile % 2 for tile in first} == {(tiles - 1) % 2} and tiles - 2 not in first


# ---- under transformations ------------------------------------------------------------------------------------------------------------


def deep(kind: str, implementation: str, remat: bool, recomputed: bool = False):
    """(weights stacked over layers, x, expert) -> scalar."""

    def loss(weights, x, expert):
        routing = make_routing(expert, row_multiple=32, tile_rows=32)

        def step(x, w):
            if kind == "linear":
                w = tuple((k[:, : x.shape[1]], b[: x.shape[1]]) for k, b in w)
            return x + layer(kind, x, w, routing, implementation, recomputed=recomputed), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(step) if remat else step, x, weights)[0] ** 2)

    return loss


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize(("kind", "weight_kernels"), [("linear", 1), ("swiglu", 3)])
def test_in_scan_and_a_frozen_expert_has_no_weight_gradient(kind: str, weight_kernels: int, remat: bool) -> None:
    x = make_inputs(kind, (40, *WIDTHS))[0]
    expert = MASKS["random"][:40]
    text, visual = (stack(*(make_inputs(kind, (40, *WIDTHS), seed=s)[1][e] for s in (1, 2))) for e in (0, 1))

    def both(weights, x, expert):
        return jax.value_and_grad(deep(kind, "pallas_tpu", remat))(weights, x, expert)

    def one(visual, text, x, expert):
        return jax.value_and_grad(lambda visual: deep(kind, "pallas_tpu", remat)((text, visual), x, expert))(visual)

    programs = [quick_jit(f).lower(*args).compile() for f, args in ((both, ((text, visual), x, expert)), (one, (visual, text, x, expert)))]
    dots = [len(re.findall(r"\bdot\(", p.as_text())) for p in programs]
    assert dots[0] - dots[1] == 4 * weight_kernels, "a whole tile, its first half, two quarters"
    want_loss, (_, want) = quick_jit(jax.value_and_grad(deep(kind, "reference", False)))((text, visual), x, expert)
    for (loss, grads), pick in zip([programs[0]((text, visual), x, expert), programs[1](visual, text, x, expert)], (1, None), strict=True):
        close((loss, grads if pick is None else grads[pick]), (want_loss, want), 2e-5)


def test_what_is_recomputed_is_not_written_before() -> None:
    """Under full remat the forward pass keeps nothing, and the recomputation makes gate and up alone. The values are the same."""
    x = make_inputs("swiglu", (64, *WIDTHS))[0]
    expert = MASKS["random"][:64]
    text, visual = (stack(*(make_inputs("swiglu", (64, *WIDTHS), seed=s)[1][e] for s in (1, 2))) for e in (0, 1))

    def gradient(visual, text, x, expert, recomputed):
        return jax.grad(lambda visual: deep("swiglu", "pallas_tpu", True, recomputed)((text, visual), x, expert))(visual)

    def kernels(recomputed: bool) -> dict[str, int]:
        found = kernels_of(functools.partial(gradient, recomputed=recomputed), visual, text, x, expert)
        return collections.Counter(k["name"].removeprefix("routed_") for k in found)

    always = {"to_slots": 3, "to_tokens": 2, "ffn_dx": 1, "weight_gradient": 2}
    assert kernels(False) == {**always, "gate_up_saved": 2, "down": 1}
    assert kernels(True) == {**always, "ffn": 1, "gate_up_again": 1}

    got = quick_jit(functools.partial(gradient, recomputed=True))(visual, text, x, expert)
    close(got, quick_jit(jax.grad(deep("swiglu", "reference", False)))((text, visual), x, expert)[1], 2e-5)


def test_vmap_over_tokens_and_over_routings() -> None:
    shape = (20, *WIDTHS)
    inputs = [make_inputs("swiglu", shape, seed=s) for s in range(2)]
    weights, x = inputs[0][1], np.stack([i[0] for i in inputs])
    experts = np.random.default_rng(3).integers(-1, 2, (2, 20)).astype(np.int32)

    def loss(x, weights, expert, implementation):
        return jnp.sum(layer("swiglu", x, weights, make_routing(expert, row_multiple=32, tile_rows=32), implementation) ** 2)

    for axes, expert, transform in (((0, None, None), experts[0], lambda f: f), ((0, None, 0), experts, jax.grad)):
        want, got = (
            quick_jit(jax.vmap(transform(functools.partial(loss, implementation=i)), axes))(x, weights, expert)
            for i in ("reference", "pallas_tpu")
        )
        close(got, want, 1e-5)


IN_SHARD_MAP = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from pallas_kernels import make_routing, routed_swiglu
from tests.pallas_kernels.helpers import close, make_inputs
from tests.quick import quick_jit

mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
x, experts, dy = make_inputs("swiglu", (80, 128, 256))
expert = np.random.default_rng(0).integers(-1, 2, 80).astype(np.int32)
tokens, columns, rows = P("fsdp"), P("fsdp", "tensor"), P("tensor", "fsdp")

def shard(x, expert, *experts):
    # each shard: half of the tokens, gathers a matrix's fsdp axis, keeps half of the inner width
    whole = lambda w, axis: jax.lax.all_gather(w, "fsdp", axis=axis, tiled=True)
    experts = tuple((whole(g, 0), whole(u, 0), whole(d, 1)) for g, u, d in experts)
    y = routed_swiglu(x, experts, make_routing(expert, row_multiple=16), "{implementation}", interpret={interpret})
    return jax.lax.psum(y, "tensor")

sharded = jax.shard_map(shard, mesh=mesh, in_specs=(tokens, tokens, *[(columns, columns, rows)] * 2), out_specs=tokens, check_vma=False)

def loss(visual, x, text, dy):
    return jnp.sum(sharded(x, expert, text, visual) * dy)

def place(ffn):
    return tuple(jax.device_put(w, NamedSharding(mesh, s)) for w, s in zip(ffn, (columns, columns, rows)))

text, visual = map(place, experts)
program = quick_jit(jax.value_and_grad(loss, (0, 1))).lower(visual, x, text, dy).compile()
got = program(visual, x, text, dy)
plain = lambda visual, x: jnp.sum(routed_swiglu(x, (experts[0], visual), make_routing(expert), "reference") * dy)
close(jax.tree.map(np.asarray, got), quick_jit(jax.value_and_grad(plain, (0, 1)))(experts[1], x), 1e-5)
print(program.as_text().count("reduce-scatter("))
"""


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
def test_in_shard_map_with_sharded_weights(implementation: str, run_python: Callable[..., str]) -> None:
    """Weights over fsdp and tensor, tokens over fsdp; the trained expert's three gradients are scattered back."""
    code = IN_SHARD_MAP.format(implementation=implementation, interpret=implementation == "pallas_tpu")
    assert int(run_python(code, devices=4)) == 3


# ---- races -----------------------------------------------------------------------------------------------------------------------------


# Each in a process of its own: the detector remembers what it found.

DETECTOR = "jax._src.pallas.mosaic.interpret.interpret_pallas_call"

KERNELS = f"""
import {DETECTOR} as detector
from tests.pallas_kernels.test_tpu import MASKS, SMALL_TILES, WIDTHS, close, compiled, make_inputs, pltpu

for module, name, value in SMALL_TILES:
    setattr(module, name, value)
interpret = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2, uninitialized_memory="nan")
x, weights, dy = make_inputs("swiglu", (40, *WIDTHS))
expert = MASKS["random"][:40]
got = compiled("swiglu", "pallas_tpu", interpret)(x, weights, expert, dy)
close(got, compiled("swiglu", "reference")(x, weights, expert, dy), 1e-5)
print(detector.races.races_found)
"""

PLANTED = f"""
import jax, jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import {DETECTOR} as detector

def body(x, y):
    y[...] = x[...]

try:
    y = pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        grid=(2,),
        in_specs=[pl.BlockSpec((8, 128), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((8, 128), lambda i: (0, 0)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2),
    )(jnp.ones((16, 128), jnp.float32))
    jax.block_until_ready(y)
    print(detector.races.races_found)
except Exception as error:  # jax 0.12 raises where 0.10 sets the flag
    print("race" in str(error).lower())
"""


@pytest.mark.parametrize(
    ("code", "found"), [pytest.param(KERNELS, "False", marks=pytest.mark.slow), (PLANTED, "True")], ids=["the kernels", "a planted race"]
)
def test_races(code: str, found: str, run_python: Callable[..., str]) -> None:
    pytest.importorskip(DETECTOR, reason="no race detector in this jax")
    assert run_python(code).split()[-1] == found


# ---- choice and errors -------------------------------------------------------------------------------------------------------------------


def on_a_tpu():
    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("chip",), abstract_device=device))


@pytest.mark.parametrize(("tokens", "widths", "kernel"), [(SMALL, WIDTHS, True), (SMALL - 1, WIDTHS, False), (SMALL, (128, 200), False)])
def test_a_tpu_takes_the_kernels_where_they_run(
    tokens: int, widths: tuple[int, int], kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing, "TPU_LEAST_ROWS", 128)
    x, weights, _ = make_inputs("linear", (tokens, *widths))

    def run(x, weights, expert):
        return layer("linear", x, weights, make_routing(expert), None)  # type: ignore[arg-type]

    with on_a_tpu():
        jaxpr = str(jax.make_jaxpr(run)(x, weights, np.zeros(tokens, np.int32)))
    assert ("pallas_call" in jaxpr) == kernel
    assert "pallas_call" not in str(jax.make_jaxpr(run)(x, weights, np.zeros(tokens, np.int32)))


@pytest.mark.parametrize(
    ("shape", "dtype", "row_multiple", "interpret", "message"),
    [
        ((96, *WIDTHS), "float32", 16, False, r"\(96, 128\): this program is traced for 'cpu'; use 'xla'"),
        ((96, 128, 200), "float32", 16, True, r"\(128, 200\) must be multiples of 128; pad the weights"),
        ((96, *WIDTHS), "float16", 16, True, "float16; cast it to bfloat16 or float32"),
        ((96, *WIDTHS), "bfloat16", 8, True, "blocks of 24 rows, not a multiple of 16; give make_routing a row_multiple"),
        (
            (96, 128, 128 * 2**16),
            "bfloat16",
            16,
            True,
            "rows of 8388608 bfloat16 numbers and 2 experts do not fit in VMEM; shard the layer",
        ),
    ],
)
def test_a_choice_that_cannot_run(shape: tuple, dtype: str, row_multiple: int, interpret: bool, message: str) -> None:
    tokens, d, f = shape

    def run(x, kernel, expert):
        routing = make_routing(expert, row_multiple=row_multiple)
        return routed_linear(x, (kernel, kernel), routing, implementation="pallas_tpu", interpret=interpret)

    with pytest.raises(ValueError, match=message):
        jax.eval_shape(run, *(jax.ShapeDtypeStruct(s, t) for s, t in (((tokens, d), dtype), ((d, f), dtype), ((tokens,), "int32"))))


@pytest.mark.parametrize(("kind", "experts"), [("linear", 2), ("swiglu", 2), ("swiglu", 4)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("chip", "generation"), [("TPU v5 lite", "v5e"), ("TPU v5p", "v5p"), ("TPU7x", "tpu7x"), ("TPU v9", "TPU v9")])
def test_the_widest_layer_that_is_taken_has_tiles(
    chip: str, generation: str, dtype: str, kind: str, experts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward. One that is wider is left to XLA, not refused."""
    monkeypatch.undo()
    device = jax.sharding.AbstractDevice(device_kind=chip, num_cores=1, platform="tpu")
    ids = jnp.zeros(512, jnp.int32)

    def run(x, weights):
        y, pull = jax.vjp(lambda x, w: layer(kind, x, w, make_routing(ids, experts), None), x, weights)  # type: ignore[arg-type]
        return y, pull(y)

    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("chip",), abstract_device=device)):
        made = jax.eval_shape(lambda: make_routing(ids, experts))
        fits = [
            128 * n
            for n in range(1, 1000)
            if not tpu.unsupported(generation, made, (128 * n, 256), jnp.dtype(dtype), 3 if kind == "swiglu" else 1)
        ]
        assert 1024 <= fits[-1] == 128 * len(fits) < 128 * 999
        x, k = jax.ShapeDtypeStruct((512, fits[-1]), dtype), jax.ShapeDtypeStruct((fits[-1], 256), dtype)
        weights = [(k, k, jax.ShapeDtypeStruct(k.shape[::-1], dtype)) if kind == "swiglu" else (k, None)] * experts
        assert kernels_of(run, x, weights)


def test_one_expert_for_all_tokens_is_the_plain_layer() -> None:
    x, ffns, _ = jax.tree.map(jnp.asarray, make_inputs("swiglu", (3, 8, 16)))
    _, linears, _ = jax.tree.map(jnp.asarray, make_inputs("linear", (3, 8, 16)))
    kernels, biases = zip(*linears, strict=True)

    def text_of(f: Callable, *args: Any) -> str:
        return re.sub(r"loc\(.*|#loc.*|module @\w+", "", jax.jit(f).lower(*args).as_text())

    for e in (0, 1):
        gate, up, down = ffns[e]
        plain = text_of(lambda x, gate, up, down: (jax.nn.silu(x @ gate) * (x @ up)) @ down, x, gate, up, down)
        assert plain == text_of(
            lambda x, *w, e=e: routed_swiglu(x, [w if i == e else ffns[i] for i in (0, 1)], None, expert=e), x, gate, up, down
        )
        plain = text_of(lambda x, k, b: x @ k + b, x, kernels[e], biases[e])
        assert plain == text_of(
            lambda x, k, b, e=e: routed_linear(
                x, [k if i == e else kernels[i] for i in (0, 1)], None, [b if i == e else biases[i] for i in (0, 1)], expert=e
            ),
            x,
            kernels[e],
            biases[e],
        )


def test_routing_and_expert_exclude_each_other() -> None:
    x, k = jnp.zeros((9, 3)), jnp.zeros((3, 4))
    routing = make_routing(jnp.zeros(9, jnp.int32))
    for given_routing, expert, message in (
        (None, None, "expert is None; name the one expert"),
        (None, 2, "expert is 2; .*0 to 1"),
        (routing, 0, "both a routing and expert 0"),
    ):
        with pytest.raises(ValueError, match=message):
            routed_linear(x, (k, k), given_routing, expert=expert)


# ---- compiled for chips nobody has here --------------------------------------------------------------------------------------------------

BUDGETS = Path(__file__).parents[2] / "experiments" / "results" / "kernels"


def needs_libtpu() -> None:
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install 'monovl_jax[aot]'")


def slower(cycles: dict[str, float], budget: dict[str, float]) -> list[str]:
    """The kernels that take 2% more than the budget, or are not in it."""
    return [kernel for kernel in cycles.keys() | budget.keys() if cycles.get(kernel, math.inf) > 1.02 * budget.get(kernel, 0)]


def test_a_slower_kernel_is_found() -> None:
    budget = {"routed_ffn_dx": 1000.0, "routed_weight_gradient": 500.0}
    assert not slower({"routed_ffn_dx": 1019.0, "routed_weight_gradient": 400.0}, budget)
    assert slower({"routed_ffn_dx": 1021.0, "routed_weight_gradient": 500.0}, budget) == ["routed_ffn_dx"]
    assert slower({"routed_ffn_dx": 1000.0}, budget) == ["routed_weight_gradient"]
    assert slower({**budget, "routed_copy": 1.0}, budget) == ["routed_copy"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["forward", "forward, gate and up saved", "gate and up again", "backward, text frozen"])
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_no_more_cycles_than_before(topology: str, case: str, run_python: Callable[..., str]) -> None:
    """The compiler's estimate of each kernel, against the committed table."""
    needs_libtpu()
    path = BUDGETS / f"{topology.split(':')[0]}_4096.json"
    if not path.exists():
        pytest.skip(f"{path.name} is not there: python -m pallas_kernels.benchmark --static {topology} --out {path}")
    table = json.loads(path.read_text("utf-8"))["cycles"][case]
    if isinstance(table, str):
        pytest.skip(f"{path.name} has no figure for it: {table[:60]}")
    size = (4096, 2048, 8192)
    code = f"""
import json
from pallas_kernels.aot_tpu import bounded, profile
cycles = profile({topology!r}, {case!r}, *{size})
print(json.dumps(bounded({topology!r}, {case!r}, cycles, *{size})))
"""  # all of it in a process of its own, where tiles are as large as users have them; minutes, beside other tests
    cycles = json.loads(run_python(code, timeout=1200, JAX_PLATFORMS="cpu").splitlines()[-1])
    assert not slower(cycles, table)


COMPILE = """
import re, jax, jax.numpy as jnp
from pallas_kernels import make_routing, routed_swiglu
from pallas_kernels.aot_tpu import compile_for

def train(x, text, visual, expert, dy):
    y, pull = jax.vjp(lambda x, visual: routed_swiglu(x, (text, visual), make_routing(expert), "pallas_tpu"), x, visual)
    return y, pull(dy)

x = jax.ShapeDtypeStruct(({tokens}, 2048), jnp.bfloat16)
up, down = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((2048, 8192), (8192, 2048)))
ffn = (up, up, down)
program = compile_for("{topology}", train, x, ffn, ffn, jax.ShapeDtypeStruct(({tokens},), jnp.int32), x)
print(program.memory_analysis().temp_size_in_bytes)
names = re.findall(r"%(\\S+) = .*custom_call_target=.tpu_custom_call", program.as_text())
print(len(names), sum("weight_gradient" in name for name in names))
"""


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [4096, 16384])
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_compiles_for(topology: str, tokens: int, run_python: Callable[..., str]) -> None:
    """Forward and backward with the text expert frozen, at the 2B shapes: five kernels, two of them weight gradients, and four moves."""
    needs_libtpu()
    temporaries, kernels = (
        run_python(COMPILE.format(topology=topology, tokens=tokens), timeout=1200, JAX_PLATFORMS="cpu").strip().splitlines()[-2:]
    )
    assert kernels == "9 2"
    assert int(temporaries) < 2**31


ONE_BUFFER = """
import jax, jax.numpy as jnp
from pallas_kernels import make_routing, tpu
from pallas_kernels.aot_tpu import array, compile_for, kernels_of

def run(x, hidden, experts, ids):
    return tpu.Tpu("v5p").swiglu_bwd(x, hidden, hidden, x, experts, make_routing(ids, row_multiple=512, tile_rows=0))[0]

weights = (array(4096, 1024), array(4096, 1024), array(1024, 4096))
args = (array(2048, 4096), array(2048, 1024), (weights, weights), array(1024, dtype=jnp.int32))
(kernel,) = kernels_of(run, *args)
print(sum(b.pipeline_mode is not None for b in kernel["grid_mapping"].block_mappings))
compile_for("v5p:2x2x1", run, *args)
"""


@pytest.mark.slow
def test_one_buffer_compiles_for_a_wide_layer(run_python: Callable[..., str]) -> None:
    """Of a 7B model on a v5p."""
    needs_libtpu()
    assert run_python(ONE_BUFFER, timeout=1200, JAX_PLATFORMS="cpu").split()[-1] == "2"
