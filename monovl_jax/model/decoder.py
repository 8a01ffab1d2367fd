"""The decoder: pre-norm blocks with experts per token type, stacked on a leading axis and run by one `lax.scan`."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from monovl_jax.config import DecoderConfig
from monovl_jax.model.attention import by_head, cached_attention
from monovl_jax.model.layers import linear, rms_norm, swiglu
from monovl_jax.model.ops import Ops
from monovl_jax.model.rope import Table, apply_rope, rope_table
from pallas_kernels import Routing

Params = dict[str, Any]
Layers = tuple[Params, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """What earlier tokens left behind.

    k, v: rotated keys and values of all layers [L, B * kv_heads, S, head_dim], or a tuple of L arrays (`split`).
    segments: int32[B, S], 0 where nothing is or where padding stands.
    length: int32[], the slot that the next token takes.
    """

    k: Any
    v: Any
    segments: jax.Array | Any  # Any: JAX rebuilds pytrees with placeholders in place of arrays
    length: jax.Array | Any

    def split(self) -> KVCache:
        """The same with one array per layer, as a decoder with `layers` takes it."""
        return self if isinstance(self.k, tuple) else dataclasses.replace(self, k=tuple(self.k), v=tuple(self.v))

    def stacked(self) -> KVCache:
        """The same with all layers in one array."""
        return dataclasses.replace(self, k=jnp.stack(self.k), v=jnp.stack(self.v)) if isinstance(self.k, tuple) else self

    def resized(self, slots: int) -> KVCache:
        """The same with room for `slots` tokens (no fewer than it has)."""

        def pad(x: jax.Array) -> jax.Array:
            return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, slots - x.shape[-2]), (0, 0)])

        segments = jnp.pad(self.segments, ((0, 0), (0, slots - self.segments.shape[1])))
        return KVCache(jax.tree.map(pad, self.k), jax.tree.map(pad, self.v), segments, self.length)


def init_cache(config: DecoderConfig, batch: int, slots: int, dtype: Any) -> KVCache:
    """An empty cache of `slots` positions for `batch` rows."""
    shape = (config.num_layers, batch * config.num_kv_heads, slots, config.head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch, slots), jnp.int32), jnp.zeros((), jnp.int32))


class Attention(nnx.Module):
    """One expert's projections: qkv [L, D, kv_heads, q_per_kv + 2, head_dim] in the released order, out [L, heads * head_dim, D]."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, output: bool = True):
        n, d, kv, g, e = config.num_layers, config.hidden_size, config.num_kv_heads, config.queries_per_kv, config.head_dim
        self.qkv = nnx.Param(jax.random.normal(rngs.params(), (n, d, kv, g + 2, e)) * d**-0.5)
        self.qkv_bias = nnx.Param(jnp.zeros((n, kv, g + 2, e))) if config.attention_bias else None
        if output:
            self.out = nnx.Param(jax.random.normal(rngs.params(), (n, d, d)) * (2 * n * d) ** -0.5)
            self.out_bias = nnx.Param(jnp.zeros((n, d))) if config.attention_bias else None


class SwiGLU(nnx.Module):
    """One expert's FFN of all layers: gate, up [L, D, F], down [L, F, D]."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        n, d, f = config.num_layers, config.hidden_size, config.intermediate_size
        self.gate = nnx.Param(jax.random.normal(rngs.params(), (n, d, f)) * d**-0.5)
        self.up = nnx.Param(jax.random.normal(rngs.params(), (n, d, f)) * d**-0.5)
        self.down = nnx.Param(jax.random.normal(rngs.params(), (n, f, d)) * (2 * n * f) ** -0.5)


class Experts(nnx.Module):
    """The same part once per expert, as separate leaves: they differ in freezing, dtype and optimizer state."""

    def __init__(self, text: nnx.Module, visual: nnx.Module | None):
        self.text = text
        self.visual = visual


class Blocks(nnx.Module):
    """All decoder layers; every leaf has a leading layer axis. The norms are shared by both modalities."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        n, d = config.num_layers, config.hidden_size
        attention_experts = config.experts == "ffn+attention"
        self.attention_norm = nnx.Param(jnp.ones((n, d)))
        self.attention = Experts(
            Attention(config, rngs), Attention(config, rngs, output=config.attention_expert_output) if attention_experts else None
        )
        self.ffn_norm = nnx.Param(jnp.ones((n, d)))
        self.mlp = Experts(SwiGLU(config, rngs), SwiGLU(config, rngs) if config.experts != "none" else None)


