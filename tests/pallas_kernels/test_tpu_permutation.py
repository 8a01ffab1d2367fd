"""Rows moved by permutation matrices against rows gathered one by one: equal to the bit."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pallas_kernels import Routing, make_routing, routing, tpu_permutation
from tests.quick import quick_jit

ROWS, WIDTH, VMEM = 16, 256, 1 << 20


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "TPU_LEAST_ROWS", 8)


@functools.cache
def moved(cores: int):
    """(x, slots, expert) -> (routing, x in slot order, slots in token order), by the kernels and by gathers."""

    def run(x, y, expert):
        made = make_routing(expert, row_multiple=32, tile_rows=32)
        kernels = (move(a, made, ROWS, VMEM, True, cores) for move, a in ((tpu_permutation.to_slots, x), (tpu_permutation.to_tokens, y)))
        return made, tuple(kernels), (routing.to_slots(x, made), routing.to_tokens(y, made))

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


@pytest.mark.parametrize("by_slot", [True, False])
def test_wide_rows_are_moved_in_parts(by_slot: bool) -> None:
    x, y = inputs(150, "bfloat16")
    made = make_routing(jnp.arange(150, dtype=jnp.int32) // 3 % 2, row_multiple=32, tile_rows=32)
    half = tpu_permutation.step_bytes(ROWS, WIDTH // 2, 2)
    move, gather, x = (tpu_permutation.to_slots, routing.to_slots, x) if by_slot else (tpu_permutation.to_tokens, routing.to_tokens, y)

    def run(x):
        return move(x, made, ROWS, half, True)

    assert "grid=(2," in str(jax.make_jaxpr(run)(x)).replace(" ", "")
    keep = rows_of_tiles_with_tokens(made) if by_slot else slice(None)
    np.testing.assert_array_equal(quick_jit(run)(x)[keep], gather(x, made)[keep])


@pytest.mark.parametrize(
    ("width", "fit", "cores", "columns"),
    [
        (2048, 2048, 1, 2048),
        (2048, 2048, 2, 1024),
        (128, 2048, 2, 128),
        (4480, 4480, 2, 4480),  # 35 lanes of 128 do not halve
        (4480, 4479, 1, 896),
        (11008, 5504, 2, 5504),
        (11008, 5503, 1, 256),
        (5120, 2560, 1, 2560),
    ],
)
def test_as_many_columns_as_fit_are_moved_at_once(width: int, fit: int, cores: int, columns: int) -> None:
    assert tpu_permutation._columns(width, 256, 2, tpu_permutation.step_bytes(256, fit, 2), cores) == columns


COMPILE = """
import jax.numpy as jnp
from pallas_kernels import make_routing, tpu
from pallas_kernels.aot_tpu import array, compile_for

def run(x, y, ids):
    routing, backend = make_routing(ids, row_multiple=512, tile_rows=0), tpu.Tpu("{generation}")
    return backend.to_slots(x, routing), backend.to_tokens(y, routing)

compile_for("{topology}", run, *(array(n, {width}, dtype=jnp.{dtype}) for n in (1024, 2048)), array(1024, dtype=jnp.int32))
print("compiled")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "width", "dtype"),
    [
        ("v5e:2x2", 4480, "bfloat16"),
        ("v5e:2x2", 5120, "bfloat16"),
        ("v5e:2x2", 18944, "bfloat16"),
        ("v5e:2x2", 2560, "float32"),
        ("v5p:2x2x1", 11008, "bfloat16"),
        ("v6e:2x2", 11008, "float32"),
    ],
)
def test_wide_rows_compile(topology: str, width: int, dtype: str, run_python: Callable[..., str]) -> None:
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install 'monovl_jax[aot]'")
    code = COMPILE.format(topology=topology, generation=topology.split(":")[0], width=width, dtype=dtype)
    assert run_python(code, timeout=600, JAX_PLATFORMS="cpu").split()[-1] == "compiled"


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
