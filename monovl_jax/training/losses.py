"""Next-token cross entropy that computes logits only for supervised tokens, a chunk at a time."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.device import GENERATIONS, device_kind

LOGITS_PER_CHUNK = 2**24
MAX_CHUNK = 512
"""On a CPU: logits that stay near its caches."""

ACCELERATOR_CHUNK = 1024
CHUNKS = {"v6e": 2048}
"""Rows a chunk on an accelerator, by the generation of a TPU, where it is not ACCELERATOR_CHUNK.

A chunk reads the head twice and reads and writes its float32 gradient: 12 bytes of memory and 6 FLOPs a row for each element of the head.
So arithmetic takes longer than memory from 2 * peak / bandwidth rows on: about 480 on a v5e, 330 on a v5p, 1,120 on a v6e, 590 on an
H100."""

LOGIT_BYTES = 14
"""Bytes that a chunk holds for each of its logits: float32 logits, exponentials and their select, and the gradient in the compute dtype."""


def chunk_rows(rows: int, vocab: int, kind: str) -> int:
    """Rows of a chunk of the loss. vocab: columns of the head on one device. kind: of the device, as JAX names it."""
    if kind == "cpu":
        return min(rows, max(128, min(MAX_CHUNK, LOGITS_PER_CHUNK // vocab)))
    return min(rows, CHUNKS.get(GENERATIONS.get(kind, ""), ACCELERATOR_CHUNK))


def _loss_and_gradients(h, head, targets, weights, vocab_size, axes):
    """Sum of weights * nll, and its gradients with respect to h and head, in one pass over the supervised rows.

    Inside a shard_map over `axes`, the last of which divides the vocabulary: the gradient of h is this device's part of a sum.
    """
    rows, vocab = h.shape[0], head.shape[1]
    chunk = chunk_rows(rows, vocab, device_kind())
    supervised = weights != 0
    place = jnp.where(supervised, jnp.cumsum(supervised, dtype=jnp.int32) - 1, rows + chunk)
    order = jnp.full((rows + chunk,), rows, jnp.int32).at[place].set(jnp.arange(rows, dtype=jnp.int32), mode="drop")
    count = jnp.sum(supervised, dtype=jnp.int32)
    columns = jnp.arange(vocab)
    over_vocabulary = largest_of_all = _itself
    if axes:
        columns += jax.lax.axis_index(axes[-1]) * vocab
        count = jax.lax.pmax(count, axes)  # all devices take as many turns: there are collectives in one
        over_vocabulary, largest_of_all = (partial(f, axis_name=axes[-1]) for f in (jax.lax.psum, jax.lax.pmax))
    in_vocabulary = columns < vocab_size
    head_cast = head.astype(h.dtype)

    def body(i, carry):
        total, dh, dhead = carry
        mine = jax.lax.dynamic_slice_in_dim(order, i * chunk, chunk)
        take = partial(jnp.take, indices=mine, axis=0, mode="fill", fill_value=0)
        x, y, w = take(h), take(targets), take(weights)
        logits = jnp.matmul(x, head_cast, preferred_element_type=jnp.float32)
        logits = jnp.where(in_vocabulary, logits, -jnp.inf)
        top = largest_of_all(jnp.max(logits, axis=-1, keepdims=True))
        e = jnp.exp(logits - top)
        z = over_vocabulary(jnp.sum(e, axis=-1, keepdims=True))
        target = y[:, None] == columns
        nll = (jnp.log(z) + top)[:, 0] - over_vocabulary(jnp.sum(jnp.where(target, logits, 0), axis=-1))
        dlogits = ((e / z - target) * w[:, None]).astype(h.dtype)
        dx = jnp.matmul(dlogits, head_cast.T, preferred_element_type=jnp.float32).astype(h.dtype)
        dhead = dhead + jnp.matmul(x.T, dlogits, preferred_element_type=jnp.float32)
        return total + jnp.sum(w * jnp.where(w != 0, nll, 0)), dh.at[mine].set(dx, mode="drop"), dhead

    init = (jnp.float32(0), jnp.zeros_like(h), jnp.zeros(head.shape, jnp.float32))
    return jax.lax.fori_loop(0, (count + chunk - 1) // chunk, body, init)


def _itself(x: jax.Array) -> jax.Array:
    return x


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _weighted_nll(h, head, targets, weights, vocab_size, axes):
    return _loss_and_gradients(h, head, targets, weights, vocab_size, axes)[0]


def _fwd(h, head, targets, weights, vocab_size, axes):
    total, dh, dhead = _loss_and_gradients(h, head, targets, weights, vocab_size, axes)
    return total, (dh, dhead, jnp.zeros((0,), head.dtype))


def _bwd(vocab_size, axes, saved, g):
    dh, dhead, like = saved
    if axes:
        g = jax.lax.psum(g, axes[-1])  # the total of a device holds the parts of all
    return (dh * g).astype(dh.dtype), (dhead * g).astype(like.dtype), None, None


_weighted_nll.defvjp(_fwd, _bwd)


def weighted_nll(
    h: Float[Array, "*b d"],
    head: Float[Array, "d v"],
    targets: Int[Array, "*b"],
    weights: Float[Array, "*b"],
    vocab_size: int,
    axes: tuple[str, ...] = (),
) -> Float[Array, ""]:
    """float32 sum over tokens of weights * -log p(target).

    Args:
      h: final hidden states in the compute dtype.
      head: output projection over the padded vocabulary; columns from `vocab_size` on take no part.
      targets: int ids, already shifted. weights: float32; rows of weight 0 cost nothing.
      axes: inside a `shard_map`, its mesh axes; the last divides the columns of `head`, the others rows. The sum is over own rows.

    The forward pass computes the gradients along the way, so that logits are made once and never stored. A gradient nobody asks for
    (a frozen head) is removed by the compiler.
    """
    return _weighted_nll(h.reshape(-1, h.shape[-1]), head, targets.reshape(-1), weights.reshape(-1), vocab_size, axes)
