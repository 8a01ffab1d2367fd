"""Grouped-query attention over packed rows.

A query sees a key when both carry the same segment number (0 is padding and sees nothing) and the key's slot is not later:

    segments  1 1 1 2 2 0        keys  1 1 1 2 2 0
                          query 1      x . . . . .
                                1      x x . . . .
                                1      x x x . . .
                                2      . . . x . .
                                2      . . . x x .
                                0      . . . . . .
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def packed_causal_attention(
    q: Float[Array, "b t k g e"],
    k: Float[Array, "b s k e"],
    v: Float[Array, "b s k e"],
    q_segments: Int[Array, "b t"],
    kv_segments: Int[Array, "b s"],
    q_start: int | Int[Array, ""] = 0,
) -> Float[Array, "b t k g e"]:
    """Softmax attention, plain XLA. Scale 1/sqrt(e), scores and softmax in float32, probabilities cast to the dtype of q.

    Args:
      q: queries, grouped by the kv head they use (query head j uses kv head j // g).
      k, v: keys and values, rotated already.
      q_segments, kv_segments: packed sample number of each slot, 0 for padding.
      q_start: slot of the first query among the keys (the cache length in decode).

    Rows of padding queries hold finite values without meaning.
    """
    batch, t, kv_heads, group, e = q.shape
    s = k.shape[1]
    # One matmul per (row, kv head) with group * t queries: larger, and keys are never repeated.
    q_bkne = q.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, group * t, e)
    scores = jnp.einsum("bkne,bske->bkns", q_bkne, k, preferred_element_type=jnp.float32) * e**-0.5

    causal = jnp.arange(s)[None, :] <= (jnp.arange(t) + q_start)[:, None]
    allowed = causal[None] & (q_segments[:, :, None] == kv_segments[:, None, :]) & (kv_segments > 0)[:, None, :]
    bias = jnp.where(allowed, 0.0, -1e30).astype(jnp.float32)

    scores = scores.reshape(batch, kv_heads, group, t, s) + bias[:, None, None]
    probs = jax.nn.softmax(scores, axis=-1).astype(q.dtype).reshape(batch, kv_heads, group * t, s)
    out = jnp.einsum("bkns,bske->bkne", probs, v)
    return out.reshape(batch, kv_heads, group, t, e).transpose(0, 3, 1, 2, 4)
