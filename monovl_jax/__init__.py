"""Monolithic vision-language models in JAX: train, convert, run and study them.

The public names are the table below. Importing ``monovl_jax`` imports none of them: each is loaded when it is first used, so a
script that only reads a config does not wait for JAX, and a converter does not need the data pipeline's packages.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# name -> the module that defines it
_PUBLIC: dict[str, str] = {
    # configurations
    "ModelConfig": "monovl_jax.config",
    "VisionConfig": "monovl_jax.config",
    "DecoderConfig": "monovl_jax.config",
    "RopeConfig": "monovl_jax.config",
    "named_config": "monovl_jax.config",
    "read_config": "monovl_jax.config",
    "config_to_json": "monovl_jax.config",
    # the model
    "VLM": "monovl_jax.model",
    "Ops": "monovl_jax.model",
    # using one
    "from_pretrained": "monovl_jax.pretrained",
    "Pretrained": "monovl_jax.pretrained",
    "import_model": "monovl_jax.convert.importer",
    "export": "monovl_jax.pretrained",
    "init_model": "monovl_jax.convert.init",
    "inspect_model": "monovl_jax.convert.inspect",
    "load_weights": "monovl_jax.convert.weights",
    "run_case": "monovl_jax.evaluation.parity",
    # data
    "Tokenizer": "monovl_jax.data.tokenizer",
    "TEMPLATES": "monovl_jax.data.chat",
    "TilingConfig": "monovl_jax.data.tiling",
    "tile_image": "monovl_jax.data.tiling",
    "JsonlSource": "monovl_jax.data.jsonl",
    "PackSpec": "monovl_jax.data.packing",
    "Pipeline": "monovl_jax.data.pipeline",
    # training
    "Stage": "monovl_jax.training.stages",
    "Recipe": "monovl_jax.training.stages",
    "train": "monovl_jax.training.loop",
    "load_run": "monovl_jax.training.checkpoint",
}

__all__ = ["__version__", *_PUBLIC]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562).

    Raises:
      AttributeError: no public name is called so; the message lists those that are.
    """
    if name not in _PUBLIC:
        known = ", ".join(sorted(_PUBLIC)) or "none yet"
        raise AttributeError(f"module 'monovl_jax' has no public name {name!r}; it has: {known}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value  # the next use does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
