"""Routed layers through `jax.lax.ragged_dot`, differentiated by JAX: a baseline to measure against.

On a TPU it is a grouped matmul. On CPU and CUDA it multiplies every token by every expert and masks the tokens with zeros, so that Inf or
NaN in one expert's weights reaches all tokens. It computes the weight gradients of all experts, frozen or not.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.routing import Routing
from pallas_kernels.vjp import Biases, Experts, Kernels, to_slots, to_tokens


def _dot(slots: jax.Array, kernels: Kernels, routing: Routing) -> jax.Array:
    return jax.lax.ragged_dot(slots, jnp.stack([k.astype(slots.dtype) for k in kernels]), routing.blocks * routing.block_rows)


def routed_linear(x: jax.Array, kernels: Kernels, biases: Biases, routing: Routing) -> jax.Array:
    y = to_tokens(_dot(to_slots(x, routing), kernels, routing), routing)
    for e, bias in enumerate(biases):
        if bias is not None:
            y = y + jnp.where((routing.expert == e)[:, None], bias.astype(x.dtype), 0)
    return y


def routed_swiglu(x: jax.Array, experts: Experts, routing: Routing) -> jax.Array:
    gates, ups, downs = zip(*experts, strict=True)
    slots = to_slots(x, routing)
    h = jax.nn.silu(_dot(slots, gates, routing)) * _dot(slots, ups, routing)
    return to_tokens(_dot(h, downs, routing), routing)
