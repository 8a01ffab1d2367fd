"""The oracle of all tests: every expert computes every token, and each token selects its own result.

Selection happens before and after: an Inf or NaN made by the wrong expert, or in a padding row, reaches neither the output nor a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.routing import Routing


def _select(x: jax.Array, expert: jax.Array, functions: Sequence[Callable[[jax.Array], jax.Array]]) -> jax.Array:
    chosen = [(expert == e)[:, None] for e in range(len(functions))]
    outputs = [jnp.where(mine, f(jnp.where(mine, x, 0)), 0) for mine, f in zip(chosen, functions, strict=True)]
    return sum(outputs[1:], start=outputs[0])


def linear(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    y = x @ kernel.astype(x.dtype)
    return y if bias is None else y + bias.astype(x.dtype)


def swiglu(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    gate, up, down = (w.astype(x.dtype) for w in (gate, up, down))
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


def routed_linear(x: jax.Array, kernels: Sequence[jax.Array], biases: Sequence[jax.Array | None], routing: Routing) -> jax.Array:
    experts = [lambda x, k=k, b=b: linear(x, k, b) for k, b in zip(kernels, biases, strict=True)]
    return _select(x, routing.expert, experts)


def routed_swiglu(x: jax.Array, experts: Sequence[tuple[jax.Array, jax.Array, jax.Array]], routing: Routing) -> jax.Array:
    return _select(x, routing.expert, [lambda x, w=w: swiglu(x, *w) for w in experts])
