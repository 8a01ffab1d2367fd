"""Norms and the dense layers that every part uses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float


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


def linear(x: Float[Array, "*b k"], kernel: Float[Array, "k m"], bias: Float[Array, " m"] | None = None) -> Float[Array, "*b m"]:
    """x @ kernel + bias in the dtype of x. Leading dimensions are flattened: one big matmul is faster than a batch of small ones on CPU."""
    y = (x.reshape(-1, x.shape[-1]) @ kernel.astype(x.dtype)).reshape(*x.shape[:-1], kernel.shape[-1])
    return y if bias is None else y + bias.astype(x.dtype)


def swiglu(x: Float[Array, "*b d"], gate: Float[Array, "d f"], up: Float[Array, "d f"], down: Float[Array, "f d"]) -> Float[Array, "*b d"]:
    """down(silu(gate(x)) * up(x)) (upstream modeling_internlm2_ve.py:264-278)."""
    g = checkpoint_name(linear(x, gate), "gate")
    u = checkpoint_name(linear(x, up), "up")
    return linear(jax.nn.silu(g) * u, down)
