"""Tiny models with random weights and batches, for tests of the model and of what runs it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import pallas_kernels
from monovl_jax.config import ModelConfig, tiny
from monovl_jax.inference.generate import abstract_model
from monovl_jax.model import Ops
from tests.quick import quick_jit

REFERENCE = Ops(
    routed_linear=functools.partial(pallas_kernels.routed_linear, implementation="reference"),
    routed_swiglu=functools.partial(pallas_kernels.routed_swiglu, implementation="reference"),
)
SORTED = Ops(
    routed_linear=functools.partial(pallas_kernels.routed_linear, implementation="xla"),
    routed_swiglu=functools.partial(pallas_kernels.routed_swiglu, implementation="xla"),
)


def few_branches(monkeypatch: pytest.MonkeyPatch, blocks: int) -> None:
    """Fewer programs per switch of the sorted layers: the same code, compiled sooner."""
    monkeypatch.setattr("pallas_kernels.routing.BLOCKS", blocks)


def tiny_with(experts: str = "ffn", **decoder: Any) -> ModelConfig:
    config = tiny(experts)
    return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, **decoder))


def random_params(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Every leaf random, those that a fresh model has at 0 or 1 too."""
    rng = np.random.default_rng(seed)

    def leaf(path: Any, like: Any) -> np.ndarray:
        name, shape = path[-1].key, like.shape
        values = rng.normal(size=shape).astype(np.float32)
        if "norm" in name:
            return 1 + 0.2 * values
        if "bias" in name:
            return 0.2 * values
        if name == "qkv" or len(shape) == 4:  # [L, D, kv, g + 2, e]; the patch kernel [P, P, 3, C]
            return values * np.float32((shape[1] if name == "qkv" else np.prod(shape[:-1])) ** -0.5)
        return values if len(shape) == 1 or "embedding" in name else values * np.float32(shape[-2] ** -0.5)

    return jax.tree_util.tree_map_with_path(leaf, abstract_model(config)[1])


@functools.cache
def runner(config: ModelConfig, ops: Ops = REFERENCE) -> Callable[..., Any]:
    """(params, batch) -> logits [B, T, padded vocabulary], compiled."""
    graphdef = abstract_model(config)[0]

    def run(params, batch):
        model = nnx.merge(graphdef, params)
        return model.logits(model(batch, ops)[0], ops)

    return quick_jit(run)


def logits(config: ModelConfig, params: dict[str, Any], batch: dict[str, np.ndarray], ops: Ops = REFERENCE) -> np.ndarray:
    return np.asarray(runner(config, ops)(params, batch))[..., : config.decoder.vocab_size]


Sample = tuple[np.ndarray, np.ndarray]
"""ids int32[n] and tiles uint8[k, H, W, 3]; the k * tokens_per_tile visual slots begin at place 1."""


def sample(config: ModelConfig, length: int, tiles: int, seed: int) -> Sample:
    rng = np.random.default_rng(seed)
    side = config.vision.tile_size
    ids = rng.integers(0, config.decoder.vocab_size, length).astype(np.int32)
    return ids, rng.integers(0, 256, (tiles, side, side, 3), dtype=np.uint8)


def pack(config: ModelConfig, rows: Sequence[Sequence[Sample]], slots: int, tiles: int, left: bool = False) -> dict[str, np.ndarray]:
    """Samples side by side in each row; what remains is padding, on the right or on the left."""
    b, v, side = len(rows), config.vision.tokens_per_tile, config.vision.tile_size
    batch = {
        "tokens": np.zeros((b, slots), np.int32),
        "token_types": np.full((b, slots), -1, np.int8),
        "positions": np.ones((b, slots), np.float32),
        "segment_ids": np.zeros((b, slots), np.int32),
        "visual_index": np.full((b, slots), -1, np.int32),
        "visual_slot": np.full((b, tiles * v), -1, np.int32),
        "tiles": np.zeros((b, tiles, side, side, 3), np.uint8),
    }
    for row, samples in enumerate(rows):
        at, tile = slots - sum(len(ids) for ids, _ in samples) if left else 0, 0
        for number, (ids, pictures) in enumerate(samples, 1):
            n, k = len(ids), len(pictures)
            here, visual = slice(at, at + n), slice(at + 1, at + 1 + k * v)
            batch["tokens"][row, here], batch["segment_ids"][row, here] = ids, number
            batch["positions"][row, here] = np.arange(n)
            batch["token_types"][row, here] = 0
            batch["token_types"][row, visual] = 1
            batch["visual_index"][row, visual] = np.arange(tile * v, (tile + k) * v)
            batch["visual_slot"][row, tile * v : (tile + k) * v] = np.arange(visual.start, visual.stop)
            batch["tiles"][row, tile : tile + k] = pictures
            at, tile = at + n, tile + k
    return batch
