"""Rows between token order and slot order on a TPU, as products with blocks of a permutation matrix.

XLA moves one row after the other, at a third of the memory's speed. Here a grid step moves the rows that a block of tokens and a tile of
slots have in common, with a matrix of zeros and ones: exact, as a row of the result is one row of the operand. Only these rows are
written, so no number of another row, not even NaN, reaches what other steps wrote. Tokens keep their order within an expert, so those
pairs of a block and a tile are few: each expert's run through both from the start to the end.

    expert   t t t v v v | v t t v . t       blocks of 6 tokens
    slots    t t t t t t | v v v v v -       tiles of 6: pairs (block, tile) are (0, 0) (1, 0) of the text, (0, 1) (1, 1) of the others
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.routing import LINE, Routing, before, gap

f32 = jnp.float32

LANES = 128
LEAST_LIMIT = 16 << 20
"""Bytes of VMEM that any generation gives a kernel unasked."""

Estimate = tuple[int, int] | None
"""How many pairs there are, and how many blocks or tiles are read for them, in a program compiled for the estimate of its cycles alone,
which takes what is known at run time for 0."""


class Pairs(NamedTuple):
    """The pairs of a block of tokens and a tile of slots with rows in common, in the order of the side that is written.

    block, tile: int32[L], of which the first `count` are pairs, and the others repeat the last.
    """

    block: jax.Array
    tile: jax.Array

    @property
    def count(self) -> jax.Array:
        other = (self.block[1:] != self.block[:-1]) | (self.tile[1:] != self.tile[:-1])
        return 1 + jnp.sum(other, dtype=jnp.int32)


def pairs(routing: Routing, rows: int, by_slot: bool) -> Pairs:
    """The pairs of blocks and tiles of so many rows, a divisor of the rows of `routing.gap`. Every block of tokens has one at least, where
    they are ordered by token."""
    experts, tokens = routing.num_experts, routing.expert.shape[0]
    blocks, line = pl.cdiv(tokens, rows), math.gcd(rows, LINE)
    e, b = jnp.arange(experts)[:, None], jnp.arange(blocks)
    owner = jnp.pad(routing.expert, (0, blocks * rows - tokens), constant_values=-1).reshape(-1, line)
    per_line = jnp.sum(owner == e[:, :, None], axis=2, dtype=jnp.int32)
    of_block = jnp.arange(blocks * rows // line) // (rows // line) == b[:, None]
    counts = jnp.sum(jnp.where(of_block, per_line[:, None, :], 0), axis=2)  # [experts, blocks]
    start = routing.first_slot[:, None] + before(counts)  # as if no expert left a gap
    first, tiles = start // rows, jnp.where(counts > 0, (start % rows + counts + rows - 1) // rows, 0)
    if not by_slot:
        tiles = jnp.where((e == 0) & (jnp.sum(tiles, axis=0) == 0), 1, tiles)
    place = e * blocks + b if by_slot else b * experts + e
    own = place[:, :, None, None]
    ahead, later = (jnp.sum(jnp.where(there, tiles, 0), axis=(2, 3)) for there in (place < own, place > own))
    step = jnp.arange(experts * (blocks + 1) + pl.cdiv(tokens, rows), dtype=jnp.int32)
    ahead, later, tiles, first = (a[:, :, None] for a in (ahead, later, tiles, first))
    mine = (tiles > 0) & (ahead <= step) & ((step < ahead + tiles) | (later == 0))  # [experts, blocks, steps]
    tile = first + jnp.minimum(step - ahead, tiles - 1)
    empty, more = gap(routing.counts, routing.tile_rows)
    tile = tile + jnp.where(tile >= ((routing.first_slot + empty) // rows)[:, None, None], (more // rows)[:, None, None], 0)
    tile = jnp.minimum(tile, routing.source.shape[0] // rows - 1)
    return Pairs(*(jnp.sum(jnp.where(mine, a, 0), axis=(0, 1), dtype=jnp.int32) for a in (b[:, None], tile)))


def to_slots(
    x: jax.Array, routing: Routing, rows: int, vmem: int, interpret: Any = False, cores: int = 1, estimate: Estimate = None
) -> jax.Array:
    """[N, D] tokens -> [S, D] slots. Empty slots of a tile with tokens are zero, those of other tiles are left as they are in memory.

    rows: of a tile and of a block of tokens. vmem: bytes that a step may take; wider rows are moved in parts. cores: of the chip; two
    halve the columns.
    """
    return _move(x, routing, rows, routing.source.shape[0], True, vmem, interpret, cores, estimate)


def to_tokens(
    x: jax.Array, routing: Routing, rows: int, vmem: int, interpret: Any = False, cores: int = 1, estimate: Estimate = None
) -> jax.Array:
    """[S, D] slots -> [N, D] tokens; padding tokens are zero. Arguments as of `to_slots`."""
    return _move(x, routing, rows, routing.expert.shape[0], False, vmem, interpret, cores, estimate)


def step_bytes(rows: int, columns: int, itemsize: int) -> int:
    """What a step takes in VMEM, as found by compiling: two buffers of each side, and what is computed on."""
    return rows * columns * (4 * itemsize + 12)


def _columns(width: int, rows: int, itemsize: int, vmem: int, cores: int) -> int:
    """How many columns are moved at once: the most that divide a row and fit."""
    pieces = width // LANES
    shared = math.gcd(pieces, cores)
    return next(width // n for n in range(shared, pieces + 1, shared) if pieces % n == 0 and step_bytes(rows, width // n, itemsize) <= vmem)


def _move(
    x: jax.Array, routing: Routing, rows: int, results: int, by_slot: bool, vmem: int, interpret: Any, cores: int, estimate: Estimate
) -> jax.Array:
    tokens, width = routing.expert.shape[0], x.shape[1]
    found = pairs(routing, rows, by_slot)
    blocks, tiles = pl.cdiv(tokens, rows), routing.source.shape[0] // rows
    slot = jnp.pad(routing.slot, (0, blocks * rows - tokens), constant_values=-1).reshape(blocks, 1, rows)
    if x.shape[0] < rows:
        x = jnp.pad(x, ((0, rows - x.shape[0]), (0, 0)))
    columns = _columns(width, rows, x.dtype.itemsize, vmem, cores)
    takes = step_bytes(rows, columns, x.dtype.itemsize) * 9 // 8
    steps, fetches = estimate or (found.block.shape[0], found.block.shape[0])

    def read(step, place):
        return place[step] if estimate is None else step * (1024 * fetches // steps) >> 10

    def written(step, place, count):
        return place[step] if estimate is None else step * (1024 * count // steps) >> 10

    def block_of(step, block):
        return read(step, block) if by_slot else written(step, block, blocks)

    def tile_of(step, tile):
        return written(step, tile, tiles) if by_slot else read(step, tile)

    def body(block, tile, slot, x, y):
        step = pl.program_id(1)
        new_block, new_tile = (
            (step == 0) | (of(step, place) != of(jnp.maximum(step - 1, 0), place)) for of, place in ((block_of, block), (tile_of, tile))
        )
        first = new_tile if by_slot else new_block  # of those that write their tile or block

        @pl.when(new_block | new_tile if estimate is None else step < steps)
        def _():
            wanted = slot[0] - tile_of(step, tile) * rows  # [1, tokens], the slot of each in this tile
            shared = wanted == jax.lax.broadcasted_iota(jnp.int32, (rows, rows), 0)  # [slots, tokens]
            if by_slot:
                mine = jnp.max(jnp.where(shared, 1.0, 0.0), axis=1, keepdims=True) > 0  # [rows of y, 1], those that this pair writes
            else:
                wanted = jnp.broadcast_to(wanted, (8, rows)).T[:, :1]
                mine = (wanted >= 0) & (wanted < rows)
            move = partial(_choose, shared.astype(x.dtype), by_slot)
            moved = move(x[...])
            y[...] = jnp.where(mine, moved, jnp.where(first, 0, y[...]))
            # a number that is not finite makes its column NaN in all rows but its own
            bad = jnp.max(jnp.where(jnp.abs(moved[:8].astype(f32)) < jnp.inf, 0.0, 1.0)) > 0

            @pl.when(bad)
            def _():
                y[...] = jnp.where(mine, _with_care(move, x[...]), y[...])

    shape = (max(results, rows), width)
    if not interpret:
        found, slot, x = jax.tree.map(lambda a: pltpu.with_memory_space_constraint(a, pltpu.HBM), (found, slot, x))
    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(shape, x.dtype) if interpret else pltpu.HBM(shape, x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(width // columns, steps),
            in_specs=[
                pl.BlockSpec((1, 1, rows), lambda c, s, block, tile: (block_of(s, block), 0, 0)),
                pl.BlockSpec((rows, columns), lambda c, s, block, tile: (block_of(s, block) if by_slot else tile_of(s, tile), c)),
            ],
            out_specs=pl.BlockSpec((rows, columns), lambda c, s, block, tile: (tile_of(s, tile) if by_slot else block_of(s, block), c)),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=takes if takes > LEAST_LIMIT else None
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * steps * rows * rows * width, transcendentals=0, bytes_accessed=(fetches * rows + results) * width * x.dtype.itemsize
        ),
        name="routed_to_slots" if by_slot else "routed_to_tokens",
        interpret=interpret,
    )(*found, slot, x)[:results]


def _choose(here: jax.Array, by_slot: bool, x: jax.Array) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == f32 else None
    contracted = (((1 if by_slot else 0,), (0,)), ((), ()))
    return jax.lax.dot_general(here, x, contracted, precision=precision, preferred_element_type=f32).astype(x.dtype)


def _with_care(move: Any, x: jax.Array) -> jax.Array:
    """`move(x)` where x has numbers that are not finite: they are moved as the codes 1, 2 and 3."""
    wide = x.astype(f32)
    finite = jnp.abs(wide) < jnp.inf
    code = jnp.where(finite, 0.0, jnp.where(wide > 0, 2.0, jnp.where(wide < 0, 3.0, 1.0)))
    code = move(code.astype(x.dtype)).astype(f32)
    moved = move(jnp.where(finite, wide, 0.0).astype(x.dtype)).astype(f32)
    odd = jnp.where(code == 1, jnp.nan, jnp.where(code == 2, jnp.inf, -jnp.inf))
    return jnp.where(code == 0, moved, odd).astype(x.dtype)
