"""Norms and the dense layers that every part uses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from pallas_kernels import Routing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A kernel [K, M] with a low-rank adapter beside it: it computes x @ kernel + (x @ a) @ b, and kernel + a @ b is never made.

    a: [K, R]. b: [R, M], with the adapter's scale in it.
    """

    kernel: jax.Array | Any  # Any: JAX rebuilds pytrees with placeholders in place of arrays
    a: jax.Array | Any
    b: jax.Array | Any


Kernel = jax.Array | Adapted


def rms_norm(x: Float[Array, "*b d"], scale: Float[Array, " d"], eps: float) -> Float[Array, "*b d"]:
    """RMSNorm: float32 statistics, cast back to the dtype of x BEFORE the weight is applied (modeling_internlm2_ve.py:138-143)."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    # The product of two rounded factors, rounded: what a multiplication in x.dtype gives, but the gradient of the scale adds up in float32.
    return (x32.astype(x.dtype).astype(jnp.float32) * scale.astype(x.dtype).astype(jnp.float32)).astype(x.dtype)


def layer_norm(x: Float[Array, "*b d"], scale: Float[Array, " d"], bias: Float[Array, " d"], eps: float) -> Float[Array, "*b d"]:
    """LayerNorm in float32, result in the dtype of x."""
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


@jax.custom_vjp
def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32)


def _product_bwd(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    dy = dy.astype(x.dtype)
    return dy @ kernel.T, x.T @ dy


_product.defvjp(lambda x, kernel: (_product(x, kernel), (x, kernel)), _product_bwd)


def product(x: Float[Array, "*b k"], kernel: Float[Array, "k m"]) -> Float[Array, "*b m"]:
    """float32 x @ kernel of factors in the dtype of x; the products of its gradient are in the dtype of x too."""
    return _product(x.reshape(-1, x.shape[-1]), kernel.astype(x.dtype)).reshape(*x.shape[:-1], kernel.shape[-1])


def linear(x: Float[Array, "*b k"], kernel: Float[Array, "k m"] | Adapted, bias: Float[Array, " m"] | None = None) -> Float[Array, "*b m"]:
    """x @ kernel + bias in the dtype of x. Leading dimensions are flattened: one big matmul is faster than a batch of small ones on CPU."""
    if isinstance(kernel, Adapted):
        y = product(x, kernel.kernel) + product(linear(x, kernel.a), kernel.b)
        return (y if bias is None else y + bias.astype(x.dtype)).astype(x.dtype)
    y = (x.reshape(-1, x.shape[-1]) @ kernel.astype(x.dtype)).reshape(*x.shape[:-1], kernel.shape[-1])
    return y if bias is None else y + bias.astype(x.dtype)


def swiglu(x: Float[Array, "*b d"], gate: Kernel, up: Kernel, down: Kernel) -> Float[Array, "*b d"]:
    """down(silu(gate(x)) * up(x)) (upstream modeling_internlm2_ve.py:264-278)."""
    g = checkpoint_name(linear(x, gate), "gate")
    u = checkpoint_name(linear(x, up), "up")
    return linear(jax.nn.silu(g) * u, down)


def routed_linear(
    plain: Callable[..., jax.Array],
    x: Float[Array, "*b k"],
    kernels: Sequence[Kernel],
    routing: Routing,
    biases: Sequence[jax.Array | None] | None = None,
) -> Float[Array, "*b m"]:
    """`plain` (pallas_kernels.routed_linear, or one like it) for kernels of which some may have adapters.

    Returns the dtype of x without adapters, float32 with them: `plain` has rounded its result, and a small update added to what is rounded
    already would vanish in a second rounding, so whoever takes the sum on rounds it.
    """
    return _updated(plain(x, _without_adapters(kernels), routing, biases), x, kernels, routing)


def _without_adapters(kernels: Sequence[Kernel]) -> tuple[jax.Array, ...]:
    return tuple(k.kernel if isinstance(k, Adapted) else k for k in kernels)


def _updated(y: jax.Array, x: jax.Array, kernels: Sequence[Kernel], routing: Routing) -> jax.Array:
    """float32 y + (x @ a) @ b by the adapter of each token's expert; y as it is where no kernel has one.

    The adapters of all experts are one matmul, of which each token keeps the columns of its own expert: they are too narrow for tokens to
    be worth sorting.
    """
    adapted = [(expert, k) for expert, k in enumerate(kernels) if isinstance(k, Adapted)]
    if not adapted:
        return y
    a, b = jnp.concatenate([k.a for _, k in adapted], axis=1), jnp.concatenate([k.b for _, k in adapted], axis=0)
    owner = jnp.concatenate([jnp.full(k.a.shape[1], expert) for expert, k in adapted])
    own = routing.expert.reshape(*x.shape[:-1], 1) == owner
    return y.astype(jnp.float32) + product(jnp.where(own, linear(x, a), 0), b)


def adapted_swiglu(
    plain: Callable[..., jax.Array], x: Float[Array, "*b d"], experts: Sequence[tuple[Kernel, Kernel, Kernel]], routing: Routing
) -> Float[Array, "*b d"]:
    """Routed feed-forward experts (gate, up, down) of which some kernels have adapters: three `routed_linear` over `plain`."""
    gates, ups, downs = zip(*experts, strict=True)

    @jax.checkpoint  # keeps g and u as they were rounded, not their float32 sums with the updates
    def hidden(x: jax.Array, g: jax.Array, u: jax.Array) -> jax.Array:
        return (jax.nn.silu(_updated(g, x, gates, routing)) * _updated(u, x, ups, routing)).astype(x.dtype)

    g = checkpoint_name(plain(x, _without_adapters(gates), routing), "gate")
    u = checkpoint_name(plain(x, _without_adapters(ups), routing), "up")
    return routed_linear(plain, hidden(x, g, u), downs, routing)
