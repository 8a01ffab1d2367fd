"""The two routed layers behind one name each: shapes are checked and an implementation is chosen here, once, at trace time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax

from pallas_kernels import gpu, ragged, reference, tpu, vjp
from pallas_kernels.device import device_kind, hopper_cores, tpu_generation
from pallas_kernels.routing import SMALL, Routing
from pallas_kernels.xla import Xla

Implementation = Literal["reference", "xla", "ragged", "pallas_tpu", "pallas_gpu"]
IMPLEMENTATIONS = ("reference", "xla", "ragged", "pallas_tpu", "pallas_gpu")


def _check(x: jax.Array, routing: Routing | None, expert: int | None, num_experts: int, name: str) -> None:
    tokens = x.size // x.shape[-1] if x.size else 0
    if routing is None:
        if expert is None or not 0 <= expert < num_experts:
            raise ValueError(f"{name}: routing is None and expert is {expert}; name the one expert of all tokens, 0 to {num_experts - 1}")
        return
    if expert is not None:
        raise ValueError(f"{name}: both a routing and expert {expert} were given; give one of them")
    if tokens != routing.expert.shape[0]:
        raise ValueError(f"{name}: x has shape {x.shape}, {tokens} tokens, but the routing was made for {routing.expert.shape[0]}")
    if num_experts != routing.num_experts:
        raise ValueError(f"{name}: {num_experts} experts were given, but the routing was made for {routing.num_experts}")


def _choose(implementation: Implementation | None, x: jax.Array, widths: tuple[int, ...], routing: Routing, interpret: Any, name: str):
    """The implementation's name and, where `vjp` drives it, its backend."""
    tokens = x.shape[0]
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation is {implementation!r}; use None or one of {', '.join(map(repr, IMPLEMENTATIONS))}")
    generation, cores = tpu_generation(), hopper_cores()
    why_not = {
        "pallas_tpu": tpu.unsupported(generation or "v5e", routing.block_rows, widths, x.dtype),
        "pallas_gpu": gpu.unsupported(routing.block_rows, widths, x.dtype),
    }
    if implementation is None:
        mine = "pallas_tpu" if generation else "pallas_gpu" if cores else "xla"
        implementation = "reference" if tokens < SMALL else "xla" if why_not.get(mine) else mine
    here = {"pallas_tpu": generation, "pallas_gpu": cores}.get(implementation, True)
    reason = why_not.get(implementation)
    if not here and not interpret:
        reason = f"this program is traced for {device_kind()!r}; use 'xla', or interpret in a test"
    if reason:
        raise ValueError(f"{name}: {implementation} cannot run on x {x.shape}: {reason}")
    backends = {"xla": Xla(), "pallas_tpu": tpu.Tpu(generation or "v5e", interpret), "pallas_gpu": gpu.Gpu(cores or 2, interpret)}
    return implementation, backends.get(implementation)


def routed_linear(
    x: jax.Array,
    kernels: Sequence[jax.Array],
    routing: Routing | None,
    biases: Sequence[jax.Array | None] | None = None,
    implementation: Implementation | None = None,
    *,
    expert: int | None = None,
    interpret: Any = False,
) -> jax.Array:
    """y[t] = x[t] @ kernels[e(t)] + biases[e(t)], and 0 for tokens without an expert.

    Args:
      x: [..., K] tokens; all leading dimensions are flattened in the order that `routing` was made for.
      kernels: one [K, M] per expert; cast to the dtype of x.
      routing: from `make_routing`, or None when `expert` names the expert of all tokens: then this is a plain matmul.
      biases: one [M] or None per expert.
      implementation: None takes the fastest that runs: 'pallas_tpu' on a TPU, 'pallas_gpu' on a Hopper GPU (where
        the shapes allow it), 'xla' elsewhere, 'reference' for few tokens.
      expert: which expert serves all tokens, when routing is None.
      interpret: True or `pltpu.InterpretParams` runs 'pallas_tpu' without a TPU, `InterpretGPUParams` 'pallas_gpu' without a GPU, for
        tests.

    Returns [..., M] in the dtype of x. Raises ValueError when shapes disagree, or the chosen implementation cannot run.
    """
    _check(x, routing, expert, len(kernels), "routed_linear")
    shapes = {k.shape for k in kernels}
    if len(shapes) != 1 or kernels[0].shape[0] != x.shape[-1]:
        raise ValueError(f"routed_linear: kernels have shapes {[k.shape for k in kernels]}; all must be [{x.shape[-1]}, M]")
    biases = tuple(biases or [None] * len(kernels))
    width = kernels[0].shape[1]
    if len(biases) != len(kernels) or any(b is not None and b.shape != (width,) for b in biases):
        raise ValueError(
            f"routed_linear: biases have shapes {[b if b is None else b.shape for b in biases]}; each must be [{width}] or None"
        )
    if routing is None:
        return reference.linear(x, kernels[expert or 0], biases[expert or 0])
    flat = x.reshape(-1, x.shape[-1])
    implementation, backend = _choose(implementation, flat, kernels[0].shape, routing, interpret, "routed_linear")
    if backend is not None:
        y = vjp.routed_linear(backend, flat, tuple(kernels), biases, routing)
    else:
        y = (reference if implementation == "reference" else ragged).routed_linear(flat, tuple(kernels), biases, routing)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def routed_swiglu(
    x: jax.Array,
    experts: Sequence[tuple[jax.Array, jax.Array, jax.Array]],
    routing: Routing | None,
    implementation: Implementation | None = None,
    *,
    expert: int | None = None,
    interpret: Any = False,
) -> jax.Array:
    """y[t] = (silu(x[t] @ gate) * (x[t] @ up)) @ down with the weights of expert e(t), and 0 for tokens without one.

    Args:
      x: [..., D] tokens; leading dimensions are flattened in the order that `routing` was made for.
      experts: (gate [D, F], up [D, F], down [F, D]) per expert; cast to the dtype of x.
      routing: from `make_routing`, or None when `expert` names the expert of all tokens: then these are plain matmuls.
      implementation: None takes the fastest that runs: 'pallas_tpu' on a TPU, 'pallas_gpu' on a Hopper GPU (where
        the shapes allow it), 'xla' elsewhere, 'reference' for few tokens.
      expert: which expert serves all tokens, when routing is None.
      interpret: True or `pltpu.InterpretParams` runs 'pallas_tpu' without a TPU, `InterpretGPUParams` 'pallas_gpu' without a GPU, for
        tests.

    Returns [..., D] in the dtype of x. Raises ValueError when shapes disagree, or the chosen implementation cannot run.
    """
    _check(x, routing, expert, len(experts), "routed_swiglu")
    d = x.shape[-1]
    f = experts[0][0].shape[-1]
    for e, ws in enumerate(experts):
        if [w.shape for w in ws] != [(d, f), (d, f), (f, d)]:
            raise ValueError(f"routed_swiglu: expert {e} has shapes {[w.shape for w in ws]}; expected {[(d, f), (d, f), (f, d)]}")
    if routing is None:
        return reference.swiglu(x, *experts[expert or 0])
    flat = x.reshape(-1, d)
    implementation, backend = _choose(implementation, flat, (d, f), routing, interpret, "routed_swiglu")
    if backend is not None:
        y = vjp.routed_swiglu(backend, flat, tuple(experts), routing)
    else:
        y = (reference if implementation == "reference" else ragged).routed_swiglu(flat, tuple(experts), routing)
    return y.reshape(x.shape)
