"""The visual tokenizer of Mono-InternVL: normalise, cut into patches, add positions, pixel shuffle.

Upstream modeling_intern_vit.py:365-418.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Num, UInt8

from monovl_jax.config import VisionConfig

PIXEL_STATISTICS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.4814546, 0.4578275, 0.40821073), (0.2686295, 0.2613025, 0.2757711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Mean and standard deviation per channel of pixels in [0, 1] (upstream constants.py)."""


class Stored(nnx.Variable):
    """An array that the checkpoint holds and nothing uses. Never trained; kept so that export gives back what import read."""


def normalize_pixels(tiles: UInt8[Array, "*b h w 3"] | Float[Array, "*b h w 3"], statistics: str) -> Float[Array, "*b h w 3"]:
    """uint8 pixels to float32, normalised on the device. Float input is taken as normalised already."""
    if not jnp.issubdtype(tiles.dtype, jnp.integer):
        return tiles.astype(jnp.float32)
    mean, std = (jnp.array(v, jnp.float32) for v in PIXEL_STATISTICS[statistics])
    return (tiles.astype(jnp.float32) / 255.0 - mean) / std


def bicubic_matrix(old: int, new: int) -> np.ndarray:
    """float32[new, old]: 1-D bicubic interpolation with a = -0.75, half-pixel centres and clamped borders, without anti-aliasing.

    The same numbers as torch.nn.functional.interpolate(mode='bicubic', align_corners=False).
    """
    a = -0.75
    matrix = np.zeros((new, old), np.float64)
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        left = int(np.floor(centre))
        for tap in range(left - 1, left + 3):
            x = abs(centre - tap)
            weight = (a + 2) * x**3 - (a + 3) * x**2 + 1 if x <= 1 else a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
            matrix[i, min(max(tap, 0), old - 1)] += weight
    return matrix.astype(np.float32)


def resize_positions(table: Float[Array, "n d"], old: int, new: int) -> Float[Array, "m d"]:
    """Position table of an old x old grid, interpolated bicubically in float32 to new x new; itself when the grids agree."""
    if old == new:
        return table
    m = jnp.asarray(bicubic_matrix(old, new))
    grid = table.astype(jnp.float32).reshape(old, old, -1)
    grid = jnp.einsum("ac,bd,cde->abe", m, m, grid, precision="highest")
    return grid.reshape(new * new, -1).astype(table.dtype)


def pixel_shuffle(x: Float[Array, "n h w c"], r: int, version: str) -> Float[Array, "n hr wr crr"]:
    """Merges r x r patches into the channels (upstream modeling_internvl_chat.py:284-298).

    v2, r = 2: out[R, Q] = concat(in[2R, 2Q], in[2R, 2Q+1], in[2R+1, 2Q], in[2R+1, 2Q+1]). v1 gives the transposed grid of the same tokens.
    """
    n, h, w, c = x.shape
    x = x.reshape(n, h // r, r, w // r, r, c)
    order = (0, 1, 3, 2, 4, 5) if version == "v2" else (0, 3, 1, 2, 4, 5)
    first, second = (h // r, w // r) if version == "v2" else (w // r, h // r)
    return x.transpose(order).reshape(n, first, second, r * r * c)


class PatchEmbed(nnx.Module):
    """Parameters: kernel [P, P, 3, C], bias [C], position_embedding [N, C]; class_embedding and class_position [C] are stored, unused."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        self.config = config
        p, c, n = config.patch_size, config.hidden_size, config.position_grid**2
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (p, p, 3, c)) * (3 * p * p) ** -0.5)
        self.bias = nnx.Param(jnp.zeros((c,)))
        self.position_embedding = nnx.Param(0.3 * jax.random.normal(rngs.params(), (n, c)))
        self.class_embedding = Stored(jnp.zeros((c,)))
        self.class_position = Stored(jnp.zeros((c,)))

    def __call__(self, tiles: Num[Array, "n h w 3"], dtype: Any) -> Float[Array, "n v c"]:
        """Tiles (uint8, or float32 normalised already) to [n, tokens_per_tile, C * shuffle^2]."""
        config, p = self.config, self.config.patch_size
        n, height, width, _ = tiles.shape
        if height != width:
            raise ValueError(f"tiles have shape {tiles.shape}; they must be square")
        grid = height // p
        if grid % config.shuffle:
            raise ValueError(f"tiles of {height} px have {grid} patches a side, no multiple of the pixel shuffle {config.shuffle}")
        x = normalize_pixels(tiles[:, : grid * p, : grid * p], config.pixel_statistics).astype(dtype)
        x = x.reshape(n, grid, p, grid, p, 3).transpose(0, 1, 3, 2, 4, 5).reshape(n * grid * grid, p * p * 3)
        x = x @ self.kernel[...].reshape(p * p * 3, -1).astype(dtype) + self.bias[...].astype(dtype)
        positions = resize_positions(self.position_embedding[...], config.position_grid, grid)
        x = x.reshape(n, grid * grid, -1) + positions.astype(dtype)
        x = pixel_shuffle(x.reshape(n, grid, grid, -1), config.shuffle, config.pixel_shuffle)
        return x.reshape(n, -1, x.shape[-1])
