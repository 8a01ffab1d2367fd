"""Routed layers through a grouped matmul, `jax.lax.ragged_dot` or one that is called like it: baselines to measure against.

JAX differentiates them. On a TPU `ragged_dot` is a grouped matmul. On CPU and CUDA it multiplies every token by every expert and masks the
tokens with zeros, so that Inf or NaN in one expert's weights reaches all tokens. It computes the weight gradients of all experts, frozen or
not.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.device import tpu_generation
from pallas_kernels.routing import Routing, to_slots, to_tokens
from pallas_kernels.vjp import Biases, Experts, Kernels


def _dot(slots: jax.Array, kernels: Kernels, routing: Routing, dot: Callable[..., jax.Array] = jax.lax.ragged_dot) -> jax.Array:
    stacked = jnp.stack([k.astype(slots.dtype) for k in kernels])
    return dot(slots, stacked, group_sizes=routing.blocks * routing.block_rows)


def routed_linear(x: jax.Array, kernels: Kernels, biases: Biases, routing: Routing) -> jax.Array:
    y = to_tokens(_dot(to_slots(x, routing), kernels, routing), routing)
    for e, bias in enumerate(biases):
        if bias is not None:
            y = y + jnp.where((routing.expert == e)[:, None], bias.astype(x.dtype), 0)
    return y


def routed_swiglu(x: jax.Array, experts: Experts, routing: Routing, dot: Callable[..., jax.Array] = jax.lax.ragged_dot) -> jax.Array:
    gates, ups, downs = zip(*experts, strict=True)
    slots = to_slots(x, routing)
    h = jax.nn.silu(_dot(slots, gates, routing, dot)) * _dot(slots, ups, routing, dot)
    return to_tokens(_dot(h, downs, routing, dot), routing)


def _megablox(slots: jax.Array, kernels: jax.Array, *, group_sizes: jax.Array, interpret: bool = False) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.megablox import ops

    tiling = tuple(min(most, width) for most, width in zip((512, 1024, 1024), (slots.shape[0], *kernels.shape[1:]), strict=True))
    return ops.gmm(slots, kernels, group_sizes, slots.dtype, tiling, None, None, False, interpret)


def others() -> dict[str, Callable[..., jax.Array]]:
    """Grouped matmuls that are not ours and run here, for `routed_swiglu`'s dot: megablox on a TPU, tokamax where it is installed."""
    found: dict[str, Any] = {"megablox": _megablox} if tpu_generation() else {}
    if importlib.util.find_spec("tokamax"):
        import tokamax  # type: ignore[import-not-found]

        found["tokamax"] = tokamax.ragged_dot
    return found
