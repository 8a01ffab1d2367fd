"""Grouped-query attention over packed rows, and over a cache of keys and values.

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

PIECES, SMALLEST_PIECE = 8, 64


def packed_causal_attention(
    q: Float[Array, "b t k g e"],
    k: Float[Array, "b t k e"],
    v: Float[Array, "b t k e"],
    segments: Int[Array, "b t"],
) -> Float[Array, "b t k g e"]:
    """Softmax attention, plain XLA. Scale 1/sqrt(e), scores and softmax in float32, probabilities cast to the dtype of q.

    Args:
      q: queries, grouped by the kv head they use (query head j uses kv head j // g).
      k, v: keys and values, rotated already.
      segments: packed sample number of each slot, 0 for padding.

    Rows of padding queries hold finite values without meaning. Queries go in up to PIECES pieces, each against the keys up to its own
    end: nearly half of the scores are never computed.
    """
    t, keys, values = q.shape[1], by_head(k), by_head(v)
    size = max(SMALLEST_PIECE, -(-t // PIECES))
    pieces = []
    for start in range(0, t, size):
        stop = min(start + size, t)
        here = q[:, start:stop], keys[:, :stop], values[:, :stop], segments[:, start:stop], segments[:, :stop]
        pieces.append(cached_attention(*here, start))
    return jnp.concatenate(pieces, axis=1)


def by_head(x: Float[Array, "b s k e"]) -> Float[Array, "bk s e"]:
    """Keys or values as the cache keeps them: one matrix per (row, kv head)."""
    b, s, k, e = x.shape
    return x.transpose(0, 2, 1, 3).reshape(b * k, s, e)


def cached_attention(
    q: Float[Array, "b t k g e"],
    k: Float[Array, "bk s e"],
    v: Float[Array, "bk s e"],
    q_segments: Int[Array, "b t"],
    kv_segments: Int[Array, "b s"],
    q_start: int | Int[Array, ""],
) -> Float[Array, "b t k g e"]:
    """`packed_causal_attention` over keys and values in the layout of the cache (`by_head`).

    One matmul per (row, kv head) with g * t queries: larger, and keys are never repeated. The leading axis is one, not two: XLA on a CPU
    copies a cache whose update and use differ by a reshape, which in decoding costs more than the attention itself.
    """
    b, t, kv_heads, group, e = q.shape
    s = k.shape[1]
    q_nme = q.transpose(0, 2, 3, 1, 4).reshape(b * kv_heads, group * t, e)
    scores = jnp.einsum("nme,nse->nms", q_nme, k, preferred_element_type=jnp.float32) * e**-0.5

    causal = jnp.arange(s)[None, :] <= (jnp.arange(t) + q_start)[:, None]
    allowed = causal[None] & (q_segments[:, :, None] == kv_segments[:, None, :]) & (kv_segments > 0)[:, None, :]
    bias = jnp.where(allowed, 0.0, -1e30).astype(jnp.float32)

    scores = scores.reshape(b, kv_heads, group, t, s) + bias[:, None, None]
    probs = jax.nn.softmax(scores, axis=-1).astype(q.dtype).reshape(b * kv_heads, group * t, s)
    out = jnp.einsum("nms,nse->nme", probs, v)
    return out.reshape(b, kv_heads, group, t, e).transpose(0, 3, 1, 2, 4)
