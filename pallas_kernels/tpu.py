"""Routed layers as grouped matmuls in Pallas Mosaic TPU kernels. docs/kernels.md draws the token order, the tiles and the grid.

A kernel visits the row tiles that hold tokens, text first, then visual; a tile has one owner. Experts are separate operands: a step
multiplies by the weights of its tile's owner, while the other expert's block stays where it is. An expert without tokens keeps its first
block for the whole kernel, so no other block of it is read. Weight gradients walk the tiles of one expert, in a kernel of their own.

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

from pallas_kernels.routing import Routing
from pallas_kernels.vjp import Experts, Kernels

ROWS = {"v5e": 512, "v5p": 512, "v6e": 1024}
"""The most rows of a tile, by generation, from the tables of docs/kernels.md; 512 on others."""

COLUMNS = (1024, 512, 256, 128)
BUDGET = 64 << 20
"""Bytes of VMEM that the blocks of a kernel may take by the arithmetic of `_bytes`."""
LIMIT = 100 << 20
"""Bytes of VMEM the compiler may use: the blocks and its own temporaries."""

LANES = 128
f32 = jnp.float32


def unsupported(rows: int, widths: Sequence[int], dtype: Any) -> str | None:
    """Why the kernels cannot run on blocks of so many rows, these widths and this dtype, with the mend; None where they can."""
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"x has dtype {jnp.dtype(dtype).name}; cast it to bfloat16 or float32"
    if any(width % LANES for width in widths):
        return f"the widths {tuple(widths)} must be multiples of {LANES}; pad the weights"
    if rows % _sublanes(dtype):
        return f"the routing has blocks of {rows} rows, not a multiple of {_sublanes(dtype)}; give make_routing a row_multiple"
    if max(widths) * LANES * 16 > BUDGET:
        return f"a width of {max(widths)} does not fit in VMEM; split the layer"
    return None


def _sublanes(dtype: Any) -> int:
    return 32 // jnp.dtype(dtype).itemsize


class Visits(NamedTuple):
    """The row tiles a grouped matmul works through, prefetched into scalar memory. All zeros mean: tile s at step s, expert 0.

    shift: int32[steps], tile index minus step.
    owner: int32[steps], the expert of the tile; num_experts where the step has nothing to do.
    rest:  int32[num_experts], steps after the expert's last one; -1 when it has none.
    """

    shift: jax.Array
    owner: jax.Array
    rest: jax.Array


def _tile_ranges(routing: Routing, rows: int) -> tuple[jax.Array, jax.Array]:
    """The first tile of each expert and how many hold its tokens, both int32[num_experts]."""
    first = (jnp.cumsum(routing.blocks) - routing.blocks) * (routing.block_rows // rows)
    return first, (routing.counts + rows - 1) // rows


def _visits(routing: Routing, rows: int) -> Visits:
    first, tiles = _tile_ranges(routing, rows)
    ends = jnp.cumsum(tiles)
    steps = pl.cdiv(routing.expert.shape[0], rows) + routing.num_experts - 1
    step = jnp.arange(steps, dtype=jnp.int32)
    last = jnp.minimum(step, jnp.maximum(ends[-1] - 1, 0))  # idle steps stay on the last tile, so that nothing moves
    owner = jnp.minimum(jnp.sum(last[:, None] >= ends, axis=1, dtype=jnp.int32), routing.num_experts - 1)
    tile = first[owner] + last - (ends - tiles)[owner]
    return Visits(tile - step, jnp.where(step < ends[-1], owner, routing.num_experts), jnp.where(tiles == 0, -1, steps - ends))


@dataclasses.dataclass(frozen=True)
class Tpu:
    """The backend of `vjp`.

    generation: 'v5e', 'v5p', 'v6e' or another TPU; chooses the tiles.
    interpret: False compiles; True or pltpu.InterpretParams runs the kernels on a CPU, for tests.
    """

    generation: str = "v5e"
    interpret: Any = False

    def linear(self, x: jax.Array, kernels: Kernels, routing: Routing) -> jax.Array:
        return self._grouped("linear", _matmul, routing, (x,), (), tuple((k,) for k in kernels))[0]

    def linear_bwd(self, x: jax.Array, dy: jax.Array, kernels: Kernels, routing: Routing) -> tuple[jax.Array, Kernels]:
        (dx,) = self._grouped("linear_dx", _matmul_t, routing, (dy,), (), tuple((k,) for k in kernels), transposed=True)
        return dx, tuple(self._weight_gradient(x, dy, routing, e) for e in range(len(kernels)))

    def swiglu(self, x: jax.Array, experts: Experts, routing: Routing) -> jax.Array:
        (h,) = self._grouped("gate_up", _gate_up, routing, (x,), (), tuple((gate, up) for gate, up, _ in experts))
        return self.linear(h, tuple(down for _, _, down in experts), routing)

    def swiglu_fwd(self, x: jax.Array, experts: Experts, routing: Routing) -> tuple[jax.Array, jax.Array, jax.Array]:
        weights = tuple((gate, up) for gate, up, _ in experts)
        h, g, u = self._grouped("gate_up", _gate_up_saved, routing, (x,), (), weights, outputs=3)
        return self.linear(h, tuple(down for _, _, down in experts), routing), g, u

    def swiglu_bwd(
        self, x: jax.Array, g: jax.Array, u: jax.Array, dy: jax.Array, experts: Experts, routing: Routing
    ) -> tuple[jax.Array, Experts]:
        downs = tuple((down,) for _, _, down in experts)
        h, dg, du = self._grouped("gate_up_dh", _gate_up_bwd, routing, (dy,), (g, u), downs, outputs=3, transposed=True)
        gates_ups = tuple((gate, up) for gate, up, _ in experts)
        (dx,) = self._grouped("gate_up_dx", _matmul_t, routing, (dg, du), (), gates_ups, transposed=True)
        pairs = ((x, dg), (x, du), (h, dy))
        return dx, tuple(tuple(self._weight_gradient(a, b, routing, e) for a, b in pairs) for e in range(len(experts)))  # type: ignore[return-value]

    # -- the two kernels -----------------------------------------------------------------------------------------------------------

    def _grouped(
        self,
        name: str,
        compute: Callable[..., tuple[jax.Array, ...]],
        routing: Routing,
        wide: tuple[jax.Array, ...],
        narrow: tuple[jax.Array, ...],
        weights: tuple[tuple[jax.Array, ...], ...],
        outputs: int = 1,
        transposed: bool = False,
    ) -> tuple[jax.Array, ...]:
        """`compute(wide tiles, narrow tiles, the owner's weight blocks) -> output tiles` for every tile that holds tokens.

        wide: [S, K], read as whole rows. narrow: [S, M], read like the outputs, which are [S, M]. weights: [K, M] of each expert, or
        [M, K] if transposed. Rows of tiles that hold no token are left as they are in memory.
        """
        x, w = wide[0], weights[0][0]
        experts, per_expert = len(weights), len(weights[0])
        k, m = (w.shape[1], w.shape[0]) if transposed else w.shape
        rows, columns = self._tiles(routing, x.dtype, k, m, experts * per_expert, len(wide), len(narrow) + outputs)
        visits = _visits(routing, rows)
        steps = visits.shift.shape[0]

        def body(shift, owner, rest, *refs):
            del shift, rest
            wide_refs, refs = refs[: len(wide)], refs[len(wide) :]
            narrow_refs, refs = refs[: len(narrow)], refs[len(narrow) :]
            for e in range(experts):
                mine = refs[e * per_expert : (e + 1) * per_expert]

                @pl.when(owner[pl.program_id(1)] == e)
                def _(mine=mine):
                    results = compute([r[...] for r in wide_refs], [r[...] for r in narrow_refs], [r[...] for r in mine])
                    for out, result in zip(refs[experts * per_expert :], results, strict=True):
                        out[...] = result.astype(out.dtype)

        def row_tile(n, s, shift, owner, rest):
            return s + shift[s], 0

        def tile(n, s, shift, owner, rest):
            return s + shift[s], n

        def weight_block(e, n, s, shift, owner, rest):
            # the next block is on its way as soon as the expert's last tile is done, while others compute
            ahead = jnp.where(s < steps - rest[e], n, jnp.minimum(n + 1, m // columns - 1))
            block = jnp.where(rest[e] < 0, 0, ahead)
            return (block, 0) if transposed else (0, block)

        block_shape = (columns, k) if transposed else (k, columns)
        size = x.dtype.itemsize
        return pl.pallas_call(
            body,
            out_shape=[self._result(x.shape[0], m, x.dtype)] * outputs,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=3,
                grid=(m // columns, steps),
                in_specs=[pl.BlockSpec((rows, k), row_tile)] * len(wide)
                + [pl.BlockSpec((rows, columns), tile)] * len(narrow)
                + [pl.BlockSpec(block_shape, partial(weight_block, e)) for e in range(experts) for _ in range(per_expert)],
                out_specs=[pl.BlockSpec((rows, columns), tile)] * outputs,
            ),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=LIMIT),
            cost_estimate=pl.CostEstimate(
                flops=2 * steps * rows * k * m * per_expert,
                transcendentals=0,
                bytes_accessed=size
                * (steps * rows * (k * len(wide) * (m // columns) + m * (len(narrow) + outputs)) + experts * per_expert * k * m),
            ),
            name=f"routed_{name}",
            interpret=self.interpret,
        )(*visits, *self._operands(*wide, *narrow, *(w for ws in weights for w in ws)))

    def _weight_gradient(self, x: jax.Array, dy: jax.Array, routing: Routing, expert: int) -> jax.Array:
        """x^T @ dy [K, M] over the tiles of one expert; zero where it has none. Empty slots of x and of dy are never both non-zero."""
        (_, k), m = x.shape, dy.shape[1]
        rows = self._rows(routing)
        tk, tm = (next(c for c in COLUMNS if width % c == 0) for width in (k, m))
        first, tiles = _tile_ranges(routing, rows)
        steps = pl.cdiv(routing.expert.shape[0], rows)
        place = jnp.stack([first[expert], steps - tiles[expert]])  # zeros mean: all tiles

        def body(place, x, dy, dw, total):
            s = pl.program_id(2)

            @pl.when(s == 0)
            def _():
                total[...] = jnp.zeros_like(total)

            @pl.when(s < steps - place[1])
            def _():
                total[...] += jax.lax.dot_general(x[...], dy[...], (((0,), (0,)), ((), ())), preferred_element_type=f32)

            @pl.when(s == steps - 1)
            def _():
                dw[...] = total[...].astype(dw.dtype)

        def tile(s, place):
            return place[0] + jnp.minimum(s, jnp.maximum(steps - place[1] - 1, 0))

        size = x.dtype.itemsize
        return pl.pallas_call(
            body,
            out_shape=self._result(k, m, x.dtype),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(k // tk, m // tm, steps),
                in_specs=[
                    pl.BlockSpec((rows, tk), lambda i, j, s, place: (tile(s, place), i)),
                    pl.BlockSpec((rows, tm), lambda i, j, s, place: (tile(s, place), j)),
                ],
                out_specs=pl.BlockSpec((tk, tm), lambda i, j, s, place: (i, j)),
                scratch_shapes=[pltpu.VMEM((tk, tm), f32)],
            ),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=LIMIT),
            cost_estimate=pl.CostEstimate(
                flops=2 * steps * rows * k * m,
                transcendentals=0,
                bytes_accessed=size * (steps * rows * (k * (m // tm) + m * (k // tk)) + k * m),
            ),
            name="routed_weight_gradient",
            interpret=self.interpret,
        )(place, *self._operands(x, dy))

    # XLA would keep an operand or a result of tens of megabytes in VMEM, beside the blocks of the kernel, and run out of it.

    def _operands(self, *arrays: jax.Array) -> list[jax.Array]:
        return list(arrays) if self.interpret else [pltpu.with_memory_space_constraint(a, pltpu.HBM) for a in arrays]

    def _result(self, rows: int, columns: int, dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((rows, columns), dtype) if self.interpret else pltpu.HBM((rows, columns), dtype)

    # -- tiles ---------------------------------------------------------------------------------------------------------------------

    def _rows(self, routing: Routing) -> int:
        """The largest power of two that divides a block, up to the generation's tile."""
        return math.gcd(routing.block_rows, ROWS.get(self.generation, 512))

    def _tiles(self, routing: Routing, dtype: Any, k: int, m: int, weights: int, wide: int, narrow: int) -> tuple[int, int]:
        """Rows and columns of a tile: of those whose blocks fit into VMEM, the ones that compute most for each byte they move."""
        most, size = self._rows(routing), dtype.itemsize
        rows = [most >> i for i in range(4) if (most >> i) % _sublanes(dtype) == 0]

        def bytes_of(tile: tuple[int, int]) -> int:
            r, c = tile
            blocks = weights * k * c + wide * r * k + narrow * r * c
            return 2 * size * blocks + 4 * r * c * (narrow + 1)  # two buffers each; float32 results

        fitting = [(r, c) for r in rows for c in COLUMNS if m % c == 0 and bytes_of((r, c)) <= BUDGET]
        if not fitting:
            raise ValueError(f"no tile of a [{k}, {m}] weight with blocks of {most} rows fits in VMEM; use another implementation")
        return max(fitting, key=lambda tile: 1 / (1 / tile[0] + 1 / tile[1]))


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, preferred_element_type=f32)


def _dot_t(a: jax.Array, b: jax.Array) -> jax.Array:
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=f32)


def _matmul(wide, narrow, weights):
    return (_dot(wide[0], weights[0]),)


def _matmul_t(wide, narrow, weights):
    products = [_dot_t(a, w) for a, w in zip(wide, weights, strict=True)]
    return (sum(products[1:], start=products[0]),)


def _gate_up_saved(wide, narrow, weights):
    g, u = _dot(wide[0], weights[0]), _dot(wide[0], weights[1])
    return g * jax.nn.sigmoid(g) * u, g, u


def _gate_up(wide, narrow, weights):
    return _gate_up_saved(wide, narrow, weights)[:1]


def _gate_up_bwd(wide, narrow, weights):
    g, u = (a.astype(f32) for a in narrow)
    dh = _dot_t(wide[0], weights[0])
    s = jax.nn.sigmoid(g)
    act = g * s
    return act * u, dh * u * (s + act * (1 - s)), dh * act
