"""Routed layers as grouped matmuls in Pallas Mosaic TPU kernels. docs/kernels.md draws the token order, the tiles and the grid.

A kernel visits the row tiles in slot order, up or down, one expert after the other; a tile has one owner. Experts are separate operands:
a step multiplies by the weights of its tile's owner, while the other expert's block stays where it is. An expert without tokens keeps its
first block for the whole kernel, so no other block of it is read. In a tile that is only partly filled, sub-blocks without tokens are not
computed. Weight gradients walk the tiles of one expert, in a kernel of their own.

Products are accumulated in float32; every tile is added in the same order in every run. A third expert costs its blocks in VMEM and a
branch in the kernel body, both of which follow from the length of the tuples.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_permutation
from pallas_kernels.routing import TPU_LEAST_ROWS, TPU_ROWS, Routing, gap
from pallas_kernels.tpu_permutation import LANES
from pallas_kernels.vjp import Experts, Kernels

COLUMNS = (2048, 1024, 512, 256, 128)
MOST_COLUMNS, WIDE, NARROW = 1024, 2048, 512
"""The most columns of a block; WIDE in a weight gradient, whose left operand is read again for each block of the right one's columns;
NARROW where a step multiplies by three matrices, whose code takes twice as long to compile for a gain of 0.6% (v5e) to 2% (v6e)."""

UNROLLED, LEAST_CHUNK = 1 << 31, 256
"""Multiplications that a grouped matmul writes out; larger tiles are a loop over their columns, so many at least in a turn. On a v6e the
code of a tile of twice as many takes a third of the time to compile so, and 2% longer to run; turns of 256 columns take 4% longer."""

MOVE_ROWS = 256
"""Rows that `tpu_permutation` moves at once: a multiple of TPU_LEAST_ROWS, so that every sub-block with a token is filled up with zeros."""

VMEM = {"v5e": 116 << 20, "v5p": 58 << 20, "v6e": 116 << 20, "tpu7x": 58 << 20}
"""Bytes of VMEM for a kernel's blocks and the compiler's temporaries; 32 MiB on other generations. A tenth of the memory is XLA's."""

TWO_CORES = ("v5p",)
"""Generations whose chips share the parallel dimensions of a grid between two cores."""

READ_AGAIN = ("v5e", "v5p")
"""Generations whose estimate of cycles aborts where a product takes what was just packed: they read it from memory. A v6e loses 2% so."""

ONE_BUFFER = ("v5p",)
"""Generations where what a row tile reads or writes once has one buffer in place of two if that leaves room for wider blocks of weights,
as in `routed_ffn_dx` of 4096 -> 11008. A tile then waits for it, which the estimate counts: of 2048 -> 8192 in half the VMEM,
`routed_ffn_dx` of a v5p gained 9% by blocks twice as wide, and `routed_ffn` of a v6e would have lost 5%."""

TWO_KERNELS = ("v5p",)
"""Generations where SwiGLU is faster as two kernels, as where gate and up are saved: VMEM holds but narrow blocks of all three matrices."""

ZEROED = ("v6e",)
"""Generations that zero the sum of `routed_ffn_dx` at first: to choose 0 in its place is 1.4% slower on a v6e, and faster in all other
kernels and on the others."""

f32 = jnp.float32


def _vmem(generation: str) -> int:
    return VMEM.get(generation, 32 << 20)


def _budget(generation: str) -> int:
    """What blocks may take of it; the rest is for the compiler's temporaries."""
    return _vmem(generation) * 7 // 8


