"""Routed layers in plain XLA with static shapes: sort the tokens by expert, then let each expert run on just its own rows.

The row count of an expert is known only at run time, so `lax.switch` picks one of seventeen programs, compiled for 0, 1, ... 16 blocks of
rows. No count can overflow, and all experts together compute less than an eighth more rows than the tokens they own.

Derived gradients would keep the residuals of every branch, hence `vjp`. The weight gradient of an expert is a separate result of its
switch, which XLA removes when nobody asks for it (a frozen expert).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.routing import Routing, to_slots, to_tokens
from pallas_kernels.vjp import Experts, Kernels

Arrays = tuple[jax.Array, ...]


def _each_expert(
    routing: Routing, f: Callable[..., tuple[Arrays, Any]], rows: Arrays, weights: tuple[Any, ...], widths: tuple[int, ...]
) -> tuple[Arrays, list[Any]]:
    """Runs `f(rows of the expert, its weights) -> (row results, sums)` for every expert.

    rows: arrays [S, ...] in slot order. Returns the row results, [S, width] each, written in slot order, and the sums of each expert.
    """
    block = routing.block_rows
    slots = routing.source.shape[0]
    out: Arrays = tuple(jnp.zeros((slots, width), rows[0].dtype) for width in widths)
    sums, start = [], jnp.int32(0)
    for e, w in enumerate(weights):

        def run(blocks: int, out: Arrays, rows: Arrays, w: Any, start: jax.Array) -> tuple[Arrays, Any]:
            n = blocks * block
            if n == 0:
                shapes = jax.eval_shape(f, tuple(r[:block] for r in rows), w)[1]
                return out, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            mine = tuple(jax.lax.dynamic_slice_in_dim(r, start, n) for r in rows)
            results, total = f(mine, w)
            return tuple(jax.lax.dynamic_update_slice_in_dim(o, r, start, 0) for o, r in zip(out, results, strict=True)), total

        branches = [partial(run, b) for b in range(routing.max_blocks + 1)]
        out, total = jax.lax.switch(routing.blocks[e], branches, out, rows, w, start * block)
        sums.append(total)
        start = start + routing.blocks[e]
    return out, sums


@dataclasses.dataclass(frozen=True)
class Xla:
    """The backend of `vjp`."""

    to_slots, to_tokens = staticmethod(to_slots), staticmethod(to_tokens)

    def linear(self, x: jax.Array, kernels: Kernels, routing: Routing) -> jax.Array:
        def f(rows, kernel):
            return (rows[0] @ kernel,), ()

        return _each_expert(routing, f, (x,), kernels, (kernels[0].shape[1],))[0][0]

    def linear_bwd(self, x: jax.Array, dy: jax.Array, kernels: Kernels, routing: Routing) -> tuple[jax.Array, Kernels]:
        def f(rows, kernel):
            x, dy = rows
            return (dy @ kernel.T,), x.T @ dy

        (dx,), dkernels = _each_expert(routing, f, (x, dy), kernels, (x.shape[1],))
        return dx, tuple(dkernels)

    def swiglu(self, x: jax.Array, experts: Experts, routing: Routing) -> jax.Array:
        def f(rows, w):
            (x,), (gate, up, down) = rows, w
            return ((jax.nn.silu(x @ gate) * (x @ up)) @ down,), ()

        return _each_expert(routing, f, (x,), experts, (x.shape[1],))[0][0]

    def swiglu_fwd(self, x: jax.Array, experts: Experts, routing: Routing) -> tuple[jax.Array, jax.Array, jax.Array]:
        def f(rows, w):
            (x,), (gate, up, down) = rows, w
            g, u = x @ gate, x @ up
            return ((jax.nn.silu(g) * u) @ down, g, u), ()

        width = experts[0][0].shape[1]
        (y, g, u), _ = _each_expert(routing, f, (x,), experts, (x.shape[1], width, width))
        return y, g, u

    def gate_up(self, x: jax.Array, experts: Experts, routing: Routing) -> tuple[jax.Array, jax.Array]:
        def f(rows, w):
            (x,), (gate, up, _) = rows, w
            return (x @ gate, x @ up), ()

        width = experts[0][0].shape[1]
        return _each_expert(routing, f, (x,), experts, (width, width))[0]  # type: ignore[return-value]

    def swiglu_bwd(
        self, x: jax.Array, g: jax.Array, u: jax.Array, dy: jax.Array, experts: Experts, routing: Routing
    ) -> tuple[jax.Array, Experts]:
        def f(rows, w):
            (x, g, u, dy), (gate, up, down) = rows, w
            s = jax.nn.sigmoid(g)
            act = g * s
            dh = dy @ down.T
            dg, du = dh * u * (s + act * (1 - s)), dh * act
            return (dg @ gate.T + du @ up.T,), (x.T @ dg, x.T @ du, (act * u).T @ dy)

        (dx,), dexperts = _each_expert(routing, f, (x, g, u, dy), experts, (x.shape[1],))
        return dx, tuple(dexperts)
