"""What experts cost, and what routing saves: train steps of the demo's model at half visual tokens, side by side.

    python -m experiments.benchmarks.train_step [--rounds 20] [--out experiments/results/train_step.json]

The same model with dense layers and no experts, with visual FFN experts, and with attention experts too; the last two with tokens routed to
their expert and, "masked both", with every expert on every token. Forward, backward and AdamW of the whole model, all programs in turn
within one process, in both orders; the results are ratios round by round, and the ratio of the operations in matmuls beside them.
Bars: with FFN experts at most 1.3 of the dense model; routed at least 1.15 times as fast as masked both.
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

    def __init__(self, experts: Experts, rows: int, tiles: int, ops: Ops):
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
        self.step = make_train_step(graphdef, optimizer, ops, self.trainable, self.frozen, mesh)
        self.batch = place_batch(half_visual_batch(config, rows, tiles), mesh)
        self()

    def __call__(self) -> float:
        """Seconds of one step."""
        began = time.perf_counter()
        self.trainable, self.state, metrics = self.step(self.trainable, self.state, self.frozen, self.batch)
        jax.block_until_ready((self.trainable, metrics))
        return time.perf_counter() - began


def matmul_operations(experts: Experts, rows: int, tiles: int, copies: int) -> float:
    """Operations of the matmuls of one step, when each token passes through so many copies of what has experts. Backward: twice forward."""
    config = demo_model(1000)
    d, v, per_tile = config.decoder, config.vision, config.vision.tokens_per_tile
    length = 2 * tiles * per_tile
    attention = 2 * d.hidden_size**2 + 2 * d.hidden_size * d.num_kv_heads * d.head_dim
    ffn = 3 * d.hidden_size * d.intermediate_size
    layer = attention * (copies if experts == "ffn+attention" else 1) + ffn * (copies if experts != "none" else 1)
    layer += 2 * length * d.hidden_size  # scores and what they weigh
    per_tile_of_vision = v.grid**2 * 3 * v.patch_size**2 * v.hidden_size  # patch embedding, then the projector's two layers
    per_tile_of_vision += per_tile * (v.hidden_size * v.shuffle**2 * d.hidden_size + d.hidden_size**2)
    logits = length / 6 * d.hidden_size * d.padded_vocab_size
    return 3 * 2.0 * rows * (length * d.num_layers * layer + tiles * per_tile_of_vision + logits)


def main(rounds: int = 20, rows: int = 32, tiles: int = 4, out: Path | None = None) -> dict[str, Any]:
    """Times all variants in turn."""
    routed, both = Ops(), Ops(implementation="reference")
    variants: dict[str, tuple[Experts, Ops]] = {
        "none": ("none", routed),
        "ffn": ("ffn", routed),
        "ffn+attention": ("ffn+attention", routed),
        "ffn, masked both": ("ffn", both),
        "ffn+attention, masked both": ("ffn+attention", both),
    }
    steps = {name: Step(experts, rows, tiles, ops) for name, (experts, ops) in variants.items()}
    operations = {name: matmul_operations(experts, rows, tiles, 2 if ops is both else 1) for name, (experts, ops) in variants.items()}
    times = {name: [] for name in variants}
    for turn in range(rounds):
        for name in list(steps)[:: 1 if turn % 2 else -1]:
            times[name].append(steps[name]())
    ratios = {name: float(np.median(np.array(times[name]) / np.array(times["none"]))) for name in variants}
    faster = {
        name: {
            "time": float(np.median(np.array(times[f"{name}, masked both"]) / np.array(times[name]))),
            "operations": operations[f"{name}, masked both"] / operations[name],
        }
        for name in ("ffn", "ffn+attention")
    }
    result = {
        "ratio_to_dense": ratios,
        "masked_both_over_routed": faster,
        "median_seconds": {name: float(np.median(t)) for name, t in times.items()},
        "matmul_operations": operations,
        "tokens": rows * 2 * tiles * demo_model(1000).vision.tokens_per_tile,
        "visual_share": 0.5,
        "rounds": rounds,
        "device": jax.devices()[0].device_kind,
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "jax": jax.__version__,
    }
    for name, ratio in ratios.items():
        print(f"{name:28s} {result['median_seconds'][name] * 1e3:8.1f} ms   {ratio:.3f} x dense")
    for name, by in faster.items():
        print(f"{name}: masked both takes {by['time']:.2f} x the time of routed, with {by['operations']:.2f} x the operations")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    tyro.cli(main)