def unsupported(
    generation: str, routing: Routing, widths: Sequence[int], dtype: Any, matrices: int = 1, interpret: bool = False
) -> str | None:
    """Why the kernels of a layer, forward or backward, cannot run on these widths and this dtype, with the mend; None where they can.

    matrices: of each expert, 1 [K, M] of a linear layer or 3 of SwiGLU. widths: (K, M), or (D, F).
    """
    rows, size = routing.block_rows, jnp.dtype(dtype).itemsize
    least = 32 // size if interpret else LANES  # rows lie along the lanes where tiles are transposed
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"x has dtype {jnp.dtype(dtype).name}; cast it to bfloat16 or float32"
    if any(width % LANES for width in widths):
        return f"the widths {tuple(widths)} must be multiples of {LANES}; pad the weights"
    if rows % least:
        return f"the routing has blocks of {rows} rows, not a multiple of {least}; give make_routing a row_multiple"
    tile, experts = {"rows": TPU_LEAST_ROWS, "columns": LANES}, routing.num_experts
    whole = widths if matrices == 1 else widths[:1]  # rows so wide are never split; F is walked in blocks
    takes = [_grouped_bytes(size, k, experts, 1, **tile) for k in whole]
    if matrices == 3:
        takes.append(_grouped_bytes(size, whole[0], 2 * experts, 3, **tile))
        takes.append(_reduced_bytes(size, whole[0], 3 * experts, 1, 5, True, 1 if generation in ONE_BUFFER else 2, **tile))
    if max(takes) > _budget(generation):
        return (
            f"rows of {max(whole)} {jnp.dtype(dtype).name} numbers and {experts} experts do not fit in VMEM; shard the layer, or use 'xla'"
        )
    return None


def _grouped_bytes(size: int, k: int, matrices: int, outputs: int, rows: int, columns: int) -> int:
    """What a step of `_grouped` takes in VMEM, with blocks of so many matrices. size: of a number, in bytes.

    The compiler keeps a third copy of the row tile, and results in float32.
    """
    return size * (2 * matrices * k * columns + 3 * rows * k + 2 * outputs * rows * columns) + 6 * outputs * rows * columns


def _reduced_bytes(
    size: int, width: int, matrices: int, wide: int, narrow: int, transposed: bool, buffers: int, rows: int, columns: int
) -> int:
    """What a step of `_reduced` takes in VMEM, with so many wide and narrow tiles, and buffers for what a row tile moves once."""
    once = rows * width * (buffers * (wide + 1) + wide * transposed)
    return size * (2 * columns * (matrices * width + narrow * rows) + once) + 4 * rows * (width + 3 * columns * bool(wide))


class Place(NamedTuple):
    """Where the experts' tokens are, per expert: the first tile, the number of tokens, and of the expert's slots where the empty ones begin
    and how many they are (`routing.gap`). Scalars, in a kernel and around it."""

    first: Sequence[Any]
    count: Sequence[Any]
    empty: Sequence[Any]
    more: Sequence[Any]

    def valid(self, e: int, tile: Any, rows: int) -> Any:
        """How many rows from the start of a tile on belong to expert e: none where it is 0 or less, or before the expert's first tile."""
        slot = (tile - self.first[e]) * rows
        rest = jnp.where(slot < self.empty[e] + self.more[e], self.empty[e], self.end(e)) - slot
        return jnp.where(tile >= self.first[e], rest, 0)

    def end(self, e: int) -> Any:
        """How many slots of the expert there are up to its last token."""
        return self.count[e] + self.more[e]

    def tiles(self, e: int, rows: int) -> Any:
        return (self.end(e) + rows - 1) // rows

    def last(self, rows: int) -> Any:
        """The last tile with tokens; idle steps read it again, but write their own: cores share the tiles."""
        last = jnp.int32(0)
        for e in range(len(self.first)):
            last = jnp.where(self.count[e] > 0, self.first[e] + self.tiles(e, rows) - 1, last)
        return last


