"""Dynamic tiling: a picture of any size becomes up to `max_tiles` square tiles, and a thumbnail of the whole.

    1000 x 300, max_tiles 12, thumbnail:   grid (3, 1), resized to 1344 x 448, 3 tiles from left to right, thumbnail last
    4000 x 3000:                           grid (4, 3), row by row:   0  1  2  3
                                                                      4  5  6  7
                                                                      8  9 10 11     thumbnail = tile 12

Source: Mono-InternVL internvl/train/dataset.py:494-546 (grids, tiles), :84-129 (transform); spec section 3.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from monovl_jax.data.images import to_rgb

NORMALIZATION: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""(mean, standard deviation) of the RGB channels on the scale [0, 1], by upstream's normalize_type."""


MAX_TILES, MAX_TILE_PIXELS = 256, 1 << 26
"""Most tiles of an image, and most pixels of them together: far above every released model."""


@dataclass(frozen=True)
class TilingConfig:
    """How a picture becomes tiles.

    tile_size: edge of a tile in pixels. min_tiles, max_tiles: bounds on columns * rows, thumbnail not counted.
    use_thumbnail: append the whole picture as the last tile when there is more than one.
    dynamic: False makes one tile of the whole picture; only there pad2square has an effect (it pads with the mean colour
    of `normalization` before the resize; tiles of a grid are square already).
    """

    tile_size: int = 448
    min_tiles: int = 1
    max_tiles: int = 12
    use_thumbnail: bool = True
    dynamic: bool = True
    pad2square: bool = False
    normalization: str = "imagenet"

    def __post_init__(self) -> None:
        if self.tile_size < 1:
            raise ValueError(f"tile_size is {self.tile_size}; it must be at least 1.")
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise ValueError(f"min_tiles {self.min_tiles} and max_tiles {self.max_tiles} must satisfy 1 <= min_tiles <= max_tiles.")
        if self.max_tiles > MAX_TILES or self.max_tiles * self.tile_size**2 > MAX_TILE_PIXELS:
            limits = f"{MAX_TILES} tiles or {MAX_TILE_PIXELS:,} pixels an image"
            raise ValueError(f"max_tiles {self.max_tiles} of {self.tile_size} pixels are more than {limits}; lower one of them.")
        if self.normalization not in NORMALIZATION:
            raise ValueError(f"normalization {self.normalization!r} is unknown; use one of {', '.join(NORMALIZATION)}.")

    def for_images(self, n_images: int) -> TilingConfig:
        """The config of each picture in a row with `n_images`: max_tiles is shared out, never below 1.

        Source: finetune.py:438-443, with InternVL's later lower bound.
        """
        if n_images <= 1:
            return self
        limit = max(1, self.max_tiles // n_images)
        return replace(self, max_tiles=limit, min_tiles=min(self.min_tiles, limit))


@functools.lru_cache(maxsize=256)
def _grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (cols, rows) within the bounds by area; inside one area in the order that upstream meets them.

    Upstream sorts a Python set by area, so a tie inside one area follows CPython's order of a set of int pairs. The order
    never shows for min_tiles 1 and max_tiles 4, 6, 12, 24 or 40, but it does for min_tiles = max_tiles = 2: hence a set,
    filled in the same order.
    """
    pairs: set[tuple[int, int]] = set()
    for n in range(min_tiles, max_tiles + 1):
        for cols in range(1, n + 1):
            for rows in range(1, min(n, max_tiles // cols) + 1):
                if min_tiles <= cols * rows <= max_tiles:
                    pairs.add((cols, rows))
    return tuple(sorted(pairs, key=lambda pair: pair[0] * pair[1]))


@functools.lru_cache(maxsize=4096)
def choose_grid(width: int, height: int, min_tiles: int, max_tiles: int, tile_size: int) -> tuple[int, int]:
    """(cols, rows) of the grid whose aspect ratio is nearest to width / height.

    On an exact tie the later (larger) grid wins only if the picture has more than half the pixels of that grid.
    Raises ValueError for a picture without pixels or impossible bounds. Source: dataset.py:494-527.
    """
    if width < 1 or height < 1:
        raise ValueError(f"a picture of {width} x {height} pixels cannot be tiled; both sides must be at least 1.")
    if not 1 <= min_tiles <= max_tiles:
        raise ValueError(f"min_tiles {min_tiles} and max_tiles {max_tiles} must satisfy 1 <= min_tiles <= max_tiles.")
    aspect, area = width / height, width * height
    best, best_distance = (1, 1), float("inf")
    for cols, rows in _grids(min_tiles, max_tiles):
        distance = abs(aspect - cols / rows)
        wins_tie = distance == best_distance and area > 0.5 * tile_size * tile_size * cols * rows
        if distance < best_distance or wins_tie:
            best, best_distance = (cols, rows), distance
    return best


def count_tiles(width: int, height: int, config: TilingConfig) -> int:
    """Number of tiles, thumbnail included, that `tile_image` makes of a width x height picture."""
    if not config.dynamic:
        return 1
    cols, rows = choose_grid(width, height, config.min_tiles, config.max_tiles, config.tile_size)
    return cols * rows + (config.use_thumbnail and cols * rows != 1)


def tiles_per_image(sizes: Sequence[tuple[int, int]], config: TilingConfig) -> list[int]:
    """Tiles of each of the pictures with (width, height) `sizes` in one row, the limit shared out among them."""
    shared = config.for_images(len(sizes))
    return [count_tiles(width, height, shared) for width, height in sizes]


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def _padded_to_square(image: Image.Image, normalization: str) -> Image.Image:
    """The picture centred on a square of the mean colour (int(255 * mean), as upstream's expand2square)."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    mean = NORMALIZATION[normalization][0]
    square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in mean))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def tile_image(image: Image.Image | np.ndarray, config: TilingConfig) -> np.ndarray:
    """uint8[k, S, S, 3] tiles of a picture, S = config.tile_size, k = count_tiles(width, height, config).

    image: a Pillow picture of any mode or uint8[height, width, 3]. The resize is Pillow's bicubic with antialiasing and
    ignores the aspect ratio; it is skipped where the size is right already. Tiles go row by row, the thumbnail is last.
    Raises ValueError for an array of another type or shape. Source: dataset.py:523-546.
    """
    side = config.tile_size
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"a picture array must be uint8[height, width, 3], not {image.dtype}{list(image.shape)}.")
        if _is_exact_grid(image, config):
            return _cut(image, image.shape[1] // side, image.shape[0] // side, side)
        image = Image.fromarray(image)
    image = to_rgb(image)
    if not config.dynamic:
        if config.pad2square:
            image = _padded_to_square(image, config.normalization)
        return np.asarray(_resized(image, (side, side)))[None]
    cols, rows = choose_grid(*image.size, config.min_tiles, config.max_tiles, side)
    thumbnail = config.use_thumbnail and cols * rows != 1
    tiles = np.empty((cols * rows + thumbnail, side, side, 3), np.uint8)
    grid = np.asarray(_resized(image, (cols * side, rows * side))).reshape(rows, side, cols, side, 3)
    tiles[: cols * rows].reshape(rows, cols, side, side, 3)[...] = grid.swapaxes(1, 2)
    if thumbnail:
        tiles[-1] = np.asarray(_resized(image, (side, side)))
    return tiles


def _is_exact_grid(array: np.ndarray, config: TilingConfig) -> bool:
    """Whether the array needs no resize and no thumbnail, so that Pillow can be left out (procedural pictures)."""
    height, width, side = array.shape[0], array.shape[1], config.tile_size
    if not config.dynamic:
        return height == width == side
    if height % side or width % side or height == 0 or width == 0:
        return False
    grid = choose_grid(width, height, config.min_tiles, config.max_tiles, side)
    return grid == (width // side, height // side) and (not config.use_thumbnail or grid == (1, 1))


def _cut(array: np.ndarray, cols: int, rows: int, side: int) -> np.ndarray:
    """uint8[rows * side, cols * side, 3] -> uint8[rows * cols, side, side, 3], row by row."""
    return array.reshape(rows, side, cols, side, 3).swapaxes(1, 2).reshape(rows * cols, side, side, 3)


def normalize(tiles: np.ndarray, kind: str = "imagenet") -> np.ndarray:
    """float32[..., 3] of (x / 255 - mean) / std for uint8[..., 3] tiles.

    The model does the same on the device; this one is for parity and inspection. Raises ValueError for an unknown kind.
    """
    if kind not in NORMALIZATION:
        raise ValueError(f"normalization {kind!r} is unknown; use one of {', '.join(NORMALIZATION)}.")
    mean, std = (np.asarray(values, np.float32) for values in NORMALIZATION[kind])
    return (tiles.astype(np.float32) / np.float32(255) - mean) / std
