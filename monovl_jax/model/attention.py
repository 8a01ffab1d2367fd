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
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jaxtyping import Array, Float, Int

from pallas_kernels.device import tpu_generation

PIECES, SMALLEST_PIECE = 8, 64
"""Of `packed_causal_attention`."""

SPLASH_TILE = 128
"""Tokens of a row that a TPU's fused attention works on at a time."""


def attention(
    q: Float[Array, "b t k g e"], k: Float[Array, "b t k e"], v: Float[Array, "b t k e"], segments: Int[Array, "b t"]
) -> Float[Array, "b t k g e"]:
    """What fits the device that the program is traced for: `splash_attention` on a TPU for rows of at least a tile of it,
    `packed_causal_attention` elsewhere."""
    if tpu_generation() and q.shape[1] >= SPLASH_TILE:
        return splash_attention(q, k, v, segments)
    return packed_causal_attention(q, k, v, segments)


def splash_attention(
    q: Float[Array, "b t k g e"],
    k: Float[Array, "b t k e"],
    v: Float[Array, "b t k e"],
    segments: Int[Array, "b t"],
    interpret: bool = False,
) -> Float[Array, "b t k g e"]:
    """`packed_causal_attention` as JAX's fused TPU kernel, which reads segment numbers and never writes scores to memory.

    Rows are filled up to whole tiles with padding, which no earlier token sees and which is cut off again.

    Args:
      interpret: runs the kernel without a TPU, for tests.
    """
    b, tokens, kv_heads, group, e = q.shape
    if rest := -tokens % SPLASH_TILE:
        q, k, v, segments = (jnp.pad(x, [(0, 0), (0, rest), *[(0, 0)] * (x.ndim - 2)]) for x in (q, k, v, segments))
    t = tokens + rest
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((t, t))] * (kv_heads * group))
    kernel = splash_attention_kernel.make_splash_mha(mask, head_shards=1, q_seq_shards=1, interpret=interpret)

    def by_row(x: jax.Array) -> jax.Array:
        return x.reshape(b, t, -1, e).transpose(0, 2, 1, 3)

    def one(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        out = kernel(q, k, v, segment_ids=splash_attention_kernel.SegmentIds(segments, segments))
        assert isinstance(out, jax.Array)  # residuals come along only when asked for
        return out

    out = jax.vmap(one)(by_row(q * e**-0.5), by_row(k), by_row(v), segments)
    return out.transpose(0, 2, 1, 3).reshape(q.shape)[:, :tokens].astype(q.dtype)


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
