"""Rows moved by permutation matrices against rows gathered one by one: equal to the bit."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pallas_kernels import Routing, make_routing, routing, tpu_permutation
from tests.quick import quick_jit

ROWS, WIDTH = 16, 256


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "TPU_LEAST_ROWS", 8)


@functools.cache
def moved(cores: int):
    """(x, slots, expert) -> (routing, x in slot order, slots in token order), by the kernels and by gathers."""

    def run(x, y, expert):
        made = make_routing(expert, row_multiple=32, tile_rows=32)
        kernels = tpu_permutation.to_slots(x, made, ROWS, True, cores), tpu_permutation.to_tokens(y, made, ROWS, True, cores)
        return made, kernels, (routing.to_slots(x, made), routing.to_tokens(y, made))

    return quick_jit(run)


def rows_of_tiles_with_tokens(made: Routing) -> np.ndarray:
    tokens = np.asarray(made.source).reshape(-1, ROWS) < made.expert.shape[0]
    return np.repeat(tokens.any(1), ROWS)


def check(x, y, expert, cores: int = 1) -> None:
    made, (slots, tokens), (want_slots, want_tokens) = moved(cores)(x, y, expert)
    keep = rows_of_tiles_with_tokens(made)
    bits = {2: np.uint16, 4: np.uint32}[x.dtype.itemsize]
    for got, want in ((np.asarray(slots)[keep], np.asarray(want_slots)[keep]), (np.asarray(tokens), np.asarray(want_tokens))):
        same = got.view(bits) == want.view(bits)
        assert (same | (np.isnan(got.astype(np.float32)) & np.isnan(want.astype(np.float32)))).all()


def inputs(tokens: int, dtype: str, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    slots = jax.eval_shape(lambda: make_routing(jnp.zeros(tokens, jnp.int32), row_multiple=32)).source.shape[0]
    return jnp.asarray(rng.normal(size=(tokens, WIDTH)), dtype), jnp.asarray(rng.normal(size=(slots, WIDTH)), dtype)


@st.composite
def experts(draw) -> np.ndarray:
    """Tokens in runs, none of an expert, or one after the other."""
    tokens = draw(st.sampled_from([7, 150]))
    rng, run = np.random.default_rng(draw(st.integers(0, 2**32 - 1))), draw(st.sampled_from([1, 5, 40]))
    shares = np.asarray(draw(st.tuples(*[st.integers(0, 3)] * 3).filter(any)))
    return np.repeat(rng.choice([-1, 0, 1], tokens, p=shares / shares.sum()), run)[:tokens].astype(np.int32)


@settings(max_examples=25, deadline=None)
@given(experts())
@example(np.full(150, -1, np.int32))
@example(np.zeros(150, np.int32))
@example(np.ones(150, np.int32))
@example(np.arange(150, dtype=np.int32) % 2)
@example(np.repeat(np.int32([0, 1]), [33, 117]))  # 33 tokens in tiles of 16 and 17, the second half of the first being empty
def test_rows_are_those_of_a_gather(expert: np.ndarray) -> None:
    check(*inputs(len(expert), "bfloat16"), expert)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_numbers_that_are_not_finite_stay_in_their_rows(dtype: str) -> None:
    expert = np.random.default_rng(1).integers(-1, 2, 150).astype(np.int32)
    x, y = inputs(150, dtype)
    for array in (x, y):  # several in one column, one alone, and one in a row of padding
        array = array.at[5, 3].set(jnp.nan).at[7, 3].set(jnp.inf).at[8, 3].set(-jnp.inf).at[40, 9].set(jnp.inf)
        array = array.at[int(np.flatnonzero(expert < 0)[0])].set(jnp.nan)
        check(*((array, y) if array.shape == x.shape else (x, array)), expert)


def test_two_cores_move_the_same() -> None:
    check(*inputs(150, "bfloat16"), np.arange(150, dtype=np.int32) // 3 % 2, cores=2)


def test_wide_rows_are_moved_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tpu_permutation, "MOST_COLUMNS", 128)
    x, _ = inputs(150, "bfloat16")
    expert = jnp.arange(150, dtype=jnp.int32) // 3 % 2
    made = make_routing(expert, row_multiple=32, tile_rows=32)

    def move(x):
        return tpu_permutation.to_slots(x, made, ROWS, True)

    assert f"grid=({WIDTH // 128}," in str(jax.make_jaxpr(move)(x)).replace(" ", "")
    keep = rows_of_tiles_with_tokens(made)
    np.testing.assert_array_equal(quick_jit(move)(x)[keep], routing.to_slots(x, made)[keep])


@pytest.mark.parametrize("by_slot", [True, False])
def test_pairs_are_in_the_order_of_what_is_written(by_slot: bool) -> None:
    """Blocks of 4 tokens, tiles of 4 slots; an expert owns whole blocks of 4 slots."""
    expert = jnp.array([0, 0, 0, 1, 1, 1, 0, 1, 1, -1, -1, -1, -1, -1, -1, -1])
    made = make_routing(expert, row_multiple=4)
    found = tpu_permutation.pairs(made, 4, by_slot)
    count = int(found.count)
    got = list(zip(found.block.tolist(), found.tile.tolist(), strict=True))
    # four tokens of text in tile 0, five others in tiles 1 and 2; a block of padding is written as well
    want = [(0, 0), (1, 0), (0, 1), (1, 1), (2, 2)] if by_slot else [(0, 0), (0, 1), (1, 0), (1, 1), (2, 2)]
    assert got[:5] == want and (count == 5 if by_slot else (count, got[5][0]) == (6, 3))
    assert set(got[count:]) <= {got[count - 1]}
