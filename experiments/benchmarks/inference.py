"""Speed against a plain eager PyTorch twin with the same weights: prefill, decode and a delta-tuning step, in turn within one run.

    export GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184
    python -m experiments.benchmarks.inference --torch-python .venv-torch/bin/python [--rounds 9] [--out experiments/results/inference.json]

The setting makes both sides keep freed memory: in a virtual machine that hands idle pages back to its host, fetching them again takes as
long as the step itself, and falls on whoever allocates more.

The twin (torch_twin.py) computes both experts on every token and blends, as upstream does. It lives in a process and an environment of
its own. Each job runs on one thread and on as many as there are cores first, and then on the number that was faster: torch's threads
lose more than they win on small matrices. Both sides get the same tokens and pixels; their answers are compared.

    prefill   512 tokens, half of them visual; only the last place's logits on both sides (upstream makes all)   bar 1.2
    train     4 rows of those, forward, backward, clipping and AdamW of patch embedding, projector, visual FFNs   bar 1.25
    decode    64 greedy tokens after a prompt of 32, the prompt's prefill included                                bar 1.5; tiny: 3

Ratios are torch's seconds over ours, pair by pair; the result is the median.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from safetensors.numpy import save_file

from monovl_jax.config import DecoderConfig, ModelConfig, RopeConfig, VisionConfig, config_to_json, tiny
from monovl_jax.convert.key_table import tree_to_upstream
from monovl_jax.inference.generate import Generator
from monovl_jax.inference.prompts import Prompt, prompt_batch
from monovl_jax.model import Ops
from monovl_jax.model.patch_embed import PIXEL_STATISTICS
from monovl_jax.parallel.mesh import make_mesh
from monovl_jax.recipes.evip import VISUAL
from monovl_jax.training.optimizer import make_optimizer
from monovl_jax.training.stages import Stage
from monovl_jax.training.step import make_train_step, place_batch
from monovl_jax.training.trainable import model_structure, random_parameters, select, split_tree

Job = Callable[[], tuple[float, np.ndarray]]
"""One run: its seconds, and values to compare."""

TwinJob = Callable[[int], tuple[float, np.ndarray]]
"""The same of the twin, on so many threads."""

BARS = {"prefill": 1.2, "train": 1.25, "decode": 1.5, "tiny decode": 3.0}


def mid_size() -> ModelConfig:
    """8 layers of 512 with FFNs of 2048, and tiles of 256 tokens as released."""
    return ModelConfig(
        vision=VisionConfig(hidden_size=256),
        decoder=DecoderConfig(
            vocab_size=8192,
            hidden_size=512,
            intermediate_size=2048,
            num_layers=8,
            num_heads=8,
            num_kv_heads=4,
            rope=RopeConfig(theta=10_000.0),
            max_position_embeddings=2048,
        ),
    )


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = jax.block_until_ready(run())
    return time.perf_counter() - began, result


class Twin:
    """The PyTorch side: the same weights in a process of another environment."""

    def __init__(self, python: str, folder: Path, config: ModelConfig, params: dict[str, Any], context_id: int):
        save_file({k: np.ascontiguousarray(v) for k, v in tree_to_upstream(config, params)}, folder / "model.safetensors")
        (folder / "config.json").write_text(config_to_json(config), encoding="utf-8")
        command = [python, "-m", "experiments.benchmarks.torch_twin", "--serve"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.folder = folder
        self._send({"folder": str(folder), "image_id": context_id})

    def _send(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def job(self, job: str, inputs: dict[str, np.ndarray], **options: Any) -> TwinJob:
        path = self.folder / f"{job}_{len(inputs['input_ids'])}.npz"
        np.savez(path, **inputs)

        def run(threads: int) -> tuple[float, np.ndarray]:
            self._send({"job": job, "inputs": str(path), "threads": threads, **options})
            assert self.process.stdout is not None
            line = self.process.stdout.readline()
            if not line:
                raise RuntimeError("the PyTorch twin ended; its own words are above")
            answer = json.loads(line)
            return answer["seconds"], np.array(answer["values"])

        return run

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class Side:
    """One model of ours with random weights, and its twin."""

    def __init__(self, config: ModelConfig, python: str, folder: Path):
        self.config, self.context_id = config, config.decoder.vocab_size - 1
        self.params = jax.device_get(random_parameters(config, 0))
        self.generator = Generator(config, self.params, Ops(), self.context_id, [-1], 2)
        self.twin = Twin(python, folder, config, self.params, self.context_id)

    def prompt(self, tokens: int, tiles: int, seed: int = 0) -> Prompt:
        rng, v = np.random.default_rng(seed), self.config.vision
        ids = rng.integers(3, self.context_id, tokens).astype(np.int32)
        ids[8 : 8 + tiles * v.tokens_per_tile] = self.context_id
        return Prompt(ids, rng.integers(0, 256, (tiles, v.tile_size, v.tile_size, 3), dtype=np.uint8) if tiles else None)

    def inputs(self, prompts: list[Prompt]) -> dict[str, np.ndarray]:
        """What the twin takes: int64 ids and mask, normalised pixels [tiles, 3, H, W]."""
        ids = np.stack([p.ids for p in prompts]).astype(np.int64)
        given = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        tiles = [p.tiles for p in prompts if p.tiles is not None]
        if tiles:
            mean, std = (np.array(x, np.float32) for x in PIXEL_STATISTICS[self.config.vision.pixel_statistics])
            pixels = (np.concatenate(tiles).astype(np.float32) / 255 - mean) / std
            given |= {"pixel_values": pixels.transpose(0, 3, 1, 2).copy(), "image_flags": np.ones((len(pixels), 1), np.int64)}
        return given

    def prefill(self, tokens: int) -> tuple[Job, TwinJob]:
        prompt = self.prompt(tokens, tokens // 2 // self.config.vision.tokens_per_tile)
        batch = prompt_batch([prompt], self.config.vision, self.context_id, slots=tokens)

        def run() -> tuple[float, np.ndarray]:
            seconds, (logits, _) = timed(lambda: self.generator.read(dict(batch), tokens, tokens - 1, tokens))
            return seconds, np.asarray(logits)[0, : self.config.decoder.vocab_size]

        return run, self.twin.job("prefill", self.inputs([prompt]))

    def decode(self, rows: int, steps: int = 64, tokens: int = 32) -> tuple[Job, TwinJob]:
        prompts = [self.prompt(tokens, 0, seed) for seed in range(rows)]

        def run() -> tuple[float, np.ndarray]:
            seconds, ids = timed(lambda: self.generator(prompts, steps))
            return seconds, np.concatenate(ids)

        return run, self.twin.job("decode", self.inputs(prompts), steps=steps)

    def train(self, tokens: int, rows: int) -> tuple[Job, TwinJob]:
        tiles = tokens // 2 // self.config.vision.tokens_per_tile
        prompts = [self.prompt(tokens, tiles, seed) for seed in range(rows)]
        inputs = self.inputs(prompts)
        text = inputs["input_ids"] != self.context_id
        text[:, :9] = False
        batch = prompt_batch(prompts, self.config.vision, self.context_id, slots=tokens)
        batch["targets"] = np.roll(batch["tokens"], -1, 1)
        batch["loss_weights"] = np.roll(text, -1, 1).astype(np.float32) * (np.arange(tokens) < tokens - 1)
        stage = Stage("bench", VISUAL, 1000, rows, 1e-4, tokens, tiles, {"none": 1.0}, schedule="constant")
        structure, optimizer, mesh = model_structure(self.config), make_optimizer(stage), make_mesh()
        placed = jax.device_put(jax.tree.map(np.copy, self.params))
        trainable, frozen = split_tree(placed, select(structure.paths, stage.trainable, structure.stored))
        step = make_train_step(structure.graphdef, optimizer, Ops(), trainable, frozen, mesh)
        state = [trainable, optimizer.transform.init(trainable)]
        batch = place_batch(batch, mesh)

        def run() -> tuple[float, np.ndarray]:
            seconds, (*state[:], metrics) = timed(lambda: step(*state, frozen, batch))
            return seconds, np.array([float(metrics["loss"])])

        return run, self.twin.job("train", inputs | {"labels": np.where(text, inputs["input_ids"], -100)})


def compare(name: str, ours: Job, theirs: TwinJob, rounds: int) -> dict[str, Any]:
    """Runs both in turn, after first runs whose values must agree and which choose the twin's number of threads."""
    (_, mine), (_, other) = ours(), theirs(1)
    agreement = float(np.mean(mine == other)) if mine.dtype == np.int32 else float(np.abs(mine - other).max())
    ours()
    threads = min((1, os.cpu_count() or 1), key=lambda n: min(theirs(n)[0] for _ in range(2)))
    times = []
    for _ in range(rounds):
        seconds, _ = ours()
        time.sleep(0.05)  # the threads of the other side go to sleep
        times.append((seconds, theirs(threads)[0]))
        time.sleep(0.05)
    jax_s, torch_s = np.median(np.array(times), axis=0)
    ratio = float(np.median([b / a for a, b in times]))
    bar = BARS["tiny decode" if name.startswith("tiny") else name.split()[1]]
    print(f"{name:22s} ours {jax_s * 1e3:8.1f} ms   torch {torch_s * 1e3:8.1f} ms ({threads} threads)   {ratio:5.2f} x (bar {bar})")
    print(f"{'':22s} " + (f"{agreement:.0%} of the ids are the same" if mine.dtype == np.int32 else f"largest difference {agreement:.3g}"))
    return {
        "ratio": ratio,
        "bar": bar,
        "seconds": {"ours": float(jax_s), "torch": float(torch_s)},
        "agreement": agreement,
        "torch_threads": threads,
    }


