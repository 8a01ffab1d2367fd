"""The two routed layers behind one name each: shapes are checked here, once, at trace time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax

from pallas_kernels import reference, xla
from pallas_kernels.routing import SMALL, Routing

Implementation = Literal["reference", "xla"]


def _check(x: jax.Array, routing: Routing, num_experts: int, name: str) -> None:
    tokens = x.size // x.shape[-1] if x.size else 0
    if tokens != routing.expert.shape[0]:
        raise ValueError(f"{name}: x has shape {x.shape}, {tokens} tokens, but the routing was made for {routing.expert.shape[0]}")
    if num_experts != routing.num_experts:
        raise ValueError(f"{name}: {num_experts} experts were given, but the routing was made for {routing.num_experts}")


def _choose(implementation: Implementation | None, tokens: int):
    if implementation is None:
        implementation = "reference" if tokens < SMALL else "xla"
    if implementation not in ("reference", "xla"):
        raise ValueError(f"implementation is {implementation!r}; use None, 'reference' or 'xla'")
    return {"reference": reference, "xla": xla}[implementation]


def routed_linear(
    x: jax.Array,
    kernels: Sequence[jax.Array],
    routing: Routing,
    biases: Sequence[jax.Array | None] | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """y[t] = x[t] @ kernels[e(t)] + biases[e(t)], and 0 for tokens without an expert.

    Args:
      x: [..., K] tokens; all leading dimensions are flattened in the order that `routing` was made for.
      kernels: one [K, M] per expert; cast to the dtype of x.
      routing: from `make_routing`.
      biases: one [M] or None per expert.
      implementation: None takes the fastest for the shapes.

    Returns [..., M] in the dtype of x. Raises ValueError when shapes disagree.
    """
    _check(x, routing, len(kernels), "routed_linear")
    shapes = {k.shape for k in kernels}
    if len(shapes) != 1 or kernels[0].shape[0] != x.shape[-1]:
        raise ValueError(f"routed_linear: kernels have shapes {[k.shape for k in kernels]}; all must be [{x.shape[-1]}, M]")
    biases = tuple(biases or [None] * len(kernels))
    width = kernels[0].shape[1]
    if len(biases) != len(kernels) or any(b is not None and b.shape != (width,) for b in biases):
        raise ValueError(
            f"routed_linear: biases have shapes {[b if b is None else b.shape for b in biases]}; each must be [{width}] or None"
        )
    flat = x.reshape(-1, x.shape[-1])
    y = _choose(implementation, flat.shape[0]).routed_linear(flat, tuple(kernels), biases, routing)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def routed_swiglu(
    x: jax.Array,
    experts: Sequence[tuple[jax.Array, jax.Array, jax.Array]],
    routing: Routing,
    implementation: Implementation | None = None,
) -> jax.Array:
    """y[t] = (silu(x[t] @ gate) * (x[t] @ up)) @ down with the weights of expert e(t), and 0 for tokens without one.

    Args:
      x: [..., D] tokens; leading dimensions are flattened in the order that `routing` was made for.
      experts: (gate [D, F], up [D, F], down [F, D]) per expert; cast to the dtype of x.
      routing: from `make_routing`.
      implementation: None takes the fastest for the shapes.

    Returns [..., D] in the dtype of x. Raises ValueError when shapes disagree.
    """
    _check(x, routing, len(experts), "routed_swiglu")
    d = x.shape[-1]
    f = experts[0][0].shape[-1]
    for e, ws in enumerate(experts):
        if [w.shape for w in ws] != [(d, f), (d, f), (f, d)]:
            raise ValueError(f"routed_swiglu: expert {e} has shapes {[w.shape for w in ws]}; expected {[(d, f), (d, f), (f, d)]}")
    flat = x.reshape(-1, d)
    return _choose(implementation, flat.shape[0]).routed_swiglu(flat, tuple(experts), routing).reshape(x.shape)
