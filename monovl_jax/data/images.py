"""Reading images that may be missing, broken, huge, hostile or outside the data root.

Every failure is a `SampleError` that names the file. Sizes come from the header alone, so that planning decodes no pixel.
"""

from __future__ import annotations

import io
import os
import re
import stat
import warnings
import zlib
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
    try:
        name.encode()
    except UnicodeEncodeError:
        raise SampleError(f"image path {name!r} holds half of a surrogate pair, which is no character; correct the path.") from None
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
"""Largest image file that is read: twice the decoded size of the largest image."""

MAX_SIDE = 65_535
"""Longest side of an image in pixels, as in JPEG. Pillow keeps a pointer and a block for every row: a PNG of 1 x 89,478,485 takes 5 GB."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""What is read. Pillow's other decoders run programs (EPS), hold images of another size inside (ICO, ICNS) or are seldom used."""

MAX_SCANS = 32
"""Most scans of a JPEG: each passes over the whole image again. Encoders write about ten."""

MAX_RLE_PIXELS = 1 << 22
"""Largest run-length coded BMP: Pillow decodes it in Python, byte by byte."""


def _opened(path: str | Path) -> io.BufferedReader:
    """A regular file, open for reading. A pipe, a socket or a device is refused before it is opened, which could wait for ever."""
    try:
        regular = stat.S_ISREG(mode := os.stat(path).st_mode)
        if not regular and not stat.S_ISDIR(mode):
            raise SampleError(f"image {path} is no regular file; give the path of an image.")
        # what was a file a moment ago may be a pipe now
        stream = os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb")
    except FileNotFoundError:
        raise SampleError(f"image {path} does not exist; correct the path or the image root.") from None
    except IsADirectoryError:
        raise SampleError(f"image {path} is a folder; give the path of an image.") from None
    except SampleError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte or half of a character
        raise SampleError(f"image {str(path)!r} cannot be opened ({type(error).__name__}: {error}); replace the file.") from None
    found = os.fstat(stream.fileno())
    if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_FILE_BYTES:
        stream.close()
        if not stat.S_ISREG(found.st_mode):
            raise SampleError(f"image {path} is no regular file; give the path of an image.")
        raise SampleError(f"image {path} is a file of more than {MAX_FILE_BYTES:,} bytes; shrink it.")
    return stream


def read_image(path: str | Path) -> bytes:
    """The content of an image file as it is. Raises SampleError for a missing, unreadable or too large file, and for a pipe or device."""
    with _opened(path) as stream:
        try:
            return stream.read(MAX_FILE_BYTES)
        except OSError as error:
            raise SampleError(f"image {path} cannot be read ({type(error).__name__}: {error}); replace the file.") from None