@dataclasses.dataclass(frozen=True)
class Tpu:
    """The backend of `vjp`.

    generation: 'v5e', 'v5p', 'v6e', 'tpu7x' or another TPU; chooses the tiles.
    interpret: False compiles; True or pltpu.InterpretParams runs the kernels on a CPU, for tests.
    counts: the tokens of each expert, where a program is compiled for one given routing: the benchmark's estimate of cycles.
    moves: of that routing, the `tpu_permutation.Estimate` into slot order, and back.
    """

    generation: str = "v5e"
    interpret: Any = False
    counts: tuple[int, ...] | None = None
    moves: tuple[tpu_permutation.Estimate, tpu_permutation.Estimate] = (None, None)

    def to_slots(self, x: jax.Array, routing: Routing) -> jax.Array:
        return self._move(tpu_permutation.to_slots, x, routing, self.moves[0])

    def to_tokens(self, x: jax.Array, routing: Routing) -> jax.Array:
        return self._move(tpu_permutation.to_tokens, x, routing, self.moves[1])

    def _move(self, move: Callable[..., jax.Array], x: jax.Array, routing: Routing, estimate: tpu_permutation.Estimate) -> jax.Array:
        return move(x, routing, self.move_rows(routing), _budget(self.generation), self.interpret, self._cores, estimate)

    def linear(self, x: jax.Array, kernels: Kernels, routing: Routing) -> jax.Array:
        return self._grouped("linear", _matmul, routing, x, tuple((k,) for k in kernels))[0]

    def linear_bwd(self, x: jax.Array, dy: jax.Array, kernels: Kernels, routing: Routing) -> tuple[jax.Array, Kernels]:
        (dx,) = self._grouped("linear_dx", _matmul_t, routing, dy, tuple((k,) for k in kernels), transposed=True)
        return dx, tuple(self._weight_gradients((x,), dy, routing, e, rows_first=True)[0] for e in range(len(kernels)))

    def swiglu(self, x: jax.Array, experts: Experts, routing: Routing) -> jax.Array:
        if self.generation in TWO_KERNELS:
            (h,) = self._grouped("gate_up", _hidden_of, routing, x, tuple((gate, up) for gate, up, _ in experts))
            return self._down(h, experts, routing)
        return self._reduced("ffn", _hidden, _times_last, routing, (x,), (), experts, (1, 1, 0), x.shape[1])[0]

    def swiglu_fwd(self, x: jax.Array, experts: Experts, routing: Routing) -> tuple[jax.Array, jax.Array, jax.Array]:
        weights = tuple((gate, up) for gate, up, _ in experts)
        h, g, u = self._grouped("gate_up_saved", _gate_up, routing, x, weights, outputs=3)
        return self._down(h, experts, routing), g, u

    def gate_up(self, x: jax.Array, experts: Experts, routing: Routing) -> tuple[jax.Array, jax.Array]:
        weights = tuple((gate, up) for gate, up, _ in experts)
        return self._grouped("gate_up_again", _gate_and_up, routing, x, weights, outputs=2)  # type: ignore[return-value]

    def _down(self, h: jax.Array, experts: Experts, routing: Routing) -> jax.Array:
        weights = tuple((down,) for _, _, down in experts)
        return self._reduced("down", _as_it_is, _times_last, routing, (), (h,), weights, (0,), experts[0][2].shape[1])[0]

    def swiglu_bwd(
        self, x: jax.Array, g: jax.Array, u: jax.Array, dy: jax.Array, experts: Experts, routing: Routing
    ) -> tuple[jax.Array, Experts]:
        # h, dgate and dup are [F, S]: so every weight gradient is a product of untransposed tiles
        dx, h, dg, du = self._reduced(
            "ffn_dx", _hidden_bwd, _gate_up_dx, routing, (dy,), (g, u), experts, (1, 1, 0), x.shape[1], outputs=3, transposed=True
        )
        gradients = []
        for e in range(len(experts)):
            dgate, dup = self._weight_gradients((dg, du), x, routing, e, transposed=True)
            gradients.append((dgate, dup, self._weight_gradients((h,), dy, routing, e)[0]))
        return dx, tuple(gradients)

    # -- the three kernels ---------------------------------------------------------------------------------------------------------

    def _grouped(
        self,
        name: str,
        compute: Callable[..., tuple[jax.Array, ...]],
        routing: Routing,
        x: jax.Array,
        weights: tuple[tuple[jax.Array, ...], ...],
        outputs: int = 1,
        transposed: bool = False,
    ) -> tuple[jax.Array, ...]:
        """`compute(row tile, the owner's weight blocks) -> output tiles`, for every tile, one block of columns after the other.

        x: [S, K], read as whole rows. weights: [K, M] of each expert, or [M, K] if transposed. Outputs: [S, M]. A block of weights stays
        for all tiles. Rows of sub-blocks that hold no token are left as they are in memory.
        """
        experts, per_expert = len(weights), len(weights[0])
        k, m = weights[0][0].shape[::-1] if transposed else weights[0][0].shape
        rows, columns, sub = self._tiles(routing, m, partial(_grouped_bytes, x.dtype.itemsize, k, experts * per_expert, outputs))
        tiles, steps = x.shape[0] // rows, m // columns
        chunk = next(c for c in COLUMNS if c <= columns and (c <= LEAST_CHUNK or rows * c * k * per_expert <= UNROLLED))

        def body(place, x, *refs):
            place, s = self._place(place, routing, rows), pl.program_id(1)
            for e in range(experts):
                ws, outs = refs[e * per_expert : (e + 1) * per_expert], refs[experts * per_expert :]

                def tile(part, ws=ws, outs=outs):
                    @pl.loop(0, columns // chunk, unroll=chunk == columns)
                    def _(i):
                        at = pl.ds(pl.multiple_of(i * chunk, chunk), chunk)
                        for out, result in zip(outs, compute(x[part], [w[at] if transposed else w[:, at] for w in ws]), strict=True):
                            out[part, at] = result.astype(out.dtype)

                _filled_parts(place.valid(e, s, rows), rows, sub, tile)

        def row_tile(n, s, place):
            # idle steps already fetch the tile that the next block of columns begins with
            return jnp.where(s > self._place(place, routing, rows).last(rows), 0, s), 0

        def weight_block(e, n, s, place):
            place = self._place(place, routing, rows)
            # the next block is on its way as soon as the expert's last tile is done, while others compute
            done = (s - place.first[e]) * rows >= place.end(e)
            block = jnp.where(place.count[e] == 0, 0, jnp.where(done, jnp.minimum(n + 1, steps - 1), n))
            return (block, 0) if transposed else (0, block)

        return self._call(
            f"routed_{name}",
            body,
            routing,
            rows,
            grid=(steps, tiles),
            semantics=("parallel", "arbitrary"),
            operands=[(x, pl.BlockSpec((rows, k), row_tile))]
            + [
                (w, pl.BlockSpec((columns, k) if transposed else (k, columns), lambda n, s, p, e=e: weight_block(e, n, s, p)))
                for e in range(experts)
                for w in weights[e]
            ],
            results=[((x.shape[0], m), pl.BlockSpec((rows, columns), lambda n, s, place: (s, n)))] * outputs,
            dtype=x.dtype,
            flops=2 * x.shape[0] * k * m * per_expert,
            moved=self._used(routing, rows) * rows * k * steps + outputs * x.shape[0] * m + experts * per_expert * k * m,
        )

    def _reduced(
        self,
        name: str,
        compute: Callable[..., tuple[jax.Array, ...]],
        reduce: Callable[..., jax.Array],
        routing: Routing,
        wide: tuple[jax.Array, ...],
        narrow: tuple[jax.Array, ...],
        weights: tuple[tuple[jax.Array, ...], ...],
        axes: tuple[int, ...],
        width: int,
        outputs: int = 0,
        transposed: bool = False,
    ) -> tuple[jax.Array, ...]:
        """`compute(wide tiles, narrow tiles, weight blocks) -> narrow tiles`; `reduce(these, weight blocks)`, summed over the inner width.

        wide: [S, D], read once per tile. narrow: [S, F], F being the inner width that a tile walks in blocks. weights of each expert:
        matrices with F on the axis that `axes` names. outputs: how many narrow tiles are results too. Returns the sum [S, width], then
        these [S, F].

        transposed: `compute` is given the wide tiles transposed, once per row tile, both give transposed results, and the narrow outputs
        are [F, S].
        """
        experts, per_expert = len(weights), len(weights[0])
        slots, dtype = routing.source.shape[0], weights[0][0].dtype
        inner = weights[0][0].shape[axes[0]]
        blocks = partial(_reduced_bytes, dtype.itemsize, width, experts * per_expert, len(wide), len(narrow) + outputs, transposed)
        # every tile reads all of its owner's weights: rows count, columns only decide between tiles of as many
        most, fewest = MOST_COLUMNS if per_expert == 1 else NARROW, 1 if self.generation in ONE_BUFFER else 2
        rows, columns, sub = self._tiles(routing, inner, partial(blocks, fewest), most, work=lambda rows, columns: (rows, columns))
        buffers = 2 if blocks(2, rows, columns) <= _budget(self.generation) else 1
        once = partial(pl.BlockSpec, pipeline_mode=pl.Buffered(1) if buffers == 1 else None)
        tiles, steps, zeroed = slots // rows, inner // columns, transposed and self.generation in ZEROED
        order = partial(_tile_of_step, tiles=tiles, cores=self._cores)

        def body(place, *refs):
            place, s, f = self._place(place, routing, rows), order(pl.program_id(0)), pl.program_id(1)
            wide_refs, refs = refs[: len(wide)], refs[len(wide) :]
            narrow_refs, refs = refs[: len(narrow)], refs[len(narrow) :]
            weight_refs, (y, *outs, total) = refs[: experts * per_expert], refs[experts * per_expert : len(refs) - len(wide) * transposed]
            turned_refs = refs[len(refs) - len(wide) :] if transposed else wide_refs

            def at(part):
                return (slice(None), part) if transposed else (part,)

            if transposed:

                @pl.when(f == 0)
                def _():
                    if zeroed:
                        total[...] = jnp.zeros_like(total)
                    for turned, straight in zip(turned_refs, wide_refs, strict=True):
                        turned[...] = straight[...].T

            for e in range(experts):
                ws = weight_refs[e * per_expert : (e + 1) * per_expert]

                def tile(part, ws=ws):
                    blocks = [w[...] for w in ws]
                    results = compute([r[at(part)] for r in turned_refs], [r[part] for r in narrow_refs], blocks)
                    if outs:
                        for out, result in zip(outs, results, strict=True):
                            out[at(part)] = result
                        if self.generation in READ_AGAIN:
                            results = [out[at(part)] for out in outs]
                    before = total[at(part)] if zeroed else jnp.where(f == 0, 0.0, total[at(part)])
                    total[at(part)] = before + reduce(results, blocks)

                _filled_parts(place.valid(e, s, rows), rows, sub, tile)

            @pl.when(f == steps - 1)
            def _():
                y[...] = total[...].astype(y.dtype).T if transposed else total[...].astype(y.dtype)

        def read(s, f, place):
            last = self._place(place, routing, rows).last(rows)
            return jnp.minimum(order(s), last), jnp.where(order(s) > last, 0, f)

        def weight_block(e, axis, s, f, place):
            place = self._place(place, routing, rows)
            done = (order(s) < place.first[e]) & (place.count[e] > 0)
            block = jnp.where(done, steps - 1, jnp.where(place.valid(e, order(s), rows) > 0, f, 0))
            return (0, block) if axis else (block, 0)

        def weight_shape(w, axis):
            return (w.shape[0], columns) if axis else (columns, w.shape[1])

        return self._call(
            f"routed_{name}",
            body,
            routing,
            rows,
            grid=(tiles, steps),
            semantics=("parallel", "arbitrary"),
            operands=[(a, once((rows, a.shape[1]), lambda s, f, place: (read(s, f, place)[0], 0))) for a in wide]
            + [(a, pl.BlockSpec((rows, columns), read)) for a in narrow]
            + [
                (w, pl.BlockSpec(weight_shape(w, axis), lambda s, f, p, e=e, axis=axis: weight_block(e, axis, s, f, p)))
                for e in range(experts)
                for w, axis in zip(weights[e], axes, strict=True)
            ],
            results=[((slots, width), once((rows, width), lambda s, f, place: (order(s), 0)))]
            + [
                ((inner, slots), pl.BlockSpec((columns, rows), lambda s, f, place: (f, order(s))))
                if transposed
                else ((slots, inner), pl.BlockSpec((rows, columns), lambda s, f, place: (order(s), f)))
            ]
            * outputs,
            dtype=dtype,
            scratch=[pltpu.VMEM((width, rows), f32), *(pltpu.VMEM((a.shape[1], rows), a.dtype) for a in wide)]
            if transposed
            else [pltpu.VMEM((rows, width), f32)],
            flops=2 * slots * sum(w.size for w in weights[0]),
            moved=self._used(routing, rows) * (sum(rows * a.shape[1] for a in wide + narrow) + sum(w.size for w in weights[0]))
            + slots * (width + outputs * inner),
        )

    def _weight_gradients(
        self,
        lefts: tuple[jax.Array, ...],
        right: jax.Array,
        routing: Routing,
        expert: int,
        rows_first: bool = False,
        transposed: bool = False,
    ) -> list[jax.Array]:
        """left @ right [K, M] for every left [K, S], over the tiles of one expert; zero where it has none. right: [S, M].

        rows_first: lefts are [S, K]. transposed: the results are [M, K]. Empty slots of left and of right are never both non-zero, and
        sub-blocks without tokens, which may hold anything, are not read.
        """
        slots_axis, size, count = 0 if rows_first else 1, right.dtype.itemsize, len(lefts)
        k, m = lefts[0].shape[1 - slots_axis], right.shape[1]
        tk = next(c for c in COLUMNS if c <= MOST_COLUMNS and k % c == 0)

        def blocks(rows: int, columns: int) -> int:
            return 2 * size * rows * (count * tk + columns) + tk * columns * (count * (4 + 2 * size) + 4)

        rows, tm, sub = self._tiles(routing, m, blocks, WIDE)
        steps = routing.max_blocks * routing.block_rows // rows

        def body(place, *refs):
            place, s = self._place(place, routing, rows), pl.program_id(2)
            left_refs, right_ref, dw_refs, totals = refs[:count], refs[count], refs[count + 1 : 2 * count + 1], refs[2 * count + 1 :]

            def tile(part):
                fresh = (s == 0) & (part.start == 0)
                for total, left in zip(totals, left_refs, strict=True):
                    block = left[part] if rows_first else left[:, part]
                    contracted = (((slots_axis,), (0,)), ((), ()))
                    product = jax.lax.dot_general(block, right_ref[part], contracted, preferred_element_type=f32)
                    total[...] = jnp.where(fresh, 0.0, total[...]) + product

            _filled_parts(place.valid(expert, place.first[expert] + s, rows), rows, sub, tile)

            @pl.when(s == steps - 1)
            def _():
                for dw, total in zip(dw_refs, totals, strict=True):
                    result = jnp.where(place.count[expert] > 0, total[...], 0.0).astype(dw.dtype)
                    dw[...] = result.T if transposed else result

        def read(i, j, s, place):
            # steps beyond the expert's tiles already fetch what the next block of the result begins with
            place = self._place(place, routing, rows)
            done = s >= jnp.maximum(place.tiles(expert, rows), 1)
            block = jnp.minimum(i * (m // tm) + j + done, (k // tk) * (m // tm) - 1)
            return block // (m // tm), block % (m // tm), place.first[expert] + jnp.where(done, 0, s)

        def left_block(i, j, s, place):
            i, _, tile = read(i, j, s, place)
            return (tile, i) if rows_first else (i, tile)

        def right_block(i, j, s, place):
            _, j, tile = read(i, j, s, place)
            return tile, j

        shape, block = ((m, k), (tm, tk)) if transposed else ((k, m), (tk, tm))
        result = shape, pl.BlockSpec(block, lambda i, j, s, place: (j, i) if transposed else (i, j))
        used = self._used(routing, rows, (expert,)) * rows
        return list(
            self._call(
                "routed_weight_gradient",
                body,
                routing,
                rows,
                grid=(k // tk, m // tm, steps),
                semantics=("parallel", "parallel", "arbitrary"),
                operands=[(left, pl.BlockSpec((rows, tk) if rows_first else (tk, rows), left_block)) for left in lefts]
                + [(right, pl.BlockSpec((rows, tm), right_block))],
                results=[result] * count,
                dtype=right.dtype,
                scratch=[pltpu.VMEM((tk, tm), f32)] * count,
                flops=2 * routing.expert.shape[0] * k * m * count,
                moved=used * (count * k * (m // tm) + m * (k // tk)) + count * k * m,
            )
        )

    def _call(
        self, name, body, routing: Routing, rows: int, *, grid, semantics, operands, results, dtype, scratch=(), flops: int, moved: int
    ) -> tuple[jax.Array, ...]:
        """One kernel. operands: (array, its blocks); results: (shape, its blocks)."""
        place = jnp.concatenate([routing.first_slot // rows, routing.counts, *gap(routing.counts, routing.tile_rows)])
        arrays = [place, *(a for a, _ in operands)]
        if not self.interpret:
            # XLA would keep an operand or a result in VMEM, beside the blocks of the kernel, and run out of it
            arrays = [pltpu.with_memory_space_constraint(a, pltpu.HBM) for a in arrays]
        return tuple(
            pl.pallas_call(
                body,
                out_shape=[jax.ShapeDtypeStruct(s, dtype) if self.interpret else pltpu.HBM(s, dtype) for s, _ in results],
                grid_spec=pltpu.PrefetchScalarGridSpec(
                    num_scalar_prefetch=1,
                    grid=grid,
                    in_specs=[blocks for _, blocks in operands],
                    out_specs=[blocks for _, blocks in results],
                    scratch_shapes=list(scratch),
                ),
                compiler_params=pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=_vmem(self.generation)),
                cost_estimate=pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=moved * jnp.dtype(dtype).itemsize),
                name=name,
                interpret=self.interpret,
            )(*arrays)
        )

    def _place(self, place: Any, routing: Routing, rows: int) -> Place:
        n = routing.num_experts
        if self.counts is None:
            return Place(*([place[i * n + e] for e in range(n)] for i in range(4)))
        first, blocks = [0], [-(-c // routing.block_rows) for c in self.counts]
        for b in blocks[:-1]:
            first.append(first[-1] + b * (routing.block_rows // rows))
        empty, more = zip(*(gap(c, routing.tile_rows) for c in self.counts), strict=True)
        return Place(first, list(self.counts), empty, more)

    @property
    def _cores(self) -> int:
        return 2 if self.generation in TWO_CORES else 1

    def _most_rows(self, routing: Routing) -> int:
        return routing.tile_rows or math.gcd(routing.block_rows, TPU_ROWS.get(self.generation, 512))

    def move_rows(self, routing: Routing) -> int:
        """Rows that are moved at once."""
        return math.gcd(self._most_rows(routing), MOVE_ROWS, routing.tile_rows // 2)

    def _used(self, routing: Routing, rows: int, experts: Sequence[int] | None = None) -> int:
        """How many tiles of these experts, by default of all, hold tokens; the most there can be where the counts are not given."""
        if self.counts is None:
            return -(-routing.expert.shape[0] // rows) + (routing.num_experts - 1 if experts is None else 0)
        place = self._place(None, routing, rows)
        return sum(place.tiles(e, rows) for e in (range(routing.num_experts) if experts is None else experts))

    def _tiles(
        self,
        routing: Routing,
        width: int,
        blocks: Callable[[int, int], int],
        most: int = MOST_COLUMNS,
        work: Callable[[int, int], Any] = lambda rows, columns: 1 / (1 / rows + 1 / columns),
    ) -> tuple[int, int, int]:
        """Rows and columns of a tile, and rows of a sub-block: of the tiles whose blocks fit into VMEM, the one that does most work for
        each byte it moves. All kernels of a routing have the same sub-blocks, so that one reads only what another has written."""
        largest = self._most_rows(routing)
        sub = math.gcd(largest, TPU_LEAST_ROWS)
        rows = [largest >> i for i in range(largest.bit_length()) if largest >> i >= sub]
        budget = _budget(self.generation)
        fitting = [(r, c) for r in rows for c in COLUMNS if c <= most and width % c == 0 and blocks(r, c) <= budget]
        return *max(fitting, key=lambda tile: work(*tile)), sub


def _tile_of_step(step: Any, tiles: int, cores: int) -> Any:
    """From the last tile to the first. Two cores halve the steps, the first having one more if they are odd: each takes every other tile,
    so that the tiles at the end, idle or partly filled, fall to both."""
    if cores == 1:
        return tiles - 1 - step
    half = (tiles + 1) // 2
    return tiles - 1 - jnp.where(step < half, 2 * step, 2 * (step - half) + 1)


def _filled_parts(valid: Any, rows: int, sub: int, compute: Callable[[Any], None]) -> None:
    """Runs `compute(row slice)` on those sub-blocks of a tile that hold a valid row: together if all do, else in halves, quarters, ..."""
    pl.when(valid > rows - sub)(lambda: compute(pl.ds(0, rows)))
    part = rows // 2
    while part >= sub:
        for start in range(0, rows, 2 * part):
            # all before `start` is full; of the two parts that follow, the first is full too, and the second is not
            pl.when((valid > start + part - sub) & (valid <= start + 2 * part - sub))(partial(compute, pl.ds(start, part)))
        part //= 2


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, preferred_element_type=f32)


def _dot_t(a: jax.Array, b: jax.Array) -> jax.Array:
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=f32)


def _matmul(x, weights):
    return (_dot(x, weights[0]),)


def _matmul_t(x, weights):
    return (_dot_t(x, weights[0]),)


def _gate_and_up(x, weights):
    return _dot(x, weights[0]), _dot(x, weights[1])


def _gate_up(x, weights):
    g, u = _gate_and_up(x, weights)
    return g * jax.nn.sigmoid(g) * u, g, u


def _hidden_of(x, weights):
    return _gate_up(x, weights)[:1]


def _hidden(wide, narrow, weights):
    return (_hidden_of(wide[0], weights)[0].astype(wide[0].dtype),)


def _as_it_is(wide, narrow, weights):
    return narrow


def _times_last(narrow, weights):
    return _dot(narrow[0], weights[-1])


def _hidden_bwd(wide, narrow, weights):
    """h, dgate and dup from dy, g and u. Everything transposed, [columns, rows]: so the weights are not, and g and u are turned in place of
    them, a third as much."""
    (dy,), (g, u), down = wide, (a.T.astype(f32) for a in narrow), weights[2]
    dh = _dot(down, dy)
    s = jax.nn.sigmoid(g)
    act = g * s
    return tuple(a.astype(dy.dtype) for a in (act * u, dh * u * (s + act * (1 - s)), dh * act))


def _gate_up_dx(narrow, weights):
    _, dg, du = narrow
    return _dot(weights[0], dg) + _dot(weights[1], du)
