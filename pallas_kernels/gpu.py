"""Routed layers as grouped matmuls for NVIDIA Hopper GPUs, in Pallas Mosaic GPU (wgmma and TMA). Never run on a GPU so far.

What is known comes from a machine without one: the interpreter computes the right values and gradients, and ptxas accepts the code for an
H100 (docs/kernels.md). Neither shows a missing fence or a wait too few, nor how long anything takes: test_gpu.py runs on a GPU as it is,
and should, before anyone trains with this.

One program per streaming multiprocessor walks over output tiles. Two compute warpgroups own 64 rows of a tile each and multiply what a
third warpgroup has fetched into a ring of buffers. Only the fetching one knows the experts: a row tile has one owner, and the owner's
weights alone are read. Weight gradients walk the rows of one expert, in a kernel of their own.

Products are accumulated in float32, in the same order in every run. A third expert costs a branch in the fetching warpgroup, which
follows from the length of the tuples.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.routing import GPU_ROWS, Routing, to_slots, to_tokens
from pallas_kernels.vjp import Experts, Kernels

ROWS = GPU_ROWS
"""Rows of an output tile."""
COLUMNS = 256
"""Columns of the tile at most, over all its accumulators: with 64 rows each, a warpgroup's accumulators take 128 of its registers."""
DEPTH = 64
"""Of a step along the contracted dimension: 128 bytes, the widest swizzle of shared memory."""
WARPGROUPS = 2
"""That compute; one more fetches."""
HALF = ROWS // WARPGROUPS
"""Rows of a tile that one of them computes."""
GROUP = 8
"""Column tiles that are computed together for all rows, so that a wave of tiles shares both operands in the L2 cache."""
SHARED = 226 * 1024
"""Bytes of shared memory for buffers: what a Hopper program may have, less 1 KiB for barriers."""
STAGES = 4
"""The most buffers of the ring."""
FETCH_REGISTERS, COMPUTE_REGISTERS = 40, 232
"""Registers of a thread that fetches and of one that computes: 3 warpgroups share 64 Ki."""

LANES = 128
f32 = jnp.float32


