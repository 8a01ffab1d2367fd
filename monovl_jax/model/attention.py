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
"""A TPU's fused attention works on multiples of so many tokens."""

SPLASH_BLOCK, SPLASH_COMPUTE = 1024, 512
"""The most tokens of a row that it holds at a time, and the most keys that it multiplies at a time.

By the TPU compiler's static estimate of the forward pass over 2,048 tokens and 16 heads, the steps over blocks cost a v5e 1.25M cycles in
blocks of 128, 0.15M of 512 and 0.08M of 1,024 (v6e: 1.28M, 0.11M, 0.05M); blocks of 2,048 take more VMEM than a kernel gets on a v5e."""

FUSED_BACKWARD = 4
"""Blocks of keys up to which one kernel makes all gradients: each block writes a part of the gradient of q, as large as q."""


def attention(
    q: Float[Array, "b t k g e"], k: Float[Array, "b t k e"], v: Float[Array, "b t k e"], segments: Int[Array, "b t"]
) -> Float[Array, "b t k g e"]:
    """What fits the device that the program is traced for: `splash_attention` on a TPU for rows of at least a tile of it,
    `packed_causal_attention` elsewhere."""
    if tpu_generation() and q.shape[1] >= SPLASH_TILE:
        return splash_attention(q, k, v, segments)
    return packed_causal_attention(q, k, v, segments)


def splash_blocks(tokens: int) -> splash_attention_kernel.BlockSizes:
    """The blocks for rows of `tokens`, a multiple of SPLASH_TILE: the largest that divide the row, within the bounds above."""
    block = _largest_divisor(tokens, SPLASH_BLOCK)
    compute = _largest_divisor(block, SPLASH_COMPUTE)
    fused = tokens // block <= FUSED_BACKWARD
    return splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=compute,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=compute,
        block_q_dq=None if fused else block,
        block_kv_dq=None if fused else block,
        use_fused_bwd_kernel=fused,
    )


def _largest_divisor(tokens: int, most: int) -> int:
    """The largest multiple of SPLASH_TILE up to `most` that divides `tokens`."""
    return next(size for size in range(min(tokens, most), 0, -SPLASH_TILE) if tokens % size == 0)


def splash_attention(
    q: Float[Array, "b t k g e"],
    k: Float[Array, "b t k e"],
    v: Float[Array, "b t k e"],
    segments: Int[Array, "b t"],
    interpret: bool = False,
) -> Float[Array, "b t k g e"]:
    """`packed_causal_attention` as JAX's fused TPU kernel, which reads segment numbers and never writes scores to memory.

    Rows are filled up to whole blocks with padding, which no earlier token sees and which is cut off again.

    Args:
      interpret: runs the kernel without a TPU, for tests.
    """
    b, tokens, kv_heads, group, e = q.shape
    if rest := -tokens % (SPLASH_TILE if tokens <= SPLASH_BLOCK else SPLASH_COMPUTE):
        q, k, v, segments = (jnp.pad(x, [(0, 0), (0, rest), *[(0, 0)] * (x.ndim - 2)]) for x in (q, k, v, segments))
    t = tokens + rest
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((t, t))] * (kv_heads * group))
    kernel = splash_attention_kernel.make_splash_mha(mask, block_sizes=splash_blocks(t), head_shards=1, q_seq_shards=1, interpret=interpret)

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