def _open(path: str | Path, max_pixels: int, stream: io.BufferedReader | io.BytesIO) -> Image.Image:
    """The image with its header read. `path` only names it; Pillow gets a stream, because it maps files into memory and then reads
    pixels that a damaged file does not hold."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images and damaged metadata
            image = Image.open(stream, formats=FORMATS)
    except Image.DecompressionBombError:
        raise SampleError(_too_large(path, "more than 178 million pixels", max_pixels)) from None
    except Image.UnidentifiedImageError:
        try:
            size = stream.seek(0, os.SEEK_END)
        except OSError as error:  # a file of /proc
            raise SampleError(f"image {path} cannot be read ({type(error).__name__}: {error}); replace the file.") from None
        if size == 0:
            raise SampleError(f"image {path} is empty (0 bytes); copy it again.") from None
        raise SampleError(
            f"image {path} ({size} bytes) is in no format that is read ({', '.join(FORMATS)}), or damaged; convert it to PNG or JPEG."
        ) from None
    except Exception as error:  # Pillow's decoders raise anything on damaged headers, struct.error and MemoryError included
        raise SampleError(f"image {path} cannot be opened ({type(error).__name__}: {error}); replace the file.") from None
    width, height = image.size
    try:
        if width < 1 or height < 1:
            raise SampleError(f"image {path} has no pixels ({width} x {height}); replace the file.")
        if max(width, height) > MAX_SIDE:
            raise SampleError(f"image {path} has {width} x {height} pixels, the limit of a side is {MAX_SIDE:,}; shrink or cut it.")
        if width * height > max_pixels:
            raise SampleError(_too_large(path, f"{width} x {height} = {width * height:,} pixels", max_pixels))
        if width * height > MAX_RLE_PIXELS and any(tile[0] == "bmp_rle" for tile in getattr(image, "tile", ())):
            raise SampleError(_too_large(path, f"{width} x {height} run-length coded pixels", MAX_RLE_PIXELS))
    except SampleError:
        image.close()
        raise
    return image


_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")  # in coded data 0xff is followed by 0 or a restart marker


def _scans(jpeg: bytes) -> int:
    """How many scans a JPEG file has, those of a preview in its metadata or of what follows its end not counted."""
    at, scans = 2, 0
    while scans <= MAX_SCANS and (found := _MARKER.search(jpeg, at)):
        kind, at = found[1][0], found.end()
        if kind == 0xD9:  # end of image
            break
        scans += kind == 0xDA
        if kind not in (0x01, 0xD8):  # all others have a length
            at += max(2, int.from_bytes(jpeg[at : at + 2], "big"))
    return scans


def _damaged_chunk(png: bytes) -> str | None:
    """The name of the first chunk of a PNG file whose checksum does not fit; Pillow does not compare those of pixels."""
    at, view = 8, memoryview(png)
    while at + 12 <= len(png):
        size = int.from_bytes(view[at : at + 4], "big")
        body, name = view[at + 4 : at + 8 + size], bytes(view[at + 4 : at + 8])
        if len(body) < size + 4:
            return None  # cut off: decoding tells
        if zlib.crc32(body) != int.from_bytes(view[at + 8 + size : at + 12 + size], "big"):
            return ascii(name.decode("latin-1"))
        if name == b"IEND":
            return None
        at += 12 + size
    return None


def _too_large(path: str | Path, what: str, max_pixels: int) -> str:
    return f"image {path} has {what}, the limit is {max_pixels:,}; shrink it or raise max_pixels."


def image_size(path: str | Path, max_pixels: int = MAX_PIXELS, data: bytes | None = None) -> tuple[int, int]:
    """(width, height) in pixels from the header of the file; data: its content, if that was read already (`path` only names it then).

    Raises SampleError for a missing, empty, unreadable or too large file, and for a format that is not in FORMATS. A truncated file with a
    sound header passes.
    """
    with _opened(path) if data is None else io.BytesIO(data) as stream, _open(path, max_pixels, stream) as image:
        return image.size


def load_image(path: str | Path, max_pixels: int = MAX_PIXELS, data: bytes | None = None) -> Image.Image:
    """The decoded image in mode RGB (`to_rgb`; EXIF orientation is ignored, as upstream does).

    data: the content of the file, if that was read already; `path` only names it then. The same bytes give the same pixels either way.

    Raises SampleError as `image_size` does, and for a truncated file or one that takes too long to decode.
    """
    data = read_image(path) if data is None else data
    with _open(path, max_pixels, io.BytesIO(data)) as image:
        size = image.size
        if image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > MAX_SCANS and _scans(data) > MAX_SCANS:
            raise SampleError(f"image {path} is a JPEG of more than {MAX_SCANS} scans; save it again.")
        if image.format == "PNG" and (chunk := _damaged_chunk(data)) is not None:
            raise SampleError(f"image {path} is damaged: the checksum of its chunk {chunk} does not fit; copy it again.")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of damaged metadata
                rgb = to_rgb(image)
        except SampleError as error:
            raise SampleError(f"image {path}: {error}") from None
        except Exception as error:  # as in _open
            raise SampleError(f"image {path} does not decode ({type(error).__name__}: {error}); replace the file.") from None
        if rgb.size != size:
            raise SampleError(f"image {path} has {size} pixels by its header and {rgb.size} decoded; replace the file.")
        return rgb


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in mode RGB, decoded; a copy unless it is RGB already.

    Whole numbers of more than 8 bits count from 0 to 65,535 and are divided by 257; floats count from 0 to 1. Raises SampleError for
    values outside. All other modes as Pillow's `convert("RGB")`: alpha is dropped.
    """
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65_535:
            raise SampleError(f"its values go from {values.min()} to {values.max()}, only 0 to 65,535 are read; save it with 16 bits.")
        return Image.fromarray(_EIGHT_BITS[values]).convert("RGB")
    if image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):  # NaN fails too
            raise SampleError(
                f"its values go from {values.min()} to {values.max()}, floats are read from 0 to 1; scale them, or save 8 bits."
            )
        return Image.fromarray(np.rint(values * np.float32(255)).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


_EIGHT_BITS = ((np.arange(65_536) + 128) // 257).astype(np.uint8)  # of 16, rounded


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
