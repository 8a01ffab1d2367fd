"""Prompts for a tiny model, and its generator compiled quickly."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest

from monovl_jax.config import ModelConfig
from monovl_jax.data.chat import TEMPLATES, ChatTemplate, Turn, encode_prompt
from monovl_jax.data.images import load_image
from monovl_jax.data.tiling import TilingConfig, tile_image
from monovl_jax.data.tokenizer import Tokenizer
from monovl_jax.inference import generate
from monovl_jax.inference.generate import Generator
from monovl_jax.inference.prompts import Prompt
from tests.data.helpers import tiny_tokenizer
from tests.model.helpers import REFERENCE, random_params, tiny_with
from tests.quick import quick_jit

CONFIG = tiny_with("ffn+attention")
VISION = CONFIG.vision
CONTEXT, PAD, NEVER = 299, 7, 12345
V, SIDE = VISION.tokens_per_tile, VISION.tile_size

_STATIC = {
    "greedy": {"static_argnames": ("graphdef", "ops", "max_new_tokens", "keep_scores")},
    "prefill": {"static_argnames": ("graphdef", "ops", "room")},
    "extend": {"static_argnames": ("graphdef", "ops")},
    "begin": {"static_argnames": ("columns", "split")},
    "decode": {"static_argnames": ("graphdef", "ops"), "donate_argnames": ("state",)},
}
QUICK = {name: quick_jit(getattr(generate, name).__wrapped__, **options) for name, options in _STATIC.items()}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same programs, compiled without XLA's slower optimisations."""
    for name, program in QUICK.items():
        monkeypatch.setattr(generate, name, program)


def prompt(length: int, tiles: int, seed: int) -> Prompt:
    """Visual slots from place 1 on."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 290, length).astype(np.int32)
    ids[1 : 1 + tiles * V] = CONTEXT
    return Prompt(ids, rng.integers(0, 256, (tiles, SIDE, SIDE, 3), dtype=np.uint8) if tiles else None)


@functools.cache
def generator(stop: int = NEVER, config: Any = CONFIG, **options: Any) -> Generator:
    """Three stop ids always: one compiled program."""
    return Generator(config, random_params(config), REFERENCE, CONTEXT, [stop, 12346, 12347], PAD, **options)


@dataclasses.dataclass(frozen=True)
class SmallModel:
    """What a loaded model offers: the tiny config with a tokenizer of single characters."""

    tokenizer: Tokenizer
    config: ModelConfig
    generator: Generator

    @property
    def template(self) -> ChatTemplate:
        return TEMPLATES[self.config.template]

    def tiling(self) -> TilingConfig:
        return TilingConfig(tile_size=SIDE, max_tiles=4, use_thumbnail=False)

    def prompt(self, text: str, images: list[Any]) -> Prompt:
        tiles = [tile_image(load_image(image), self.tiling()) for image in images]
        turn = Turn("user", "<image>" * len(images) + text)
        ids = encode_prompt([turn], self.template, self.tokenizer, [len(t) for t in tiles], V)
        return Prompt(ids, np.concatenate(tiles) if tiles else None)


@functools.cache
def small_model() -> SmallModel:
    tokenizer = tiny_tokenizer()
    made = Generator(
        CONFIG, random_params(CONFIG), REFERENCE, tokenizer.id_of("<IMG_CONTEXT>"), [tokenizer.id_of("<|end|>"), NEVER, NEVER], 0
    )
    return SmallModel(tokenizer, CONFIG, made)
