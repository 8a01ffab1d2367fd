"""Reading pictures that may be missing, broken, huge or outside the data root.

Every failure is a `SampleError` that names the file. Sizes come from the header alone, so that planning decodes no pixel.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from monovl_jax.data.errors import SampleError

MAX_PIXELS = 89_478_485
"""Largest width * height that is decoded: Pillow's own threshold for a decompression bomb (a quarter GiB of RGB)."""


def check_image_name(root: str | Path, name: str) -> str:
    """`name` without a leading `./`. Raises SampleError if it is empty, absolute or contains `..`: root only stands in the message."""
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise SampleError(f"image path {name!r} is empty or not text; give a path relative to the image root.")
    if os.path.isabs(name) or name.startswith(("\\", "~")) or (len(name) > 1 and name[1] == ":"):
        raise SampleError(f"image path {name!r} is absolute; give a path relative to the image root {root}.")
    if ".." in name.replace("\\", "/").split("/"):
        raise SampleError(f"image path {name!r} contains '..' and may leave the image root; give a path inside {root}.")
    return name.removeprefix("./")


def resolve_image_path(root: str | Path, name: str) -> Path:
    """The path of picture `name` (relative) under `root`.

    Raises SampleError if `name` is empty, absolute, contains `..`, or leads out of `root` through a symbolic link.
    A missing file is not an error here.
    """
    check_image_name(root, name)
    real_root = os.path.realpath(root)
    path = os.path.realpath(os.path.join(real_root, name))
    if path != real_root and not path.startswith(real_root.rstrip(os.sep) + os.sep):
        raise SampleError(f"image path {name!r} leaves the image root {root} through a symbolic link; copy the file into the root.")
    return Path(path)


MAX_FILE_BYTES = 1 << 29
"""Largest picture file that `read_image` takes: twice the decoded size of the largest picture."""


def read_image(path: str | Path) -> bytes:
    """The content of a picture file as it is. Raises SampleError for a missing, unreadable or too large file."""
    try:
        if not os.path.isdir(path) and os.path.exists(path) and not os.path.isfile(path):
            raise SampleError(f"image {path} is no ordinary file; give the path of a picture.")
        with open(path, "rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise SampleError(f"image {path} does not exist; correct the path or the image root.") from None
    except IsADirectoryError:
        raise SampleError(f"image {path} is a folder; give the path of a picture.") from None
    except OSError as error:
        raise SampleError(f"image {path} cannot be opened ({type(error).__name__}: {error}); replace the file.") from None
    if len(data) > MAX_FILE_BYTES:
        raise SampleError(f"image {path} is a file of more than {MAX_FILE_BYTES:,} bytes; shrink it.")
    return data


def _open(path: str | Path, max_pixels: int, data: bytes | None = None) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path if data is None else io.BytesIO(data))
    except FileNotFoundError:
        raise SampleError(f"image {path} does not exist; correct the path or the image root.") from None
    except IsADirectoryError:
        raise SampleError(f"image {path} is a folder; give the path of a picture.") from None
    except Image.DecompressionBombError:
        raise SampleError(_too_large(path, "more than 178 million pixels", max_pixels)) from None
    except Image.UnidentifiedImageError:
        size = len(data) if data is not None else os.path.getsize(path) if os.path.isfile(path) else 0
        if size == 0:
            raise SampleError(f"image {path} is empty (0 bytes); copy it again.") from None
        raise SampleError(f"image {path} ({size} bytes) is in no format that Pillow reads; convert it to PNG or JPEG.") from None
    except (OSError, ValueError, SyntaxError, EOFError, TypeError, KeyError, IndexError, OverflowError) as error:
        # Pillow's format plug-ins raise nearly anything on damaged headers.
        raise SampleError(f"image {path} cannot be opened ({type(error).__name__}: {error}); replace the file.") from None
    width, height = image.size
    if width < 1 or height < 1:
        image.close()
        raise SampleError(f"image {path} has no pixels ({width} x {height}); replace the file.")
    if width * height > max_pixels:
        image.close()
        raise SampleError(_too_large(path, f"{width} x {height} = {width * height:,} pixels", max_pixels))
    return image


def _too_large(path: str | Path, what: str, max_pixels: int) -> str:
    return f"image {path} has {what}, the limit is {max_pixels:,}; shrink it or raise max_pixels."


def image_size(path: str | Path, max_pixels: int = MAX_PIXELS, data: bytes | None = None) -> tuple[int, int]:
    """(width, height) in pixels from the header of the file; data: its content, if that was read already (`path` only names it then).

    Raises SampleError for a missing, empty, unreadable or too large file. A truncated file with a sound header passes.
    """
    with _open(path, max_pixels, data) as image:
        return image.size


def load_image(path: str | Path, max_pixels: int = MAX_PIXELS, data: bytes | None = None) -> Image.Image:
    """The decoded picture in mode RGB (upstream's `convert('RGB')`; EXIF orientation is ignored, as there).

    data: the content of the file, if that was read already; `path` only names it then.

    Raises SampleError for a missing, empty, unreadable, truncated or too large file.
    """
    with _open(path, max_pixels, data) as image:
        try:
            return to_rgb(image)
        except (OSError, ValueError, SyntaxError, EOFError, TypeError, KeyError, IndexError, OverflowError, MemoryError) as error:
            raise SampleError(f"image {path} does not decode ({type(error).__name__}: {error}); replace the file.") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture in mode RGB, decoded; a copy unless it is RGB already."""
    if image.mode == "RGB":
        image.load()
        return image
    return image.convert("RGB")


JPEG_QUALITIES = (75, 100)
"""Lowest and highest quality of `recompress`."""


def recompress(tiles: np.ndarray, seed: Sequence[int]) -> np.ndarray:
    """uint8[k, S, S, 3] tiles, each written as JPEG and read again, its quality drawn evenly from 75 .. 100.

    A pure function of tiles and seed. Source: Mono-InternVL internvl/train/dataset.py:60-81 (`data_augment`).
    """
    lowest, highest = JPEG_QUALITIES
    qualities = np.random.default_rng(list(seed)).integers(lowest, highest + 1, len(tiles))
    again = np.empty_like(tiles)
    for number, (tile, quality) in enumerate(zip(tiles, qualities.tolist(), strict=True)):
        stream = io.BytesIO()
        Image.fromarray(tile).save(stream, "JPEG", quality=quality)
        again[number] = np.asarray(to_rgb(Image.open(stream)))
    return again
