"""Routed layers in plain XLA with static shapes: sort the tokens by expert, then let each expert run on just its own rows.

The row count of an expert is known only at run time, so `lax.switch` picks one of BLOCKS + 1 programs, compiled for 0, 1, ... BLOCKS blocks
of rows. No count can overflow, and all experts together compute less than an eighth more rows than the tokens they own.

The gradients are written by hand: derived ones would keep the residuals of every branch. The weight gradient of an expert is a
separate result of its switch, which XLA removes when nobody asks for it (a frozen expert).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.routing import BLOCKS, Routing

Arrays = tuple[jax.Array, ...]


def _to_slots(x: jax.Array, routing: Routing) -> jax.Array:
    """[N, D] tokens -> [S, D] slots; empty slots are zero, so that they add nothing to a weight gradient."""
    return x.at[routing.source].get(mode="fill", fill_value=0)


def _to_tokens(x: jax.Array, routing: Routing) -> jax.Array:
    """[S, D] slots -> [N, D] tokens; padding tokens are zero."""
    return x.at[routing.slot].get(mode="fill", fill_value=0)


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

        branches = [partial(run, b) for b in range(BLOCKS + 1)]
        out, total = jax.lax.switch(routing.blocks[e], branches, out, rows, w, start * block)
        sums.append(total)
        start = start + routing.blocks[e]
    return out, sums


# ---- linear ------------------------------------------------------------------------------------------------------------------------


@jax.custom_vjp
def _linear(x: jax.Array, weights: tuple[tuple[jax.Array, jax.Array | None], ...], routing: Routing) -> jax.Array:
    return _linear_fwd(x, weights, routing)[0]


def _linear_fwd(x, weights, routing):
    def f(rows, w):
        (x,), (kernel, bias) = rows, w
        y = x @ kernel
        return (y if bias is None else y + bias,), ()

    slots = _to_slots(x, routing)
    (y,), _ = _each_expert(routing, f, (slots,), weights, (weights[0][0].shape[1],))
    return _to_tokens(y, routing), (slots, weights, routing)


def _linear_bwd(saved, dy):
    slots, weights, routing = saved

    def f(rows, w):
        (x, dy), (kernel, bias) = rows, w
        dbias = None if bias is None else dy.astype(jnp.float32).sum(0).astype(bias.dtype)
        return (dy @ kernel.T,), (x.T @ dy, dbias)

    (dx,), dw = _each_expert(routing, f, (slots, _to_slots(dy, routing)), weights, (slots.shape[1],))
    return _to_tokens(dx, routing), tuple(dw), None


_linear.defvjp(_linear_fwd, _linear_bwd)


def routed_linear(x: jax.Array, kernels: tuple[jax.Array, ...], biases: tuple[jax.Array | None, ...], routing: Routing) -> jax.Array:
    weights = tuple((k.astype(x.dtype), None if b is None else b.astype(x.dtype)) for k, b in zip(kernels, biases, strict=True))
    return _linear(x, weights, routing)


# ---- SwiGLU ------------------------------------------------------------------------------------------------------------------------


@jax.custom_vjp
def _swiglu(x: jax.Array, weights: tuple[tuple[jax.Array, jax.Array, jax.Array], ...], routing: Routing) -> jax.Array:
    return _swiglu_fwd(x, weights, routing)[0]


def _swiglu_fwd(x, weights, routing):
    def f(rows, w):
        (x,), (gate, up, down) = rows, w
        g, u = x @ gate, x @ up
        return ((jax.nn.silu(g) * u) @ down, g, u), ()

    slots = _to_slots(x, routing)
    width = weights[0][0].shape[1]
    (y, g, u), _ = _each_expert(routing, f, (slots,), weights, (x.shape[1], width, width))
    g, u = checkpoint_name(g, "gate"), checkpoint_name(u, "up")
    return _to_tokens(y, routing), (slots, g, u, weights, routing)


def _swiglu_bwd(saved, dy):
    slots, g, u, weights, routing = saved

    def f(rows, w):
        (x, g, u, dy), (gate, up, down) = rows, w
        s = jax.nn.sigmoid(g)
        act = g * s
        dh = dy @ down.T
        dg, du = dh * u * (s + act * (1 - s)), dh * act
        return (dg @ gate.T + du @ up.T,), (x.T @ dg, x.T @ du, (act * u).T @ dy)

    (dx,), dw = _each_expert(routing, f, (slots, g, u, _to_slots(dy, routing)), weights, (slots.shape[1],))
    return _to_tokens(dx, routing), tuple(dw), None


_swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)


def routed_swiglu(x: jax.Array, experts: tuple[tuple[jax.Array, jax.Array, jax.Array], ...], routing: Routing) -> jax.Array:
    return _swiglu(x, tuple(tuple(w.astype(x.dtype) for w in ws) for ws in experts), routing)  # type: ignore[misc]
