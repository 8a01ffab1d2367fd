"""The two routed layers and their gradients, once for all backends.

A backend computes on slots, tokens sorted by expert (`Routing`); here tokens become slots and back. The gradients are written by hand.
The weight gradient of an expert is a result of its own, made by an operation of its own: nobody asks for a frozen expert's, and the
compiler removes it.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.routing import Routing

Kernels = tuple[jax.Array, ...]
Experts = tuple[tuple[jax.Array, jax.Array, jax.Array], ...]
Biases = tuple[jax.Array | None, ...]


@runtime_checkable
class Backend(Protocol):
    """Rows into slot order and back, and functions on slots [S, width]; hashable.

    Empty slots hold zeros, or rubbish that no token's slot ever reads; where weight gradients read them, the slots of x and dy are zero.
    """

    def to_slots(self, x: jax.Array, routing: Routing) -> jax.Array: ...

    def to_tokens(self, x: jax.Array, routing: Routing) -> jax.Array: ...

    def linear(self, x: jax.Array, kernels: Kernels, routing: Routing) -> jax.Array: ...

    def linear_bwd(self, x: jax.Array, dy: jax.Array, kernels: Kernels, routing: Routing) -> tuple[jax.Array, Kernels]: ...

    def swiglu(self, x: jax.Array, experts: Experts, routing: Routing) -> jax.Array: ...

    def swiglu_fwd(self, x: jax.Array, experts: Experts, routing: Routing) -> tuple[jax.Array, jax.Array, jax.Array]:
        """y, and what the backward pass needs: x @ gate and x @ up."""
        ...

    def gate_up(self, x: jax.Array, experts: Experts, routing: Routing) -> tuple[jax.Array, jax.Array]:
        """What the backward pass needs, alone."""
        ...

    def swiglu_bwd(
        self, x: jax.Array, g: jax.Array, u: jax.Array, dy: jax.Array, experts: Experts, routing: Routing
    ) -> tuple[jax.Array, Experts]: ...


# ---- linear ------------------------------------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(backend: Backend, x: jax.Array, kernels: Kernels, biases: Biases, routing: Routing) -> jax.Array:
    return _linear_fwd(backend, x, kernels, biases, routing)[0]


def _linear_fwd(backend, x, kernels, biases, routing):
    slots = backend.to_slots(x, routing)
    y = backend.to_tokens(backend.linear(slots, kernels, routing), routing)
    for e, bias in enumerate(biases):
        if bias is not None:
            y = y + jnp.where((routing.expert == e)[:, None], bias, 0)
    return y, (slots, kernels, biases, routing)


def _linear_bwd(backend, saved, dy):
    slots, kernels, biases, routing = saved
    dx, dkernels = backend.linear_bwd(slots, backend.to_slots(dy, routing), kernels, routing)
    dbiases = tuple(
        None if bias is None else jnp.where((routing.expert == e)[:, None], dy, 0).astype(jnp.float32).sum(0).astype(bias.dtype)
        for e, bias in enumerate(biases)
    )
    return backend.to_tokens(dx, routing), dkernels, dbiases, None


_linear.defvjp(_linear_fwd, _linear_bwd)


def routed_linear(backend: Backend, x: jax.Array, kernels: Kernels, biases: Biases, routing: Routing) -> jax.Array:
    """x [N, K], kernels [K, M] and biases [M] or None, of any dtype -> [N, M] in the dtype of x."""
    kernels = tuple(k.astype(x.dtype) for k in kernels)
    return _linear(backend, x, kernels, tuple(None if b is None else b.astype(x.dtype) for b in biases), routing)


# ---- SwiGLU ------------------------------------------------------------------------------------------------------------------------


def _swiglu(backend: Backend, x: jax.Array, experts: Experts, routing: Routing) -> jax.Array:
    return backend.to_tokens(backend.swiglu(backend.to_slots(x, routing), experts, routing), routing)


def _swiglu_fwd(backend, x, experts, routing):
    slots = backend.to_slots(x, routing)
    y, g, u = backend.swiglu_fwd(slots, experts, routing)
    g, u = checkpoint_name(g, "gate"), checkpoint_name(u, "up")
    return backend.to_tokens(y, routing), (slots, g, u, experts, routing)


def _swiglu_fwd_apart(backend, x, experts, routing):
    slots = backend.to_slots(x, routing)
    y = backend.to_tokens(backend.swiglu(slots, experts, routing), routing)
    return y, (slots, *backend.gate_up(slots, experts, routing), experts, routing)


def _swiglu_bwd(backend, saved, dy):
    slots, g, u, experts, routing = saved
    dx, dexperts = backend.swiglu_bwd(slots, g, u, backend.to_slots(dy, routing), experts, routing)
    return backend.to_tokens(dx, routing), dexperts, None


_swiglu_saved, _swiglu_recomputed = (jax.custom_vjp(_swiglu, nondiff_argnums=(0,)) for _ in range(2))
_swiglu_saved.defvjp(_swiglu_fwd, _swiglu_bwd)
_swiglu_recomputed.defvjp(_swiglu_fwd_apart, _swiglu_bwd)


def routed_swiglu(backend: Backend, x: jax.Array, experts: Experts, routing: Routing, recomputed: bool = False) -> jax.Array:
    """x [N, D], experts (gate [D, F], up [D, F], down [F, D]) of any dtype -> [N, D] in the dtype of x.

    recomputed: y is made by one operation, and what the backward pass needs by another: the pass that does not use it drops it.
    """
    gates, ups, downs = (tuple(w.astype(x.dtype) for w in ws) for ws in zip(*experts, strict=True))
    run = _swiglu_recomputed if recomputed else _swiglu_saved
    return run(backend, x, tuple(zip(gates, ups, downs, strict=True)), routing)