def unsupported(routing: Routing, widths: Sequence[int], dtype: Any) -> str | None:
    """Why the kernels cannot run in this order of the tokens, on these widths and this dtype, with the mend; None where they can."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"x has dtype {jnp.dtype(dtype).name}; cast it to bfloat16 or float16"
    if any(width % LANES for width in widths):
        return f"the widths {tuple(widths)} must be multiples of {LANES}; pad the weights"
    if routing.block_rows % ROWS:
        return f"the routing has blocks of {routing.block_rows} rows, not a multiple of {ROWS}; give make_routing row_multiple={ROWS}"
    if routing.tile_rows:
        return f"the routing was made for a TPU's tiles of {routing.tile_rows} rows; give make_routing tile_rows=0"
    return None


class Visits(NamedTuple):
    """The row tiles that hold tokens, in order.

    tile: int32[steps], which tile; owner: int32[steps], its expert; used: int32[1], how many steps count.
    """

    tile: jax.Array
    owner: jax.Array
    used: jax.Array


def _tile_ranges(routing: Routing) -> tuple[jax.Array, jax.Array]:
    """The first tile of each expert and how many hold its tokens, both int32[num_experts]."""
    first = routing.first_slot // ROWS
    return first, (routing.counts + ROWS - 1) // ROWS


def _visits(routing: Routing) -> Visits:
    first, tiles = _tile_ranges(routing)
    ends = jnp.cumsum(tiles)
    step = jnp.arange(pl.cdiv(routing.expert.shape[0], ROWS) + routing.num_experts - 1, dtype=jnp.int32)
    owner = jnp.minimum(jnp.sum(step[:, None] >= ends, axis=1, dtype=jnp.int32), routing.num_experts - 1)
    return Visits(first[owner] + step - (ends - tiles)[owner], owner, ends[-1:])


@dataclasses.dataclass(frozen=True)
class Gpu:
    """The backend of `vjp`.

    cores: programs to launch, one for each streaming multiprocessor.
    interpret: False compiles; Mosaic GPU's InterpretGPUParams runs the kernels on a CPU, for tests.
    """

    cores: int = 132
    interpret: Any = False

    to_slots, to_tokens = staticmethod(to_slots), staticmethod(to_tokens)

    def linear(self, x: jax.Array, kernels: Kernels, routing: Routing) -> jax.Array:
        return self._grouped("linear", _first, routing, (x,), (), tuple((k,) for k in kernels))[0]

    def linear_bwd(self, x: jax.Array, dy: jax.Array, kernels: Kernels, routing: Routing) -> tuple[jax.Array, Kernels]:
        (dx,) = self._grouped("linear_dx", _first, routing, (dy,), (), tuple((k,) for k in kernels), transposed=True)
        return dx, tuple(self._weight_gradient(x, dy, routing, e) for e in range(len(kernels)))

    def swiglu(self, x: jax.Array, experts: Experts, routing: Routing) -> jax.Array:
        weights = tuple((gate, up) for gate, up, _ in experts)
        (h,) = self._grouped("gate_up", _gate_up, routing, (x,), (), weights, accumulators=2)
        return self.linear(h, tuple(down for _, _, down in experts), routing)

    def swiglu_fwd(self, x: jax.Array, experts: Experts, routing: Routing) -> tuple[jax.Array, jax.Array, jax.Array]:
        weights = tuple((gate, up) for gate, up, _ in experts)
        h, g, u = self._grouped("gate_up_saved", _gate_up_saved, routing, (x,), (), weights, accumulators=2, outputs=3)
        return self.linear(h, tuple(down for _, _, down in experts), routing), g, u

    def gate_up(self, x: jax.Array, experts: Experts, routing: Routing) -> tuple[jax.Array, jax.Array]:
        weights = tuple((gate, up) for gate, up, _ in experts)
        return self._grouped("gate_up_again", _gate_and_up, routing, (x,), (), weights, accumulators=2, outputs=2)  # type: ignore[return-value]

    def swiglu_bwd(
        self, x: jax.Array, g: jax.Array, u: jax.Array, dy: jax.Array, experts: Experts, routing: Routing
    ) -> tuple[jax.Array, Experts]:
        downs = tuple((down,) for _, _, down in experts)
        h, dg, du = self._grouped("gate_up_dh", _gate_up_bwd, routing, (dy,), (g, u), downs, outputs=3, transposed=True)
        gates_ups = tuple((gate, up) for gate, up, _ in experts)
        (dx,) = self._grouped("gate_up_dx", _first, routing, (dg, du), (), gates_ups, transposed=True)
        pairs = ((x, dg), (x, du), (h, dy))
        return dx, tuple(tuple(self._weight_gradient(a, b, routing, e) for a, b in pairs) for e in range(len(experts)))  # type: ignore[return-value]

    # -- the two kernels -----------------------------------------------------------------------------------------------------------

    def _grouped(
        self,
        name: str,
        epilogue: Callable[..., tuple[jax.Array, ...]],
        routing: Routing,
        wide: tuple[jax.Array, ...],
        narrow: tuple[jax.Array, ...],
        weights: tuple[tuple[jax.Array, ...], ...],
        accumulators: int = 1,
        outputs: int = 1,
        transposed: bool = False,
    ) -> tuple[jax.Array, ...]:
        """`epilogue(products, narrow tiles) -> output tiles` for every tile that holds tokens.

        wide: [S, K]. narrow: [S, M], read like the outputs, which are [S, M]. weights of each expert: [K, M], or [M, K] if transposed. One
        wide operand is multiplied by every weight, each product in an accumulator of its own; of several, each is multiplied by its own
        weight, and the sum is the one product. Rows of tiles that hold no token are left as they are in memory.
        """
        experts, w = len(weights), weights[0][0]
        k, m = (w.shape[1], w.shape[0]) if transposed else w.shape
        columns = math.gcd(m, COLUMNS // accumulators)
        depths = k // DEPTH
        flat = tuple(w for ws in weights for w in ws)

        def fetch(refs, row, column):
            tile, owner, _, *refs = refs
            start, mine = tile[row] * ROWS, owner[row]
            cols = pl.ds(column * columns, columns)

            def step(i, lefts, rights, barrier):
                at = pl.ds(jax.lax.rem(i, depths) * DEPTH, DEPTH)
                for part, a in enumerate(refs[: len(wide)]):

                    @pl.when(jax.lax.div(i, depths) == part)
                    def _(part=part, a=a):
                        for half, left in enumerate(lefts):
                            plgpu.copy_gmem_to_smem(a.at[pl.ds(start + half * HALF, HALF), at], left, barrier)
                        for e in range(experts):
                            first = len(wide) + e * len(weights[0]) + part * accumulators

                            @pl.when(mine == e)
                            def _(first=first):
                                for right, w in zip(rights, refs[first : first + accumulators], strict=True):
                                    plgpu.copy_gmem_to_smem(w.at[cols, at] if transposed else w.at[at, cols], right, barrier)

            return step

        return self._launch(
            name,
            fetch,
            epilogue,
            inputs=(*_visits(routing), *wide, *flat, *narrow),
            narrow=len(narrow),
            out=[jax.ShapeDtypeStruct((wide[0].shape[0], m), wide[0].dtype)] * outputs,
            columns=columns,
            accumulators=accumulators,
            transposed=(False, transposed),
            extent=lambda refs: (refs[2][0], depths * len(wide)),
            row_tile=lambda refs, row: refs[0][row],
        )

    def _weight_gradient(self, x: jax.Array, dy: jax.Array, routing: Routing, expert: int) -> jax.Array:
        """x^T @ dy [K, M] over the tiles of one expert; zero where it has none. Empty slots of x and of dy are never both non-zero."""
        (_, k), m = x.shape, dy.shape[1]
        columns = math.gcd(m, COLUMNS)
        first, _ = _tile_ranges(routing)
        place = jnp.stack([first[expert], (routing.counts[expert] + DEPTH - 1) // DEPTH])

        def fetch(refs, row, column):
            place, x, dy = refs
            start = place[0] * ROWS  # in sight of the compiler, which needs to know the alignment

            def step(i, lefts, rights, barrier):
                at = pl.ds(start + i * DEPTH, DEPTH)
                for half, left in enumerate(lefts):
                    plgpu.copy_gmem_to_smem(x.at[at, pl.ds(row * ROWS + half * HALF, HALF)], left, barrier)
                plgpu.copy_gmem_to_smem(dy.at[at, pl.ds(column * columns, columns)], rights[0], barrier)

            return step

        return self._launch(
            "weight_gradient",
            fetch,
            _first,
            inputs=(place, x, dy),
            narrow=0,
            out=[jax.ShapeDtypeStruct((k, m), x.dtype)],
            columns=columns,
            accumulators=1,
            transposed=(True, False),
            extent=lambda refs: (k // ROWS, refs[0][1]),
            row_tile=lambda refs, row: row,
        )[0]

    # -- what they share -------------------------------------------------------------------------------------------------------------

    def _launch(
        self,
        name: str,
        fetch: Callable[..., Callable[..., None]],
        epilogue: Callable[..., tuple[jax.Array, ...]],
        *,
        inputs: tuple[jax.Array, ...],
        narrow: int,
        out: list[jax.ShapeDtypeStruct],
        columns: int,
        accumulators: int,
        transposed: tuple[bool, bool],
        extent: Callable[..., tuple[Any, Any]],
        row_tile: Callable[..., Any],
    ) -> tuple[jax.Array, ...]:
        """A tiled matmul.

        fetch(refs, row, column) -> step(i, lefts, rights, barrier), which starts the copies of step i of a tile: [HALF, DEPTH] for each
        warpgroup and [DEPTH, columns] for each accumulator, or their transposes. The last `narrow` inputs are read in tiles
        like the outputs. extent(refs) -> how many row tiles there are, and the steps of each. row_tile(refs, row) -> where
        in the outputs row tile `row` lies.
        """
        dtype = out[0].dtype
        column_tiles = out[0].shape[1] // columns
        group = math.gcd(column_tiles, GROUP)
        chunk = 32 if narrow else 64  # columns that the epilogue holds in registers at once
        slots = 2 if len(out) == 1 else 1
        left_shape, right_shape = ((n, m) if t else (m, n) for t, (m, n) in zip(transposed, ((HALF, DEPTH), (DEPTH, columns)), strict=True))
        patches = WARPGROUPS * (narrow + slots * len(out)) * HALF * chunk
        stages = min(STAGES, (SHARED // dtype.itemsize - patches) // (DEPTH * (ROWS + accumulators * columns)))

        def body(*refs):
            refs, outs, (lefts, rights, patches_in, patches_out, filled, free, arrived) = _split(refs, len(inputs), len(out))
            refs, narrows = refs[: len(refs) - narrow], refs[len(refs) - narrow :]
            warpgroup = jax.lax.axis_index("warpgroup")
            row_tiles, steps = extent(refs)
            steps = jnp.int32(steps)

            def each_tile(do: Callable[..., None]) -> Any:
                """do(steps before, row, column) for the tiles of this program: groups of columns, in them rows. Returns all steps."""

                @plgpu.nd_loop((row_tiles * column_tiles,), collective_axes="core", init_carry=jnp.int32(0))
                def steps_of_all(loop, carry):
                    (index,) = loop.index
                    inside = jax.lax.rem(index, row_tiles * group)
                    column = jax.lax.div(index, row_tiles * group) * group + jax.lax.rem(inside, group)
                    do(carry, jax.lax.div(inside, group), column)
                    return carry + steps

                return steps_of_all

            @pl.when(warpgroup == WARPGROUPS)
            def _():
                plgpu.set_max_registers(FETCH_REGISTERS, action="decrease")

                def tile(before, row, column):
                    start = fetch(refs, row, column)

                    @pl.loop(0, steps)
                    def _(step):
                        slot = jax.lax.rem(before + step, stages)

                        @pl.when(before + step >= stages)
                        def _():
                            plgpu.barrier_wait(free.at[slot])

                        start(step, [lefts.at[slot, w] for w in range(WARPGROUPS)], [r.at[slot] for r in rights], filled.at[slot])

                total = each_tile(tile)

                @pl.loop(jnp.maximum(total - stages, 0), total)
                def _(step):  # leave when the last buffers have been read
                    plgpu.barrier_wait(free.at[jax.lax.rem(step, stages)])

            @pl.when(warpgroup < WARPGROUPS)
            def _():
                plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")

                def tile(before, row, column):
                    at = pl.ds(row_tile(refs, row) * ROWS + warpgroup * HALF, HALF)

                    def columns_of(i):
                        return pl.ds(column * columns + i * chunk, chunk)

                    def read(i):
                        for n, ref in enumerate(narrows):
                            plgpu.copy_gmem_to_smem(ref.at[at, columns_of(i)], patches_in.at[warpgroup, n], arrived.at[warpgroup])

                    def multiply(*accs):
                        @pl.loop(0, steps)
                        def _(step):
                            slot = jax.lax.rem(before + step, stages)
                            plgpu.barrier_wait(filled.at[slot])
                            a = lefts.at[slot, warpgroup].T if transposed[0] else lefts.at[slot, warpgroup]
                            for acc, right in zip(accs, rights, strict=True):
                                plgpu.wgmma(acc, a, right.at[slot].T if transposed[1] else right.at[slot])
                            plgpu.wgmma_wait(len(accs))  # all but this step's products are done

                            @pl.when(step > 0)
                            def _():
                                plgpu.barrier_arrive(free.at[jax.lax.rem(before + step - 1, stages)])

                        plgpu.wgmma_wait(0)

                        @pl.when(steps > 0)
                        def _():
                            plgpu.barrier_arrive(free.at[jax.lax.rem(before + steps - 1, stages)])

                        return [acc[...] for acc in accs]

                    read(0)
                    products = pl.run_scoped(multiply, *[plgpu.WGMMAAccumulatorRef((HALF, columns), f32)] * accumulators)
                    for i in range(columns // chunk):
                        if narrow:
                            plgpu.barrier_wait(arrived.at[warpgroup])
                        beside = [patches_in[warpgroup, n] for n in range(narrow)]
                        results = epilogue([p[:, i * chunk : (i + 1) * chunk] for p in products], beside)
                        slot = i % slots
                        plgpu.wait_smem_to_gmem((slots - 1) * len(out), wait_read_only=True)
                        for n, result in enumerate(results):
                            patches_out[warpgroup, n * slots + slot] = result.astype(dtype)
                        plgpu.commit_smem()
                        if i + 1 < columns // chunk:
                            read(i + 1)
                        for n, ref in enumerate(outs):
                            plgpu.copy_smem_to_gmem(patches_out.at[warpgroup, n * slots + slot], ref.at[at, columns_of(i)])

                each_tile(tile)
                plgpu.wait_smem_to_gmem(0)

        scratch = [
            _buffer((stages, WARPGROUPS, *left_shape), dtype),
            [_buffer((stages, *right_shape), dtype)] * accumulators,
            _buffer((WARPGROUPS, narrow, HALF, chunk), dtype) if narrow else None,
            _buffer((WARPGROUPS, slots * len(out), HALF, chunk), dtype),
            plgpu.Barrier(num_arrivals=WARPGROUPS + accumulators, num_barriers=stages),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
            plgpu.Barrier(num_arrivals=narrow, num_barriers=WARPGROUPS) if narrow else None,
        ]
        return plgpu.kernel(
            body,
            out_type=tuple(out),
            scratch_types=scratch,
            grid=(self.cores,),
            grid_names=("core",),
            num_threads=WARPGROUPS + 1,
            thread_name="warpgroup",
            kernel_name=f"routed_{name}",
            compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
            interpret=self.interpret or None,
        )(*inputs)


def _split(refs: Sequence[Any], inputs: int, outputs: int) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    return refs[:inputs], refs[inputs : inputs + outputs], refs[inputs + outputs :]


def _buffer(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory in the order that TMA writes and wgmma reads without bank conflicts."""
    swizzle = plgpu.find_swizzle(min(shape[-1] * dtype.itemsize, 128) * 8)
    tiling = plgpu.TilingTransform((8, swizzle // dtype.itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


# ---- epilogues: (products of the tile in float32, narrow tiles) -> output tiles ------------------------------------------------------


def _first(products, narrow):
    return (products[0],)


def _sigmoid(g: jax.Array) -> jax.Array:
    return 1 / (1 + jnp.exp(-g))


def _gate_and_up(products, narrow):
    return tuple(products)


def _gate_up_saved(products, narrow):
    g, u = products
    return g * _sigmoid(g) * u, g, u


def _gate_up(products, narrow):
    return _gate_up_saved(products, narrow)[:1]


def _gate_up_bwd(products, narrow):
    dh, (g, u) = products[0], (a.astype(f32) for a in narrow)
    s = _sigmoid(g)
    act = g * s
    return act * u, dh * u * (s + act * (1 - s)), dh * act