def _expert_linear(x: jax.Array, text: Params, visual: Params | None, name: str, routing: Routing | None, ops: Ops) -> jax.Array:
    """A projection of both experts (shared when the visual one has none), with the kernel reshaped to a matrix. [B, T, K] -> [B, T, M]."""
    k = x.shape[-1]

    def parts(p: Params) -> tuple[jax.Array, jax.Array | None]:
        bias = p.get(f"{name}_bias")
        return p[name].reshape(k, -1), None if bias is None else bias.reshape(-1)

    kernel, bias = parts(text)
    if routing is None or visual is None or name not in visual:
        return ops.over_mesh(linear, name)(x, kernel, bias)
    visual_kernel, visual_bias = parts(visual)
    return ops.over_mesh(ops.by_expert(ops.routed_linear), name)(x, (kernel, visual_kernel), routing, (bias, visual_bias))


def attention_layer(
    p: Params,
    x: Float[Array, "b t d"],
    table: Table,
    segments: Int[Array, "b t"],
    routing: Routing | None,
    cache: tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None] | None,
    config: DecoderConfig,
    ops: Ops,
) -> tuple[Float[Array, "b t d"], tuple[jax.Array, jax.Array]]:
    """One joint causal attention of both modalities (upstream modeling_internlm2_ve.py:355-470).

    cache: (k, v [B * kv, S, e], segments [B, S] with this call's slots already marked, length, None), or (k, v [L, B * kv, S, e] of all
      layers, segments, length, number of this layer), or None.

    Returns the output and (k, v): those of the cache with this call's at `length`, or without a cache this call's alone, [B * kv, T, e].
    """
    b, t, d = x.shape
    kv, g, e = config.num_kv_heads, config.queries_per_kv, config.head_dim
    text, visual = p["text"], p.get("visual")
    qkv = _expert_linear(x, text, visual, "qkv", routing, ops).reshape(b, t, kv, g + 2, e)
    qkv = ops.constrain(qkv, "heads")
    q, k = apply_rope(qkv[..., :g, :], table), apply_rope(qkv[..., g, :], table)
    v = qkv[..., g + 1, :]
    if cache is None:
        out = ops.over_mesh(ops.attention, "attention")(q, k, v, segments)
        k, v = by_head(k), by_head(v)
    else:
        old_k, old_v, kv_segments, length, layer = cache
        k, v = _append(old_k, by_head(k), length, layer), _append(old_v, by_head(v), length, layer)
        keys, values = (x.astype(q.dtype) if layer is None else x[layer].astype(q.dtype) for x in (k, v))
        out = cached_attention(q, keys, values, segments, kv_segments, length)
    out = checkpoint_name(out.reshape(b, t, d), "attention")
    return _expert_linear(out, text, visual, "out", routing, ops), (k, v)


def _append(old: jax.Array, new: jax.Array, length: jax.Array, layer: jax.Array | None) -> jax.Array:
    """`new` [N, T, e] at slot `length` of one layer's cache, or of a layer of all; nothing else is written."""
    new = new.astype(old.dtype)
    if layer is None:
        return jax.lax.dynamic_update_slice_in_dim(old, new, length, axis=1)
    return jax.lax.dynamic_update_slice(old, new[None], (layer, 0, length, 0))


def mlp_layer(p: Params, x: Float[Array, "b t d"], routing: Routing | None, ops: Ops) -> Float[Array, "b t d"]:
    """The feed-forward experts: every token goes through the one of its type (upstream modeling_internlm2_ve.py:690-706)."""
    text, visual = p["text"], p.get("visual")
    if routing is None or visual is None:
        return ops.over_mesh(swiglu, "mlp")(x, text["gate"], text["up"], text["down"])
    routed = ops.by_expert(ops.routed_swiglu, recomputed=ops.remat == "full")
    return ops.over_mesh(routed, "mlp")(x, tuple((w["gate"], w["up"], w["down"]) for w in (text, visual)), routing)


def block(p: Params, h: Float[Array, "b t d"], table, segments, routing, cache, config: DecoderConfig, ops: Ops) -> tuple[jax.Array, Any]:
    """h + attention(norm(h)), then h + mlp(norm(h)); and what `attention_layer` gives to keep."""
    x = rms_norm(h, p["attention_norm"], config.rms_norm_eps)
    a, kept = attention_layer(p["attention"], x, table, segments, routing, cache, config, ops)
    h = ops.constrain(h + a, "tokens")
    h = h + mlp_layer(p["mlp"], rms_norm(h, p["ffn_norm"], config.rms_norm_eps), routing, ops)
    return ops.constrain(h, "tokens"), kept


def split_layers(blocks: Params) -> Layers:
    """The text experts and the norms of each layer by itself, from the stacked parameters of `Blocks`: all that decoding needs.

    On a CPU the pieces share the memory of the stack where the backend allows it; elsewhere they are copies.
    """
    text = {
        name: {"text": {k: v for k, v in part["text"].items() if v is not None}} if isinstance(part, dict) else part
        for name, part in blocks.items()
    }
    count = len(jax.tree.leaves(text)[0])
    whole = jax.tree.map(np.asarray, text)
    return tuple(jax.tree.map(lambda leaf: jax.device_put(leaf[layer]), whole) for layer in range(count))  # noqa: B023


