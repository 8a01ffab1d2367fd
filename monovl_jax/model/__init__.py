"""The model: pure array functions and thin Flax NNX modules that hold parameters. Knows no mesh, no file, no data set."""

from monovl_jax.model.decoder import Decoder, KVCache, init_cache
from monovl_jax.model.ops import Ops
from monovl_jax.model.vlm import VLM

__all__ = ["VLM", "Decoder", "KVCache", "Ops", "init_cache"]
