"""The input pipeline: what it costs beside bare Pillow, what packing wastes, how long a training step waits for it.

    python -m experiments.benchmarks.data [--rounds 7] [--out experiments/results/data.json]

tiles     Tiles per second of one core (CPU seconds of this process): from prepared shards, and from JSONL, through shuffle, packing and
          batch, against Pillow alone on the same files: open, convert to RGB, resize to the grid, resize to the thumbnail. In turn within
          one process, so that their ratio means something on a busy machine. Bar: 0.8.
packing   Share of slots without a token, and without a tile, planned in the pipeline's windows over 20 windows of the lengths below.
          Bars: 5% of the token slots, 15% of the tile slots.
resume    Seconds until the first batch of a new pipeline that goes on with the state of another, of 830 million samples with the lengths
          below: after 100 windows (the same batch, to the bit, as without interruption), and at window 400,000, whose first row is an
          estimate (what it costs does not depend on it). Bar: 10 s. And milliseconds to plan a window.
wait      Share of the time that the demo's own recipe, all stages, waits for batches; the first step of a stage, which compiles, is left
          out. Bar: 2%.

Lengths like those of LLaVA-v1.5's mixture, a formula of ours (its files are not here): with probability 0.06 a sample is text alone, of
round(exp(N(ln 700, 0.9))) tokens, 30 to 2,000 of them; else it has one picture, its size drawn from SIZES, and
round(exp(N(ln 190, 0.7))) tokens of text, 50 to 1,200. Generator: numpy's default_rng(0), per sample: u, kind of picture, z, in arrays.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import tyro
from PIL import Image

from monovl_jax.data.jsonl import JsonlSource
from monovl_jax.data.packing import Example, PackSpec, plan_packs
from monovl_jax.data.pipeline import Batch, Part, Pipeline
from monovl_jax.data.prepare import TextSettings, find_sets, prepare
from monovl_jax.data.shards import PreparedSource
from monovl_jax.data.sources import Encoding, Source
from monovl_jax.data.tiling import TilingConfig, choose_grid, count_tiles
from monovl_jax.demo.text import build_tokenizer

SIZES = {
    (640, 480): 0.44,
    (480, 640): 0.12,
    (640, 427): 0.15,
    (427, 640): 0.05,
    (500, 375): 0.09,
    (350, 500): 0.12,
    (1024, 768): 0.03,
}
"""(width, height) of the pictures of such mixtures (COCO, Visual Genome, book covers, scene text) and their shares."""

TILING = TilingConfig(448, 1, 6, True)
V = 256


def picture(number: int, size: tuple[int, int]) -> bytes:
    """A JPEG of quality 90 with soft shapes and some grain, so that decoding costs about what a photograph costs."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    grain = rng.normal(0, 6, (size[1], size[0], 1))
    stream = io.BytesIO()
    Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def bare(paths: list[Path]) -> int:
    """Opens, decodes and resizes as the tiles need it, and nothing else; returns how many tiles that is."""
    side, total = TILING.tile_size, 0
    for path in paths:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        cols, rows = choose_grid(*image.size, TILING.min_tiles, TILING.max_tiles, side)
        image.resize((cols * side, rows * side), Image.Resampling.BICUBIC)
        total += cols * rows
        if cols * rows > 1:
            image.resize((side, side), Image.Resampling.BICUBIC)
            total += 1
    return total


