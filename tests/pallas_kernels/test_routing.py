"""The sorted order of tokens: a permutation in blocks, with little padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import checkify

from pallas_kernels import Routing, make_routing
from pallas_kernels import routing as module
from pallas_kernels.routing import BLOCKS, gap
from tests.quick import quick_jit

SIZES = (1, 2, 16, 17, 100, 333)


@functools.cache
def compiled(num_experts: int):
    return quick_jit(functools.partial(make_routing, num_experts=num_experts))


@st.composite
def expert_ids(draw, num_experts: int) -> np.ndarray:
    size = draw(st.sampled_from(SIZES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shares = draw(st.lists(st.integers(0, 5), min_size=num_experts + 1, max_size=num_experts + 1).filter(any))
    ids = rng.choice(np.arange(-1, num_experts), size, p=np.asarray(shares) / sum(shares))
    return (np.sort(ids) if draw(st.booleans()) else ids).astype(np.int32)


def check(ids: np.ndarray, routing: Routing, num_experts: int) -> None:
    """Everything a Routing promises."""
    tokens, rows = len(ids), routing.block_rows
    source, slot, blocks = (np.asarray(a) for a in (routing.source, routing.slot, routing.blocks))
    slots = len(source)
    assert rows == -(-tokens // BLOCKS) and slots == (routing.max_blocks + num_experts - 1) * rows
    np.testing.assert_array_equal(routing.expert, ids)
    np.testing.assert_array_equal(slot == slots, ids == -1)
    owned = np.flatnonzero(ids >= 0)
    np.testing.assert_array_equal(source[slot[owned]], owned)
    assert (source == tokens).sum() == slots - len(owned), "every other slot is empty"
    start = 0
    for e in range(num_experts):
        mine = np.flatnonzero(ids == e)
        np.testing.assert_array_equal(slot[mine], start + np.arange(len(mine)), "in their order, from a block boundary on")
        assert blocks[e] == -(-len(mine) // rows) <= routing.max_blocks <= BLOCKS
        start += blocks[e] * rows
    assert start <= slots


@settings(max_examples=80, deadline=None)
@given(expert_ids(2))
def test_two_experts(ids: np.ndarray) -> None:
    routing = compiled(2)(ids)
    check(ids, routing, 2)
    computed = int(np.sum(routing.blocks)) * routing.block_rows
    owned = int((ids >= 0).sum())
    assert owned <= computed and computed - owned < len(ids) / 8, "rows computed by the experts together, beyond the tokens they own"


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([1, 3]).flatmap(lambda n: st.tuples(st.just(n), expert_ids(n))))
def test_other_numbers_of_experts(case: tuple[int, np.ndarray]) -> None:
    num_experts, ids = case
    check(ids, compiled(num_experts)(ids), num_experts)


def test_the_worst_counts_waste_less_than_an_eighth() -> None:
    """Every split of up to 200 tokens into text, visual and padding, by the arithmetic of the docstring."""
    for size in range(1, 201):
        rows = -(-size // BLOCKS)
        text, visual = np.meshgrid(np.arange(size + 1), np.arange(size + 1))
        waste = -(-text // rows) * rows + -(-visual // rows) * rows - text - visual
        assert waste[text + visual <= size].max() < size / 8


def test_the_order_of_the_docstring() -> None:
    ids = np.full(17, -1, np.int32)  # 17 tokens make blocks of 2 rows
    ids[:8] = [0, 0, 1, 1, 1, -1, 0, -1]
    routing = compiled(2)(ids)
    none, empty = len(routing.source), 17
    assert routing.slot[:8].tolist() == [0, 1, 4, 5, 6, none, 2, none]
    assert routing.source[:10].tolist() == [0, 1, 6, empty, 2, 3, 4, empty, empty, empty]
    assert routing.blocks.tolist() == [2, 2]


def test_every_tile_of_several_is_half_full() -> None:
    for count in range(1, 200):
        empty, more = gap(count, 32)
        slots = [*range(empty), *range(empty + more, count + more)]
        assert len(slots) == count
        tiles = np.bincount(np.array(slots) // 32)
        assert len(tiles) == -(-count // 32), "no tile more"
        assert len(tiles) == 1 or tiles.min() >= 16


def test_an_expert_leaves_half_a_tile_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """33 tokens of the first expert in tiles of 16 and 17 rows, which begin at slots 0 and 32."""
    monkeypatch.setattr(module, "TPU_LEAST_ROWS", 16)
    made = make_routing(jnp.asarray(np.repeat(np.int32([0, 1]), [33, 31])), row_multiple=32, tile_rows=32)
    assert made.slot.tolist() == [*range(16), *range(32, 49), *range(64, 95)] and made.block_rows == 32
    assert made.source[:64].tolist() == [*range(16), *[64] * 16, *range(16, 33), *[64] * 15]
    monkeypatch.setattr(module, "TPU_LEAST_ROWS", 32)
    contiguous = make_routing(made.expert, row_multiple=32, tile_rows=32)
    assert contiguous.slot[:33].tolist() == [*range(33)] and contiguous.tile_rows == 0, "half a tile would be too small a part"


def test_any_shape_and_integer_type_is_flattened() -> None:
    ids = np.random.default_rng(0).integers(-1, 2, (4, 16)).astype(np.int8)
    check(ids.reshape(-1).astype(np.int32), compiled(2)(ids), 2)


def test_a_routing_passes_through_jax_transformations() -> None:
    routing = compiled(3)(np.zeros(17, np.int32))
    again = jax.tree.map(lambda a: a, routing)
    assert again.num_experts == 3 and again.block_rows == routing.block_rows == 2


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.zeros((2, 3), np.float32), "float32; give integers"),
        (np.zeros((2, 0), np.int32), r"no tokens \(shape \(2, 0\)\)"),
        (np.zeros(3, bool), "bool; give integers"),
    ],
)
def test_errors(ids: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_routing(jnp.asarray(ids))


def test_at_least_one_expert() -> None:
    with pytest.raises(ValueError, match="num_experts is 0; give at least 1"):
        make_routing(jnp.zeros(8, jnp.int32), num_experts=0)


@pytest.mark.parametrize("tile_rows", [-256, 1, 96, 300, 1536])
def test_tile_rows_fill_a_block(tile_rows: int) -> None:
    with pytest.raises(ValueError, match=rf"tile_rows is {tile_rows}; give 0, or a power of two that divides the row multiple, 768"):
        make_routing(jnp.zeros(8, jnp.int32), row_multiple=768, tile_rows=tile_rows)


@pytest.mark.parametrize("bad", [-2, 2])
def test_an_unknown_expert_is_an_error_under_checkify(bad: int) -> None:
    ids = np.array([0, 1, -1, 0], np.int32)
    run = jax.jit(checkify.checkify(make_routing))
    run(ids)[0].throw()
    ids[1] = bad
    with pytest.raises(checkify.JaxRuntimeError, match=r"expert ids must lie in -1 to 1; they are -?\d to \d"):
        run(ids)[0].throw()
    routing = compiled(2)(ids)
    assert routing.slot[1] == len(routing.source), "elsewhere the token has no expert"


@pytest.mark.parametrize(
    ("kind", "tokens", "rows", "slots", "tile"),
    [
        ("TPU v6 lite", 1, 128, 256, 0),
        ("TPU v6 lite", 300, 128, 512, 0),
        ("TPU v6 lite", 4096, 1024, 5120, 1024),
        ("TPU v6 lite", 16384, 1024, 17408, 1024),
        ("TPU v6 lite", 65536, 4096, 69632, 1024),
        ("TPU v5 lite", 4096, 512, 4608, 512),
        ("TPU v5p", 4096, 512, 4608, 0),
        ("TPU7x", 4096, 512, 4608, 512),
        ("TPU v9", 4096, 512, 4608, 0),
    ],
)
def test_blocks_on_a_tpu(kind: str, tokens: int, rows: int, slots: int, tile: int) -> None:
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("chip",), abstract_device=device)):
        routing = jax.eval_shape(make_routing, jax.ShapeDtypeStruct((tokens,), jnp.int32))
    assert (routing.block_rows, routing.source.shape[0], routing.tile_rows) == (rows, slots, tile)
