"""Random batches and tiny recipes for the training tests."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from monovl_jax.config import ModelConfig, tiny
from monovl_jax.model import Ops
from monovl_jax.training.stages import Recipe, Stage
from monovl_jax.training.trainable import Tree, flatten, model_structure, unflatten

VISUAL = (r"^vision/", r"^projector/", r"^decoder/blocks/mlp/visual/")

OPS = Ops(routed_swiglu=partial(pallas_kernels.routed_swiglu, implementation="reference"))
"""Experts computed plainly: the sorted ones take seconds to compile for every batch shape, and have tests of their own."""


def plain_parameters(config: ModelConfig, seed: int = 0) -> Tree:
    """Random parameters made by numpy: nothing to compile."""
    rng = np.random.default_rng(seed)

    def make(path: str, shape: tuple[int, ...]) -> jax.Array:
        fan_in = {"embedding": 4, "position_embedding": 10}.get(path.split("/")[-1])
        if fan_in is None:
            fan_in = math.prod(shape[:-1]) if path == "vision/kernel" else shape[1] if path.startswith("decoder/blocks/") else shape[0]
        flat = "norm" in path or "bias" in path
        return jnp.asarray(("norm" in path) + (0.1 if flat else fan_in**-0.5) * rng.standard_normal(shape), jnp.float32)

    return unflatten({path: make(path, leaf.shape) for path, leaf in flatten(model_structure(config).shapes).items()})


def image_rows(config: ModelConfig, rows: int, length: int, tiles: int, seed: int) -> dict[str, np.ndarray]:
    """Rows of two packed samples: one that begins with all the row's tiles, one of text; then padding. Random targets and weights."""
    rng = np.random.default_rng(seed)
    visual = tiles * config.vision.tokens_per_tile
    first, end = visual + (length - visual) // 2, length - 2
    segments = np.zeros((rows, length), np.int32)
    segments[:, :first], segments[:, first:end] = 1, 2
    positions = np.arange(length, dtype=np.float32)[None].repeat(rows, 0)
    positions[:, first:] -= first
    types = np.zeros((rows, length), np.int8)
    types[:, 1 : 1 + visual], types[:, end:] = 1, -1
    index = np.full((rows, length), -1, np.int32)
    index[:, 1 : 1 + visual] = np.arange(visual)
    weights = rng.uniform(0.5, 2, (rows, length)).astype(np.float32) * (types == 0) * (rng.random((rows, length)) < 0.6)
    size = config.vision.tile_size
    return {
        "tokens": rng.integers(0, config.decoder.vocab_size, (rows, length)).astype(np.int32),
        "token_types": types,
        "visual_index": index,
        "visual_slot": np.arange(1, 1 + visual, dtype=np.int32)[None].repeat(rows, 0),
        "positions": positions,
        "segment_ids": segments,
        "targets": rng.integers(0, config.decoder.vocab_size, (rows, length)).astype(np.int32),
        "loss_weights": weights.astype(np.float32),
        "tiles": rng.integers(0, 256, (rows, tiles, size, size, 3)).astype(np.uint8),
    }


def text_rows(config: ModelConfig, rows: int, length: int, seed: int) -> dict[str, np.ndarray]:
    """Rows of one text sample, without any of the fields that pictures need."""
    rng = np.random.default_rng(seed)
    return {
        "tokens": rng.integers(0, config.decoder.vocab_size, (rows, length)).astype(np.int32),
        "positions": np.arange(length, dtype=np.float32)[None].repeat(rows, 0),
        "segment_ids": np.ones((rows, length), np.int32),
        "targets": rng.integers(0, config.decoder.vocab_size, (rows, length)).astype(np.int32),
        "loss_weights": np.ones((rows, length), np.float32),
    }


def stage(name: str = "S1.1", trainable: tuple[str, ...] = VISUAL, **changes: Any) -> Stage:
    defaults: dict[str, Any] = dict(
        steps=6,
        batch_size=4,
        learning_rate=1e-2,
        sequence_length=20,
        tiles_per_row=1,
        mixture={"random": 1.0},
        warmup_steps=2,
        text_rows=2,
        text_length=8,
        text_mixture={"random": 1.0},
        accumulation=2,
    )
    return Stage(name=name, trainable=trainable, **{**defaults, **changes})


def text_stage(name: str = "S0", **changes: Any) -> Stage:
    return stage(
        name, (r"^decoder/",), **{**dict(steps=3, tiles_per_row=0, text_rows=0, text_length=0, text_mixture={}, accumulation=1), **changes}
    )


def recipe(**changes: Any) -> Recipe:
    """A text stage, a visual stage and a stage of everything."""
    default = Recipe("tiny", tiny(), (text_stage(), stage(), stage("S2", (r".*",), steps=3)), copy_experts_before="S1.1")
    return dataclasses.replace(default, **changes)


def make_batches(stage: Stage, position: int) -> Iterator[tuple[dict[str, np.ndarray], ...]]:
    """Endless batches of a stage of a tiny model; batch n depends on the stage and n alone."""
    config, number = tiny(), position
    while True:
        seed = 1000 * (ord(stage.name[1]) + len(stage.name)) + number
        first = (
            image_rows(config, stage.batch_size, stage.sequence_length, stage.tiles_per_row, seed)
            if stage.tiles_per_row
            else text_rows(config, stage.batch_size, stage.sequence_length, seed)
        )
        yield (first, text_rows(config, stage.text_rows, stage.text_length, seed + 1)) if stage.text_rows else (first,)
        number += 1
