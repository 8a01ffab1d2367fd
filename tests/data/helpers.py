"""A tiny tokenizer, an encoding and pictures for the data tests."""

import io
import json
from pathlib import Path

import numpy as np
import tokenizers
from PIL import Image
from tokenizers import decoders, models

from monovl_jax.data.chat import TEMPLATES, Turn
from monovl_jax.data.packing import PackSpec
from monovl_jax.data.sources import ConversationSource, Encoding
from monovl_jax.data.tiling import TilingConfig
from monovl_jax.data.tokenizer import Tokenizer

SPECIAL = ["<pad>", "<|user|>", "<|assistant|>", "<|end|>", "<img>", "</img>", "<IMG_CONTEXT>"]


def tiny_tokenizer() -> Tokenizer:
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *map(chr, range(32, 127)), "\n"])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.add_special_tokens(SPECIAL)
    backend.decoder = decoders.Fuse()
    return Tokenizer.from_tokenizers(backend, eos="<|end|>", pad="<pad>")


def tiny_encoding(max_length: int | None = None, **tiling: object) -> Encoding:
    config = TilingConfig(**{"tile_size": 16, "max_tiles": 4, "use_thumbnail": False, **tiling})
    return Encoding(tiny_tokenizer(), TEMPLATES["compact"], config, visual_tokens_per_tile=4, max_length=max_length)


def tiny_spec(encoding: Encoding, tokens: int = 96, tiles: int = 6, **options: object) -> PackSpec:
    context = encoding.tokenizer.id_of("<IMG_CONTEXT>")
    return PackSpec(tokens, tiles, encoding.visual_tokens_per_tile, encoding.tiling.tile_size, context, **options)


class World(ConversationSource):
    """Sample i is a flat picture of colour i (1, 2 or 4 tiles) or a text, with a dialog about i."""

    def __init__(self, size: int, encoding: Encoding, offset: int = 0) -> None:
        super().__init__(encoding)
        self.size, self.offset = size, offset

    def __len__(self) -> int:
        return self.size

    def turns(self, index: int) -> list[Turn]:
        picture = "<image>" if self.image_sizes(index) else ""
        return [Turn("user", f"{picture}n{'?' * (index % 7)}"), Turn("assistant", f"{index + self.offset}")]

    def image_sizes(self, index: int) -> list[tuple[int, int]]:
        return [[], [(16, 16)], [(32, 16)], [(32, 32)]][index % 4]

    def images(self, index: int) -> list[np.ndarray]:
        return [np.full((height, width, 3), (index + self.offset) % 256, np.uint8) for width, height in self.image_sizes(index)]


def save_picture(path: Path, size: tuple[int, int] = (32, 16), cut: float = 1.0) -> None:
    """A noisy JPEG or PNG of (width, height), of which only the first part `cut` is written."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "JPEG" if path.suffix == ".jpg" else "PNG")
    data = stream.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data[: int(len(data) * cut)])


def line(image: object = None, question: str = "<image>what?", answer: str = "noise", **extra: object) -> bytes:
    """One JSONL line."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    entry = {"conversations": turns, **extra} | ({} if image is None else {"image": image})
    return json.dumps(entry).encode() + b"\n"
