"""A model folder, ready to use: a training run of ours, or a folder in the released layout."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from monovl_jax.config import ConfigError, ModelConfig, read_config
from monovl_jax.convert.weights import load_weights
from monovl_jax.data.chat import TEMPLATES, ChatTemplate, Turn, encode_prompt
from monovl_jax.data.images import load_image
from monovl_jax.data.tiling import TilingConfig, tile_image
from monovl_jax.data.tokenizer import Tokenizer
from monovl_jax.inference.generate import Generator
from monovl_jax.inference.prompts import Prompt
from monovl_jax.model import Ops
from monovl_jax.training.checkpoint import load_run

IMAGE = "<image>"
CONTEXT_TOKEN = "<IMG_CONTEXT>"


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """config, parameters (nested dict of arrays) and the tokenizer that belong together."""

    config: ModelConfig
    params: dict[str, Any]
    tokenizer: Tokenizer

    @property
    def template(self) -> ChatTemplate:
        return TEMPLATES[self.config.template]

    def tiling(self) -> TilingConfig:
        """How this model cuts pictures into tiles."""
        c = self.config
        return TilingConfig(
            tile_size=c.vision.tile_size,
            min_tiles=c.min_tiles,
            max_tiles=c.max_tiles,
            use_thumbnail=c.use_thumbnail,
            normalization=c.vision.pixel_statistics,
        )

    def prompt(self, text: str, images: list[Image.Image | np.ndarray | str | Path]) -> Prompt:
        """A user question with pictures. Pictures without an `<image>` in the text go before it.

        Raises SampleError when a picture cannot be read or when pictures and `<image>` placeholders disagree in number.
        """
        tiling = self.tiling().for_images(max(1, len(images)))
        pictures = [load_image(Path(i)) if isinstance(i, str | Path) else i for i in images]
        tiles = [tile_image(picture, tiling) for picture in pictures]
        if images and IMAGE not in text:
            text = IMAGE * len(images) + self.template.image_separator + text
        counts = [len(t) for t in tiles]
        ids = encode_prompt([Turn("user", text)], self.template, self.tokenizer, counts, self.config.vision.tokens_per_tile)
        return Prompt(ids, np.concatenate(tiles) if tiles else None)

    def generator(self, ops: Ops | None = None) -> Generator:
        """Compiled generation with the stop tokens of the chat template."""
        tokenizer = self.tokenizer
        stops = {tokenizer.id_of(self.template.stop)}
        stops |= {i for i in (tokenizer.eos_id,) if i is not None}
        pad = tokenizer.pad_id if tokenizer.pad_id is not None else 0
        return Generator(self.config, self.params, ops or Ops(), tokenizer.id_of(CONTEXT_TOKEN), sorted(stops), pad)

    def answer(self, generator: Generator, prompts: list[Prompt], max_new_tokens: int) -> list[str]:
        """Generated text of every prompt, stripped."""
        return [self.tokenizer.decode(ids.tolist()).strip() for ids in generator(prompts, max_new_tokens)]


def load_pretrained(path: str | Path, stage: str | None = None) -> Pretrained:
    """Loads a run directory (after its last finished stage, or `stage`) or a folder in the released layout.

    Raises ConfigError, WeightsError, RunError or TokenizerError with what is missing.
    """
    path = Path(path)
    if not path.is_dir():
        raise ConfigError(f"{path} is no folder; give a run directory or a model folder")
    if (path / "experiment.json").is_file():
        config, params = load_run(path, stage)
        return Pretrained(config, params, Tokenizer.from_folder(path))
    if stage is not None:
        raise ConfigError(f"{path} is a model folder, not a run; it has no stage {stage!r}")
    config = read_config(path)
    return Pretrained(config, load_weights(path, config), Tokenizer.from_folder(path))
