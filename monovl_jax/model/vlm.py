"""The whole pipeline: tiles -> visual tokens -> merged with text embeddings -> decoder."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from monovl_jax.config import ModelConfig
from monovl_jax.model.decoder import Decoder, KVCache, Layers, with_remat
from monovl_jax.model.ops import Ops
from monovl_jax.model.patch_embed import PatchEmbed
from monovl_jax.model.projector import Projector
from pallas_kernels import Routing

TEXT, VISUAL, QUERY, PADDING = 0, 1, 2, -1
"""Token types of a batch."""


@jax.custom_vjp
def place_visual_tokens(
    h: Float[Array, "b t d"], visual: Float[Array, "b n d"], index: Int[Array, "b t"], slot: Int[Array, "b n"]
) -> Float[Array, "b t d"]:
    """h[b, t] becomes visual[b, index[b, t]] where index >= 0. `slot` is the inverse, so that the gradient is a gather as well."""
    del slot
    return jnp.where((index >= 0)[..., None], _take_rows(visual, index), h)


def _take_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, jnp.maximum(index, 0)[..., None], axis=1)


def _place_fwd(h, visual, index, slot):
    return place_visual_tokens(h, visual, index, slot), (index, slot)


def _place_bwd(saved, g):
    index, slot = saved
    return jnp.where((index >= 0)[..., None], 0, g), jnp.where((slot >= 0)[..., None], _take_rows(g, slot), 0), None, None


place_visual_tokens.defvjp(_place_fwd, _place_bwd)


def embedding_rows(table: Float[Array, "v d"], tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    """table[tokens], zeros for an id beyond the table. In the dtype of the table, so that the gradients of a word add up in it."""
    return table.at[tokens].get(mode="fill", fill_value=0)


class VLM(nnx.Module):
    """A monolithic vision-language model. Parameters only; everything else is an argument or a result."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        vision = config.vision
        self.vision = PatchEmbed(vision, rngs)
        self.projector = Projector(vision.hidden_size * vision.shuffle**2, config.decoder.hidden_size, rngs)
        self.decoder = Decoder(config.decoder, rngs)

    def visual_tokens(self, tiles: Num[Array, "b k h w 3"], ops: Ops) -> Float[Array, "b n d"]:
        """Tiles (uint8, or float32 normalised already) to K * tokens_per_tile visual tokens a row."""
        b, k = tiles.shape[:2]
        graphdef, vision = nnx.split(self.vision)
        patches = ops.over_mesh(lambda tiles, vision: nnx.merge(graphdef, vision)(tiles, ops.dtype), "vision")

        def run(tiles: jax.Array) -> jax.Array:
            return self.projector(patches(tiles, vision), ops)

        tokens = with_remat(run, ops)(tiles.reshape(b * k, *tiles.shape[2:]))
        return ops.constrain(tokens.reshape(b, -1, tokens.shape[-1]), "tokens")

    def embed(
        self,
        tokens: Int[Array, "b t"],
        tiles: Num[Array, "b k h w 3"] | None,
        visual_index: Int[Array, "b t"] | None,
        visual_slot: Int[Array, "b n"] | None,
        ops: Ops,
    ) -> Float[Array, "b t d"]:
        """Token embeddings with visual tokens in their slots."""
        h = ops.over_mesh(embedding_rows, "embedding")(self.decoder.embedding[...], tokens).astype(ops.dtype)
        if tiles is not None and visual_slot is not None:
            # Nothing of a tile that fills no slot is wanted, but in the projector's weight gradient 0 * nan would be nan.
            used = jnp.any((visual_slot >= 0).reshape(*tiles.shape[:2], -1), axis=-1)
            tiles = jnp.where(used[..., None, None, None], tiles, 0)
            h = place_visual_tokens(h, self.visual_tokens(tiles, ops), visual_index, visual_slot)
        return ops.constrain(h, "tokens")

    def route(self, token_types: Int[Array, "b t"], ops: Ops) -> Routing | None:
        """The experts of a batch; None when the model has no visual experts."""
        if self.config.decoder.experts == "none":
            return None
        expert = jnp.array([*self.config.expert_of_type, -1], jnp.int32)[token_types.astype(jnp.int32)]
        return ops.over_mesh(ops.make_routing, "routing")(expert)

    def __call__(
        self,
        batch: dict[str, jax.Array],
        ops: Ops,
        cache: KVCache | int | None = None,
        key_length: int | jax.Array | None = None,
        layers: Layers | None = None,
    ) -> tuple[Float[Array, "b t d"], KVCache | None]:
        """A batch (docs/batch.md) to final hidden states [B, T, D], and the grown cache when one is given or asked for.

        Needs tokens, positions and segment_ids. `tiles`, `visual_index`, `visual_slot` come together or not at all. Without `token_types`
        every token is text and the routed layers are plain ones. `cache`, `key_length` and `layers` are those of `Decoder`.
        """
        h = self.embed(batch["tokens"], batch.get("tiles"), batch.get("visual_index"), batch.get("visual_slot"), ops)
        routing = self.route(batch["token_types"], ops) if "token_types" in batch else None
        return self.decoder(h, batch["positions"], batch["segment_ids"], routing, ops, cache, key_length, layers)

    def logits(self, hidden: Float[Array, "*b d"], ops: Ops) -> Float[Array, "*b v"]:
        """float32 logits over the padded vocabulary (padding columns -1e30)."""
        return self.decoder.logits(hidden, ops)
