"""Rotary position embedding: plain, linear and dynamic NTK (upstream modeling_internlm2_ve.py:176-243)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from monovl_jax.config import RopeConfig

Table = tuple[jax.Array, jax.Array]


def rope_table(positions: Float[Array, "b t"], head_dim: int, rope: RopeConfig, max_positions: int, key_length: int | jax.Array) -> Table:
    """cos and sin, float32 [B, T, head_dim / 2], computed once per forward and shared by all layers.

    positions: float32, exact up to 2^24; fractions are allowed.
    key_length: the number of key slots attended to, padding included. Dynamic NTK raises the base once it exceeds `max_positions`; in
      decode it is the grown length, and cached keys keep the rotation they were made with (as upstream).
    """
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    base = jnp.float32(rope.theta)
    if rope.scaling == "dynamic":
        length = jnp.asarray(key_length, jnp.float32)
        stretched = base * ((rope.factor * length / max_positions) - (rope.factor - 1)) ** (head_dim / (head_dim - 2))
        base = jnp.where(length > max_positions, stretched, base)
    positions = positions.astype(jnp.float32)
    if rope.scaling == "linear":
        positions = positions / rope.factor
    angles = positions[..., None] * (1.0 / base**exponent)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: Float[Array, "b t *h e"], table: Table) -> Float[Array, "b t *h e"]:
    """Rotates the two halves of the last axis in float32; result in the dtype of x."""
    cos, sin = (a.reshape(*a.shape[:2], *(1,) * (x.ndim - 3), a.shape[-1]) for a in table)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