def tiles_per_second(rounds: int, pictures: int = 40) -> dict[str, Any]:
    """Each round: bare Pillow, prepared shards, JSONL, in turn. Ratios are medians over the rounds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kinds = np.random.default_rng(0).choice(len(SIZES), pictures, p=list(SIZES.values()))
        paths = [folder / f"{number}.jpg" for number in range(pictures)]
        turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A picture. " * 12}]
        with open(folder / "data.jsonl", "w", encoding="utf-8") as stream:
            for number, path in enumerate(paths):
                path.write_bytes(picture(number, list(SIZES)[kinds[number]]))
                stream.write(json.dumps({"image": path.name, "conversations": turns}) + "\n")
        build_tokenizer(folder)
        settings = TextSettings(folder, "compact", TILING, V)
        prepare(find_sets(folder / "data.jsonl"), folder / "prepared", settings, say=lambda text: None)
        base = settings.encoding()
        encoding = dataclasses.replace(base, max_length=8_192, max_tiles=28)
        sources = {
            "prepared": PreparedSource(folder / "prepared" / "data", encoding),
            "jsonl": JsonlSource(folder / "data.jsonl", encoding),
        }
        work: dict[str, Callable[[], int]] = {"pillow": lambda: bare(paths)}
        work |= {name: epoch(source, encoding) for name, source in sources.items()}
        rates = {name: [] for name in work}
        for _ in range(rounds + 1):
            for name, once in work.items():
                began = time.process_time()
                tiles = once()
                rates[name].append(tiles / (time.process_time() - began))
    measured = {name: np.asarray(values[1:]) for name, values in rates.items()}
    return {
        "tiles_per_second_per_core": {name: float(np.median(values)) for name, values in measured.items()},
        "ratio_to_pillow": {name: float(np.median(measured[name] / measured["pillow"])) for name in sources},
        "bar": 0.8,
        "pictures": pictures,
        "rounds": rounds,
    }


def epoch(source: Source, encoding: Encoding) -> Callable[[], int]:
    """A function that makes batches for about one pass over the source and returns how many tiles they hold."""
    spec = PackSpec(8_192, 28, V, TILING.tile_size, encoding.tokenizer.id_of("<IMG_CONTEXT>"))
    pipeline = Pipeline([source], spec, 1, 0, window=len(source), threads=0)

    def once() -> int:
        batches = pipeline.batches()
        while batches.stats.samples < len(source):
            next(batches)
        return batches.stats.tiles

    return once


def llava_like(count: int, tiling: TilingConfig, seed: int = 0) -> np.ndarray:
    """int64[count, 2] of (tokens, tiles), by the formula at the top of this file."""
    rng = np.random.default_rng(seed)
    text_only, kind = rng.random(count) < 0.06, rng.choice(len(SIZES), count, p=list(SIZES.values()))
    z = rng.standard_normal(count)
    tiles_of = np.asarray([count_tiles(*size, tiling) for size in SIZES])
    tiles = np.where(text_only, 0, tiles_of[kind])
    alone = np.clip(np.round(np.exp(np.log(700) + 0.9 * z)), 30, 2_000)
    beside = np.clip(np.round(np.exp(np.log(190) + 0.7 * z)), 50, 1_200)
    return np.stack([np.where(text_only, alone, beside) + V * tiles, tiles], axis=1).astype(np.int64)


ROWS = {
    "rows of sft": (2_048, 7, 6),
    "rows of evip's S2": (8_192, 25, 12),
    "long rows, shaped like the data": (16_384, 56, 6),
}
"""(tokens of a row, tiles of a row, most tiles of a picture)."""


def packing_waste(windows: int = 20, window: int = 2_048) -> dict[str, Any]:
    """Shares of slots that stay empty, for several shapes of a row. What is longer than a row is cut to it, as the sources do."""
    found = {}
    for name, (tokens, tiles, most) in ROWS.items():
        spec = PackSpec(tokens, tiles, V, 448, 1)
        lengths = llava_like(windows * window, dataclasses.replace(TILING, max_tiles=min(most, tiles - 1)))
        lengths[:, 0] = np.minimum(lengths[:, 0], tokens)
        rows = sum(len(plan_packs(part, spec)) for part in np.split(lengths, windows))
        used = lengths.sum(0)
        waste = 1 - used / (rows * np.asarray([tokens, tiles]))
        found[name] = {"tokens": tokens, "tiles": tiles, "token_waste": float(waste[0]), "tile_waste": float(waste[1]), "rows": rows}
    return {"shapes": found, "samples": windows * window, "bars": {"token_waste": 0.05, "tile_waste": 0.15}}


class Lengths:
    """A source of 830 million samples whose lengths are those of 2^16 samples over and over; an example is its number alone."""

    def __init__(self) -> None:
        self._table = llava_like(1 << 16, TILING)
        self._table[:, 0] = np.minimum(self._table[:, 0], 2_048)

    def __len__(self) -> int:
        return 830_000_000

    def length(self, index: int) -> tuple[int, int]:
        tokens, tiles = self._table[index % len(self._table)]
        return int(tokens), int(tiles)

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        return self._table[np.asarray(indices) % len(self._table)]

    def __getitem__(self, index: int) -> Example:
        return Example(np.asarray([index & 0x7FFFFFFF, 1], np.int32), np.ones(2, np.float32), np.zeros((0, 1, 1, 3), np.uint8))


def resume(windows: int = 100, far: int = 400_000, window: int = 2_048) -> dict[str, Any]:
    """Seconds to go on, from a state as a checkpoint keeps it; raises RuntimeError if a batch differs."""
    shares = (0.7, 0.2, 0.1)

    def fresh() -> Pipeline:
        parts = [Part(Lengths(), share, str(number)) for number, share in enumerate(shares)]
        return Pipeline(parts, PackSpec(2_048, 7, V, 1, -1), 64, 0, window=window, threads=0)

    def timed(number: int) -> tuple[Batch, float]:
        began = time.perf_counter()
        again = fresh()
        if not again.restore(json.loads(json.dumps(state))):
            raise RuntimeError("the state was not taken")
        batch = again.batch(number)
        return batch, time.perf_counter() - began

    straight = fresh()
    number, began = 0, time.perf_counter()
    while (state := straight.state(number))["window"] < windows:
        number += 64
    planning = (time.perf_counter() - began) / windows
    batch, near = timed(number)
    expected = straight.batch(number)
    if any(not np.array_equal(batch[name], expected[name]) for name in expected):
        raise RuntimeError("the batch is not that of the pipeline that was not interrupted")
    rows = state["row"] * far // state["window"]
    drawn = [round(far * window * share) for share in shares[1:]]
    state |= {"window": far, "row": rows, "drawn": [far * window - sum(drawn), *drawn]}
    _, seconds = timed(-(-rows // 64))
    return {"window_ms": planning * 1e3, "seconds": {str(windows): near, str(far): seconds}, "bar": 10.0}


def demo_wait(steps: int) -> dict[str, Any]:
    """Trains `steps` steps of every stage of the demo, without evaluation, and reads the log."""
    from monovl_jax.demo.run import batches, initial_parameters
    from monovl_jax.demo.run import prepare as prepare_demo
    from monovl_jax.model import Ops
    from monovl_jax.training.loop import train
    from monovl_jax.training.metrics import read_log

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        world, layout, recipe = prepare_demo(folder, False, 0)
        stages = tuple(dataclasses.replace(stage, steps=steps, warmup_steps=min(steps, stage.warmup_steps)) for stage in recipe.stages)
        recipe = dataclasses.replace(recipe, stages=stages)
        train(recipe, folder, batches(world, layout, recipe), initial=lambda: initial_parameters(recipe), ops=Ops(), checkpoint_every=steps)
        log = [row for row in read_log(folder / "log.jsonl") if "data_wait" in row]
    waited, spent, before = {}, {}, {}
    for row in log:
        stage = row["stage"]
        if stage in before:
            span = row["seconds"] - before[stage]
            waited[stage] = waited.get(stage, 0.0) + span * row["data_wait"]
            spent[stage] = spent.get(stage, 0.0) + span
        before[stage] = row["seconds"]
    share = {stage: waited[stage] / spent[stage] for stage in spent}
    return {"share": sum(waited.values()) / sum(spent.values()), "by_stage": share, "steps_a_stage": steps, "bar": 0.02}


def main(rounds: int = 7, demo_steps: int = 12, out: Path | None = None) -> dict[str, Any]:
    """All of them.

    Args:
        rounds: of the comparison with Pillow.
        demo_steps: of every stage of the demo; 0 leaves it out.
        out: JSON file.
    """
    result: dict[str, Any] = {"tiles": tiles_per_second(rounds), "packing": packing_waste(), "resume": resume()}
    for name, ratio in result["tiles"]["ratio_to_pillow"].items():
        print(f"{name:9s} {result['tiles']['tiles_per_second_per_core'][name]:7.1f} tiles/s a core   {ratio:.3f} of Pillow (bar 0.8)")
    for name, row in result["packing"]["shapes"].items():
        print(f"{name:34s} {row['tokens']} tokens, {row['tiles']} tiles: empty {row['token_waste']:.1%} and {row['tile_waste']:.1%}")
    told = ", ".join(f"{seconds:.2f} s at window {int(at):,}" for at, seconds in result["resume"]["seconds"].items())
    print(f"going on takes {told} (bar 10 s); a window is planned in {result['resume']['window_ms']:.0f} ms")
    if demo_steps:
        result["demo_wait"] = demo_wait(demo_steps)
        print(f"the demo waits {result['demo_wait']['share']:.2%} of its time for data (bar 2%)")
    result |= {"pillow": PIL.__version__, "cpus": os.cpu_count(), "machine": platform.machine()}
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    tyro.cli(main)
