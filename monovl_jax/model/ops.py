"""What depends on the machine and the run, as one frozen dataclass. A mesh or a faster kernel is another `Ops`, never another model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

import pallas_kernels
from monovl_jax.model.attention import attention

Remat = Literal["none", "save_projections", "full"]


def _no_constraint(x: jax.Array, kind: str) -> jax.Array:
    del kind
    return x


def _on_one_device(f: Callable[..., Any], part: str) -> Callable[..., Any]:
    del part
    return f


@dataclasses.dataclass(frozen=True)
class Ops:
    """How the model computes: a value, equal for equal fields, so that it can be a static argument of `jax.jit`. The defaults run anywhere
    on one device.

    dtype: of activations and of the weights in a matmul; norms, softmax, rotary tables and logits are float32 regardless.
    remat: what the backward pass of a layer recomputes: nothing, all but attention output, gate and up, or everything.
    implementation: of the routed layers (pallas_kernels.routed_swiglu): None takes the fastest that runs, the Pallas kernels on a TPU;
      'xla' or 'reference' does without them.
    routed_swiglu: called as routed_swiglu(x, experts, routing, recomputed=...), where recomputed says that the layer keeps nothing for the
      backward pass.
    constrain: called as constrain(array, kind) with kind 'tokens' | 'logits' | 'heads'; a mesh places arrays there.
    over_mesh: called as over_mesh(f, part), gives the function that computes f over a mesh; part is 'vision' | 'projector_in' |
      'projector_out' | 'embedding' | 'routing' | 'qkv' | 'attention' | 'out' | 'mlp' | 'nll' (`parallel.ops` says what lies where).
    """

    dtype: Any = jnp.float32
    remat: Remat = "none"
    implementation: pallas_kernels.Implementation | None = None
    attention: Callable[..., jax.Array] = attention
    make_routing: Callable[..., pallas_kernels.Routing] = pallas_kernels.make_routing
    routed_linear: Callable[..., jax.Array] = pallas_kernels.routed_linear
    routed_swiglu: Callable[..., jax.Array] = pallas_kernels.routed_swiglu
    constrain: Callable[[jax.Array, str], jax.Array] = _no_constraint
    over_mesh: Callable[[Callable[..., Any], str], Callable[..., Any]] = _on_one_device

    def __post_init__(self) -> None:
        if self.remat not in ("none", "save_projections", "full"):
            raise ValueError(f"remat is {self.remat!r}; use 'none', 'save_projections' or 'full'")

    def by_expert(self, layer: Callable[..., jax.Array], **options: Any) -> Callable[..., jax.Array]:
        """`routed_linear` or `routed_swiglu` with the implementation chosen here, and further options of its own."""
        if self.implementation is not None:
            options["implementation"] = self.implementation
        return functools.partial(layer, **options) if options else layer
