"""The decoder: pre-norm blocks with experts per token type, stacked on a leading axis and run by one `lax.scan`."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from monovl_jax.config import DecoderConfig
from monovl_jax.model.layers import linear, rms_norm, swiglu
from monovl_jax.model.ops import Ops
from monovl_jax.model.rope import Table, apply_rope, rope_table
from pallas_kernels import Routing

Params = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys (rotated) and values of all layers, [L, B, S, kv_heads, head_dim]; segments int32[B, S] (0 = nothing there); length int32[]."""

    k: jax.Array
    v: jax.Array
    segments: jax.Array
    length: jax.Array


def init_cache(config: DecoderConfig, batch: int, slots: int, dtype: Any) -> KVCache:
    """An empty cache of `slots` positions for `batch` rows."""
    shape = (config.num_layers, batch, slots, config.num_kv_heads, config.head_dim)
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
    return ops.over_mesh(ops.routed_linear, name)(x, (kernel, visual_kernel), routing, (bias, visual_bias))


def attention_layer(
    p: Params,
    x: Float[Array, "b t d"],
    table: Table,
    segments: Int[Array, "b t"],
    routing: Routing | None,
    cache: tuple[jax.Array, jax.Array, jax.Array, jax.Array] | None,
    config: DecoderConfig,
    ops: Ops,
) -> tuple[Float[Array, "b t d"], tuple[jax.Array, jax.Array] | None]:
    """One joint causal attention of both modalities (upstream modeling_internlm2_ve.py:355-470).

    cache: (k [B, S, kv, e], v, segments [B, S] with this call's slots already marked, length) or None. Returns the updated (k, v).
    """
    b, t, d = x.shape
    kv, g, e = config.num_kv_heads, config.queries_per_kv, config.head_dim
    text, visual = p["text"], p.get("visual")
    qkv = _expert_linear(x, text, visual, "qkv", routing, ops).reshape(b, t, kv, g + 2, e)
    qkv = ops.constrain(qkv, "heads")
    q, k = apply_rope(qkv[..., :g, :], table), apply_rope(qkv[..., g, :], table)
    v = qkv[..., g + 1, :]
    attention = ops.over_mesh(ops.attention, "attention")
    if cache is None:
        out, updated = attention(q, k, v, segments, segments), None
    else:
        cached_k, cached_v, kv_segments, length = cache
        k = jax.lax.dynamic_update_slice_in_dim(cached_k, k.astype(cached_k.dtype), length, axis=1)
        v = jax.lax.dynamic_update_slice_in_dim(cached_v, v.astype(cached_v.dtype), length, axis=1)
        out, updated = attention(q, k.astype(q.dtype), v.astype(q.dtype), segments, kv_segments, length), (k, v)
    out = checkpoint_name(out.reshape(b, t, d), "attention")
    return _expert_linear(out, text, visual, "out", routing, ops), updated


def mlp_layer(p: Params, x: Float[Array, "b t d"], routing: Routing | None, ops: Ops) -> Float[Array, "b t d"]:
    """The feed-forward experts: every token goes through the one of its type (upstream modeling_internlm2_ve.py:690-706)."""
    text, visual = p["text"], p.get("visual")
    if routing is None or visual is None:
        return ops.over_mesh(swiglu, "mlp")(x, text["gate"], text["up"], text["down"])
    return ops.over_mesh(ops.routed_swiglu, "mlp")(x, tuple((w["gate"], w["up"], w["down"]) for w in (text, visual)), routing)


def block(p: Params, h: Float[Array, "b t d"], table, segments, routing, cache, config: DecoderConfig, ops: Ops) -> tuple[jax.Array, Any]:
    """h + attention(norm(h)), then h + mlp(norm(h))."""
    x = rms_norm(h, p["attention_norm"], config.rms_norm_eps)
    a, updated = attention_layer(p["attention"], x, table, segments, routing, cache, config, ops)
    h = ops.constrain(h + a, "tokens")
    h = h + mlp_layer(p["mlp"], rms_norm(h, p["ffn_norm"], config.rms_norm_eps), routing, ops)
    return ops.constrain(h, "tokens"), updated


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
        cache: KVCache | None = None,
        key_length: int | jax.Array | None = None,
    ) -> tuple[Float[Array, "b t d"], KVCache | None]:
        """Embedded tokens to final, normed hidden states.

        Args:
          h: embedded tokens in the compute dtype.
          positions: float32, restarting at 0 in each packed sample.
          segments: packed sample number, 0 for padding.
          routing: which expert serves which token; None sends every token to the text expert.
          cache: keys and values of earlier calls; this call's tokens are appended at `cache.length`.
          key_length: what dynamic NTK takes as the length; by default all slots so far, padding included.
        """
        config, t = self.config, h.shape[1]
        if key_length is None:
            key_length = t if cache is None else cache.length + t
        table = rope_table(positions, config.head_dim, config.rope, config.max_position_embeddings, key_length)
        params = nnx.to_pure_dict(nnx.state(self.blocks))
        run = functools.partial(block, config=config, ops=ops)
        if cache is None:
            layer = with_remat(lambda p, h: run(p, h, table, segments, routing, None)[0], ops)
            h, _ = jax.lax.scan(lambda h, p: (layer(p, h), None), h, params)
        else:
            start = cache.length
            marked = jax.lax.dynamic_update_slice_in_dim(cache.segments, segments.astype(jnp.int32), start, axis=1)

            def step(h, xs):
                p, k, v = xs
                return run(p, h, table, segments, routing, (k, v, marked, start))

            h, (k, v) = jax.lax.scan(step, h, (params, cache.k, cache.v))
            cache = KVCache(k, v, marked, start + t)
        return rms_norm(h, self.norm[...], config.rms_norm_eps), cache

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
