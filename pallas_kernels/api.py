"""The two routed layers behind one name each: shapes are checked and an implementation is chosen here, once, at trace time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels import ragged, reference, tpu, vjp
from pallas_kernels.device import device_kind, hopper_cores, tpu_generation
from pallas_kernels.routing import SMALL, Routing
from pallas_kernels.xla import Xla

Implementation = Literal["reference", "xla", "ragged", "pallas_tpu", "pallas_gpu"]
IMPLEMENTATIONS = ("reference", "xla", "ragged", "pallas_tpu", "pallas_gpu")


def _check(x: jax.Array, routing: Routing | None, expert: int | None, num_experts: int, name: str, weights: Any) -> None:
    kinds = {a.dtype.name for a in jax.tree.leaves((x, weights))}
    if not all(jnp.issubdtype(kind, jnp.floating) for kind in kinds):
        raise ValueError(f"{name}: x and the weights have dtypes {', '.join(sorted(kinds))}; they must be real floating-point numbers")
    if x.ndim < 2 or not x.size:
        raise ValueError(f"{name}: x has shape {x.shape}; give at least one token, [tokens, width]")
    tokens = x.size // x.shape[-1]
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


def _check_each(
    name: str, what: str, given: Sequence[Sequence[jax.Array | None]] | None, num_experts: int, shapes: Sequence[tuple]
) -> None:
    """One entry per expert, each of these shapes or None."""
    if given is None:
        return
    found = [[None if a is None else a.shape for a in of_expert] for of_expert in given]
    if len(found) != num_experts or any(len(f) != len(shapes) or any(g not in (None, s) for g, s in zip(f, shapes)) for f in found):
        raise ValueError(f"{name}: {what} have shapes {found}; expected {list(shapes)} or None for each of {num_experts} experts")


def _choose(
    implementation: Implementation | None, x: jax.Array, widths: tuple[int, ...], routing: Routing, interpret: Any, name: str, matrices: int
):
    """The implementation's name and, where `vjp` drives it, its backend."""
    tokens = x.shape[0]
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation is {implementation!r}; use None or one of {', '.join(map(repr, IMPLEMENTATIONS))}")
    generation, cores = tpu_generation(), hopper_cores()
    why_not_tpu = tpu.unsupported(generation or "v5e", routing, widths, x.dtype, matrices, bool(interpret))
    if implementation is None:  # pallas_gpu only by name: no GPU has run it yet
        on_tpu = generation and not why_not_tpu
        implementation = "reference" if tokens < SMALL else "pallas_tpu" if on_tpu else "xla"
    backend, here, why_not = None, True, None
    if implementation == "xla":
        backend = Xla()
    elif implementation == "pallas_tpu":
        backend, here, why_not = tpu.Tpu(generation or "v5e", interpret), generation, why_not_tpu
    elif implementation == "pallas_gpu":
        try:
            from pallas_kernels import gpu
        except ModuleNotFoundError as error:  # jax's own modules for it need more than jax installs
            raise ValueError(f"{name}: pallas_gpu needs {error.name}; pip install absl-py") from error
        backend, here, why_not = gpu.Gpu(cores or 2, interpret), cores, gpu.unsupported(routing, widths, x.dtype)
    if not here and not interpret:
        why_not = f"this program is traced for {device_kind()!r}; use 'xla', or interpret in a test"
    if why_not:
        raise ValueError(f"{name}: {implementation} cannot run on x {x.shape}: {why_not}")
    return implementation, backend


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
      implementation: None takes the fastest that runs: 'pallas_tpu' on a TPU, 'xla' elsewhere, 'reference' for few tokens.
        'pallas_gpu' is taken by name alone, until it has run on a GPU.
      expert: which expert serves all tokens, when routing is None.
      interpret: True or `pltpu.InterpretParams` runs 'pallas_tpu' without a TPU, `InterpretGPUParams` 'pallas_gpu' without a GPU, for
        tests.

    Returns [..., M] in the dtype of x. Raises ValueError when shapes disagree, or the chosen implementation cannot run.
    """
    _check(x, routing, expert, len(kernels), "routed_linear", (kernels, biases))
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
    implementation, backend = _choose(implementation, flat, kernels[0].shape, routing, interpret, "routed_linear", matrices=1)
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
    biases: Sequence[tuple[jax.Array | None, jax.Array | None, jax.Array | None]] | None = None,
    token_gates: Sequence[tuple[jax.Array, jax.Array | None]] | None = None,
    expert: int | None = None,
    recomputed: bool = False,
    interpret: Any = False,
) -> jax.Array:
    """y[t] = (silu(x[t] @ gate) * (x[t] @ up)) @ down with the weights of expert e(t), and 0 for tokens without one.

    Args:
      x: [..., D] tokens; leading dimensions are flattened in the order that `routing` was made for.
      experts: (gate [D, F], up [D, F], down [F, D]) per expert; cast to the dtype of x.
      routing: from `make_routing`, or None when `expert` names the expert of all tokens: then these are plain matmuls.
      implementation: None takes the fastest that runs: 'pallas_tpu' on a TPU, 'xla' elsewhere, 'reference' for few tokens.
        'pallas_gpu' is taken by name alone, until it has run on a GPU.
      biases: (of gate [F], of up [F], of down [D]) per expert, each may be None. With them the layer is three `routed_linear`.
      token_gates: (kernel [D, 1], bias [1] or None) per expert: y[t] is multiplied by sigmoid(x[t] @ kernel + bias) (BREEN).
      expert: which expert serves all tokens, when routing is None.
      recomputed: say so where the layer is under `jax.checkpoint` and nothing of it is kept for the backward pass. The forward pass then
        does not write x @ gate and x @ up, and the recomputation makes these alone. The result is the same either way, and so is what
        is computed by 'reference', by 'ragged' and with biases.
      interpret: True or `pltpu.InterpretParams` runs 'pallas_tpu' without a TPU, `InterpretGPUParams` 'pallas_gpu' without a GPU, for
        tests.

    Returns [..., D] in the dtype of x. Raises ValueError when shapes disagree, or the chosen implementation cannot run.
    """
    name = "routed_swiglu"
    _check(x, routing, expert, len(experts), name, (experts, biases, token_gates))
    d = x.shape[-1]
    f = experts[0][0].shape[-1]
    for e, ws in enumerate(experts):
        if [w.shape for w in ws] != [(d, f), (d, f), (f, d)]:
            raise ValueError(f"{name}: expert {e} has shapes {[w.shape for w in ws]}; expected {[(d, f), (d, f), (f, d)]}")
    _check_each(name, "token_gates", token_gates, len(experts), ((d, 1), (1,)))
    _check_each(name, "biases", biases, len(experts), ((f,), (f,), (d,)))
    if biases is not None:
        kernels, offsets = (list(zip(*of_experts, strict=True)) for of_experts in (experts, biases))

        def project(x: jax.Array, part: int) -> jax.Array:
            return routed_linear(x, kernels[part], routing, offsets[part], implementation, expert=expert, interpret=interpret)

        y = project(jax.nn.silu(project(x, 0)) * project(x, 1), 2)
    elif routing is None:
        y = reference.swiglu(x, *experts[expert or 0])
    else:
        flat = x.reshape(-1, d)
        implementation, backend = _choose(implementation, flat, (d, f), routing, interpret, name, matrices=3)
        if backend is not None:
            y = vjp.routed_swiglu(backend, flat, tuple(experts), routing, recomputed)
        else:
            y = (reference if implementation == "reference" else ragged).routed_swiglu(flat, tuple(experts), routing)
        y = y.reshape(x.shape)
    if token_gates is None:
        return y
    # a single column is no work for a matmul unit, and the reference lets no expert's NaN into another's tokens
    kernels, offsets = zip(*token_gates, strict=True)
    return y * jax.nn.sigmoid(routed_linear(x, kernels, routing, offsets, None if routing is None else "reference", expert=expert))