def with_remat(f, ops: Ops):
    """Wraps a function in jax.checkpoint by the policy of `ops.remat`."""
    if ops.remat == "none":
        return f
    policy = jax.checkpoint_policies.save_only_these_names("attention", "gate", "up") if ops.remat == "save_projections" else None
    return jax.checkpoint(f, policy=policy, prevent_cse=False)


class Decoder(nnx.Module):
    """Parameters: embedding [Vp, D], blocks, norm [D], head [D, Vp] (None when tied). Vp is the vocabulary padded to a multiple of 128."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.config = config
        d, v = config.hidden_size, config.padded_vocab_size
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (v, d)) * (d**-0.5 if config.tie_embeddings else 0.5))
        self.blocks = Blocks(config, rngs)
        self.norm = nnx.Param(jnp.ones((d,)))
        self.head = None if config.tie_embeddings else nnx.Param(jax.random.normal(rngs.params(), (d, v)) * d**-0.5)

    def __call__(
        self,
        h: Float[Array, "b t d"],
        positions: Float[Array, "b t"],
        segments: Int[Array, "b t"],
        routing: Routing | None,
        ops: Ops,
        cache: KVCache | int | None = None,
        key_length: int | jax.Array | None = None,
        layers: Layers | None = None,
    ) -> tuple[Float[Array, "b t d"], KVCache | None]:
        """Embedded tokens to final, normed hidden states.

        Args:
          h: embedded tokens in the compute dtype.
          positions: float32, restarting at 0 in each packed sample.
          segments: packed sample number, 0 for padding.
          routing: which expert serves which token; None sends every token to the text expert.
          cache: keys and values of earlier calls; this call's tokens are appended at `cache.length`. A number makes a new cache of so many
            slots, with this call's tokens first.
          key_length: what dynamic NTK takes as the length; by default all slots so far, padding included.
          layers: the parameters of each layer by itself (`split_layers`), with a split cache: the layers are written out one after
            another instead of scanned. On a CPU, where a scan copies every layer's weights before it uses them, decoding is several
            times as fast; the program grows with depth.
        """
        config, t = self.config, h.shape[1]
        so_far = cache.length + t if isinstance(cache, KVCache) else t
        table = rope_table(
            positions, config.head_dim, config.rope, config.max_position_embeddings, so_far if key_length is None else key_length
        )
        run = functools.partial(block, config=config, ops=ops)
        if isinstance(cache, KVCache):
            start = cache.length
            marked = jax.lax.dynamic_update_slice_in_dim(cache.segments, segments.astype(jnp.int32), start, axis=1)
            if layers is not None:
                kept = []
                for p, k, v in zip(layers, cache.k, cache.v, strict=True):
                    h, own = run(p, h, table, segments, routing, (k, v, marked, start, None))
                    kept.append(own)
                k, v = zip(*kept, strict=True)
            else:

                def step(carry, xs):
                    (h, k, v), (p, layer) = carry, xs
                    h, (k, v) = run(p, h, table, segments, routing, (k, v, marked, start, layer))
                    return (h, k, v), None

                (h, k, v), _ = jax.lax.scan(step, (h, cache.k, cache.v), (self._stacked(), jnp.arange(config.num_layers)))
            cache = KVCache(k, v, marked, start + t)
        elif cache is not None:
            h, (k, v) = jax.lax.scan(lambda h, p: run(p, h, table, segments, routing, None), h, self._stacked())
            cache = KVCache(k, v, segments.astype(jnp.int32), jnp.int32(t)).resized(cache)
        else:
            layer = with_remat(lambda p, h: run(p, h, table, segments, routing, None)[0], ops)
            h, _ = jax.lax.scan(lambda h, p: (layer(p, h), None), h, self._stacked())
        return rms_norm(h, self.norm[...], config.rms_norm_eps), cache

    def _stacked(self) -> Params:
        return nnx.to_pure_dict(nnx.state(self.blocks))

    def head_kernel(self) -> Float[Array, "d v"]:
        """The output projection [D, Vp]; the transposed embedding when tied."""
        return self.embedding[...].T if self.head is None else self.head[...]

    def logits(self, h: Float[Array, "*b d"], ops: Ops) -> Float[Array, "*b v"]:
        """float32 logits over the padded vocabulary; padding columns are -1e30 so that neither softmax nor sampling sees them."""
        config = self.config
        flat = h.reshape(-1, h.shape[-1])
        logits = jnp.matmul(flat, self.head_kernel().astype(h.dtype), preferred_element_type=jnp.float32)
        logits = jnp.where(jnp.arange(config.padded_vocab_size) < config.vocab_size, logits, -1e30)
        return ops.constrain(logits.reshape(*h.shape[:-1], -1), "logits")
