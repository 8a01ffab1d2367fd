"""What experts cost: a train step with visual experts against the same model with dense layers and no experts, at half visual tokens.

    python -m experiments.benchmarks.train_step [--rounds 20] [--out experiments/results/benchmarks/train_step.json]

Forward, backward and AdamW of the whole model, the two programs in turn within one process; the result is the ratio pair by pair.
Bar: at most 1.3.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from monovl_jax.config import Experts, ModelConfig
from monovl_jax.demo.recipe import demo_model
from monovl_jax.model import Ops
from monovl_jax.parallel.mesh import make_mesh
from monovl_jax.training.optimizer import make_optimizer
from monovl_jax.training.stages import Stage
from monovl_jax.training.step import make_train_step, place_batch
from monovl_jax.training.trainable import model_structure, random_parameters


def half_visual_batch(config: ModelConfig, rows: int, tiles: int, seed: int = 0) -> dict[str, np.ndarray]:
    """One sample a row: <img>, tiles * V visual tokens, </img>, and as much text; a third of the text is supervised."""
    rng = np.random.default_rng(seed)
    v, side = config.vision.tokens_per_tile, config.vision.tile_size
    visual = tiles * v
    length = 2 * visual
    index = np.full((rows, length), -1, np.int32)
    index[:, 1 : 1 + visual] = np.arange(visual)
    ids = rng.integers(0, config.decoder.vocab_size, (rows, length)).astype(np.int32)
    supervised = (index < 0) & (rng.random((rows, length)) < 1 / 3)
    return {
        "tokens": ids,
        "token_types": (index >= 0).astype(np.int8),
        "visual_index": index,
        "visual_slot": np.tile(np.arange(1, 1 + visual, dtype=np.int32), (rows, 1)),
        "positions": np.tile(np.arange(length, dtype=np.float32), (rows, 1)),
        "segment_ids": np.ones((rows, length), np.int32),
        "targets": np.roll(ids, -1, axis=1),
        "loss_weights": supervised.astype(np.float32),
        "tiles": rng.integers(0, 256, (rows, tiles, side, side, 3)).astype(np.uint8),
    }


class Step:
    """A compiled train step with its own parameters and optimizer state."""

    def __init__(self, experts: Experts, rows: int, tiles: int):
        config = demo_model(1000)
        config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, experts=experts))
        stage = Stage("bench", (".*",), 1000, rows, 1e-3, 2 * tiles * config.vision.tokens_per_tile, tiles, {"none": 1.0})
        optimizer, mesh = make_optimizer(stage), make_mesh()
        self.trainable = jax.device_put(random_parameters(config, 0))
        self.frozen: dict[str, Any] = {}
        stored = {"vision": {k: self.trainable["vision"].pop(k) for k in ("class_embedding", "class_position")}}
        self.frozen = stored
        self.state = optimizer.transform.init(self.trainable)
        graphdef = model_structure(config).graphdef
        self.step = make_train_step(graphdef, optimizer, Ops(), self.trainable, self.frozen, mesh)
        self.batch = place_batch(half_visual_batch(config, rows, tiles), mesh)
        self()

    def __call__(self) -> float:
        """Seconds of one step."""
        began = time.perf_counter()
        self.trainable, self.state, metrics = self.step(self.trainable, self.state, self.frozen, self.batch)
        jax.block_until_ready((self.trainable, metrics))
        return time.perf_counter() - began


def main(rounds: int = 20, rows: int = 32, tiles: int = 4, out: Path | None = None) -> dict[str, Any]:
    """Times dense, FFN experts, and FFN + attention experts in turn."""
    variants: tuple[Experts, ...] = ("none", "ffn", "ffn+attention")
    steps = {name: Step(name, rows, tiles) for name in variants}
    times = {name: [] for name in variants}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(step())
    ratios = {name: float(np.median(np.array(times[name]) / np.array(times["none"]))) for name in variants}
    result = {
        "ratio_to_dense": ratios,
        "median_seconds": {name: float(np.median(t)) for name, t in times.items()},
        "tokens": rows * 2 * tiles * 9,
        "visual_share": 0.5,
        "rounds": rounds,
        "device": jax.devices()[0].device_kind,
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "jax": jax.__version__,
    }
    for name, ratio in ratios.items():
        print(f"{name:14s} {result['median_seconds'][name] * 1e3:8.1f} ms   {ratio:.3f} x dense")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    tyro.cli(main)