def main(torch_python: str = sys.executable, rounds: int = 9, only: str = "", out: Path | None = None) -> dict[str, Any]:
    """Args:
    torch_python: a Python with torch, safetensors and numpy.
    rounds: pairs of runs.
    only: run the comparisons whose name holds this.
    out: where the JSON goes.
    """
    results = {}
    for size, config in (("mid", mid_size()), ("tiny", tiny())):
        with tempfile.TemporaryDirectory() as folder:
            side = Side(config, torch_python, Path(folder))
            comparisons: dict[str, Callable[[], tuple[Job, TwinJob]]] = {
                f"{size} decode batch 1": lambda side=side: side.decode(1),
                f"{size} decode batch 8": lambda side=side: side.decode(8),
            }
            if size == "mid":  # training changes the twin's weights: last
                comparisons["mid prefill"] = lambda side=side: side.prefill(512)
                comparisons["mid train"] = lambda side=side: side.train(512, 4)
            for name, make in comparisons.items():
                if only in name:
                    results[name] = compare(name, *make(), rounds)
            side.twin.close()
    model = {name: dataclasses.asdict(config.decoder) for name, config in (("mid", mid_size()), ("tiny", tiny()))}
    machine = {"device": jax.devices()[0].device_kind, "cpus": os.cpu_count(), "machine": platform.machine(), "jax": jax.__version__}
    result = {"results": results, "models": model, "rounds": rounds, **machine}
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    tyro.cli(main)
