"""A model folder, ready to use: a training run of ours, an imported model, or a folder in the released layout; and the way back out."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from PIL import Image

from monovl_jax.config import ConfigError, ModelConfig, read_config
from monovl_jax.convert.checkpoint import is_imported, load_imported
from monovl_jax.convert.exporter import export_model, export_params, export_tree
from monovl_jax.convert.weights import load_weights
from monovl_jax.data.chat import ChatTemplate, Turn, encode_prompt, template_named
from monovl_jax.data.images import load_image
from monovl_jax.data.tiling import TilingConfig, tile_image
from monovl_jax.data.tokenizer import Tokenizer
from monovl_jax.inference.generate import Generator
from monovl_jax.inference.prompts import Prompt
from monovl_jax.inference.sampling import GREEDY, Sampling
from monovl_jax.model import Ops
from monovl_jax.training.checkpoint import Step, final_folder, find_step, load_run, load_step

IMAGE = "<image>"
CONTEXT_TOKEN = "<IMG_CONTEXT>"


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """config, parameters (nested dict of arrays) and the tokenizer that belong together; folder: where they came from."""

    config: ModelConfig
    params: dict[str, Any]
    tokenizer: Tokenizer
    folder: Path
    trust_control_tokens: bool = False
    """Whether control tokens in a user's text are such (`ChatTemplate`)."""

    @property
    def template(self) -> ChatTemplate:
        return dataclasses.replace(template_named(self.config.template), trust_control_tokens=self.trust_control_tokens)

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

    def generator(self, ops: Ops | None = None, mesh: Mesh | None = None) -> Generator:
        """Compiled generation with the stop tokens of the chat template; mesh: of all devices that compute (`Generator`).

        Raises MeshError when the mesh cannot divide the model.
        """
        tokenizer = self.tokenizer
        stops = {tokenizer.id_of(self.template.stop)}
        stops |= {i for i in (tokenizer.eos_id,) if i is not None}
        pad = tokenizer.pad_id if tokenizer.pad_id is not None else 0
        return Generator(self.config, self.params, ops or Ops(), tokenizer.id_of(CONTEXT_TOKEN), sorted(stops), pad, mesh=mesh)

    def save_pretrained(self, dst: str | Path, dtype: str | None = None, shard_gb: float = 5.0) -> Path:
        """Writes the model in the released layout into a new folder, with the tokenizer's files of where it came from; returns `dst`.

        dtype: float32, bfloat16 or float16 for every tensor; as they are by default. Raises WeightsError; nothing is written then.
        """
        return export_tree(self.params, self.config, self.folder, dst, dtype, shard_gb)

    def answer(self, generator: Generator, prompts: list[Prompt], max_new_tokens: int, sampling: Sampling = GREEDY) -> list[str]:
        """Generated text of every prompt, stripped."""
        return [self.tokenizer.decode(ids.tolist()).strip() for ids in generator(prompts, max_new_tokens, sampling=sampling)]


def from_pretrained(path: str | Path, stage: str | None = None, step: Step | None = None, verify: bool = True) -> Pretrained:
    """Loads a run directory (after its last finished stage, or `stage`), an imported model, or a folder in the released layout.

    step: of a run, which may be going on: a step checkpoint, or "latest" for what was saved last.

    A name like `OpenGVLab/Mono-InternVL-2B` that is no folder here is downloaded from the Hugging Face hub when the extra `hf` is
    installed: safetensors, JSON and tokenizer files only, never code or pickles.

    verify: compare the digests of an imported model's files first.

    Raises ConfigError, WeightsError, RunError or TokenizerError with what is missing.
    """
    folder = Path(path)
    if not folder.is_dir():
        folder = _download(str(path))
    if (folder / "experiment.json").is_file():
        config, params = load_run(folder, stage, step=step)
        return Pretrained(config, params, _tokenizer(folder, config), folder)
    _refuse_stage(folder, stage, step)
    config = read_config(folder)
    template_named(config.template)
    tokenizer = _tokenizer(folder, config)
    params = load_imported(folder, config, verify=verify) if is_imported(folder) else load_weights(folder, config)
    return Pretrained(config, params, tokenizer, folder)


def _tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    """Raises ConfigError when the model has no row for an id of the tokenizer: that row would be zeros."""
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer.vocab_size > config.decoder.vocab_size:
        last = tokenizer.vocab_size - 1
        raise ConfigError(
            f"{folder}: the tokenizer goes up to id {last} ({tokenizer.token_of(last)!r}) and the model has "
            f"{config.decoder.vocab_size} rows; give the tokenizer that the model was trained with, or resize its embedding"
        )
    return tokenizer


def _refuse_stage(folder: Path, stage: str | None, step: Step | None) -> None:
    if stage is not None or step is not None:
        what = f"stage {stage!r}" if stage is not None else f"step {step}"
        raise ConfigError(f"{folder} is a model folder, not a run; it has no {what}")


def _download(name: str) -> Path:
    """The folder of a model on the Hugging Face hub."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) or Path(name).exists():
        raise ConfigError(f"{name} is no folder; give a run directory, a model folder, or a name on the Hugging Face hub")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ConfigError(f"{name} is no folder; to fetch it from the Hugging Face hub `pip install 'monovl_jax[hf]'`") from None
    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model"]))
    except Exception as error:  # the hub raises a dozen kinds: no network, no such model, no permission
        raise ConfigError(
            f"{name} is no folder and cannot be fetched from the Hugging Face hub ({type(error).__name__}: {error})"
        ) from error


def export(
    src: str | Path,
    dst: str | Path,
    dtype: str | None = None,
    shard_gb: float = 5.0,
    stage: str | None = None,
    step: Step | None = None,
    verify: bool = True,
    **options: Any,
) -> Path:
    """Writes an imported model, or a run after `stage` (its last finished one by default), in the released layout; returns `dst`.

    step: of a run, which may be going on: a step checkpoint (held in memory), or "latest" for what was saved last.

    dtype, shard_gb, progress: see `convert.exporter.export_params`. verify: compare the digests of an imported model.
    Raises ConfigError, WeightsError or RunError.
    """
    src = Path(src)
    if not (src / "experiment.json").is_file():
        _refuse_stage(src, stage, step)
        return export_model(src, dst, dtype, shard_gb, verify=verify, **options)
    if step is not None:
        stage, number = find_step(src, stage, step)
        if number is not None:
            config, params = load_step(src, stage, number)
            return export_tree(params, config, src, dst, dtype, shard_gb, **options)
    config, final = final_folder(src, stage)
    return export_params(Path(final), config, src, dst, dtype, shard_gb, **options)
