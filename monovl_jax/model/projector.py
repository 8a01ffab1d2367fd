"""Visual tokens to the width of the language model: LayerNorm, Linear, exact GELU, Linear (upstream modeling_internvl_chat.py:114-119)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from monovl_jax.model.layers import Adapted, Kernel, layer_norm, linear
from monovl_jax.model.ops import Ops

LAYER_NORM_EPS = 1e-5


class Projector(nnx.Module):
    """Parameters: norm_scale, norm_bias [C]; kernel1 [C, D], bias1 [D]; kernel2 [D, D], bias2 [D]."""

    def __init__(self, in_features: int, out_features: int, rngs: nnx.Rngs):
        c, d = in_features, out_features
        self.norm_scale = nnx.Param(jnp.ones((c,)))
        self.norm_bias = nnx.Param(jnp.zeros((c,)))
        self.kernel1 = nnx.Param(jax.random.normal(rngs.params(), (c, d)) * c**-0.5)
        self.bias1 = nnx.Param(jnp.zeros((d,)))
        self.kernel2 = nnx.Param(jax.random.normal(rngs.params(), (d, d)) * d**-0.5)
        self.bias2 = nnx.Param(jnp.zeros((d,)))

    def __call__(self, x: Float[Array, "*b c"], ops: Ops) -> Float[Array, "*b d"]:
        x = layer_norm(x, self.norm_scale[...], self.norm_bias[...], LAYER_NORM_EPS)
        x = ops.over_mesh(linear, "projector_in")(x, self._kernel("kernel1"), self.bias1[...])
        return ops.over_mesh(linear, "projector_out")(jax.nn.gelu(x, approximate=False), self._kernel("kernel2"), self.bias2[...])

    def _kernel(self, name: str) -> Kernel:
        """A kernel, with the adapter beside it (`training.lora.attach`) where there is one."""
        kernel, a, b = (getattr(self, key, None) for key in (name, f"{name}_lora_a", f"{name}_lora_b"))
        assert kernel is not None
        return kernel[...] if a is None or b is None else Adapted(kernel[...], a[...], b[...])
