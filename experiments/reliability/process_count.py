"""The same devices in one, two and four real processes: the same losses, and every sample read once.

    python -m experiments.reliability.process_count [--out experiments/results/process_count.json]

A tiny model with visual experts is trained for 20 steps on 320 numbered samples, 16 a step, on 4 virtual CPU devices: in 1 process of 4
devices, 2 of 2 and 4 of 1, which talk over gloo. In the last row the run dies twice and goes on with another number of processes each time.
Each process writes down the numbers of the samples in every batch it makes. Bars: losses within 1e-5 of those of one process, relatively;
the samples of the steps that count are 0 to 319, each once, in the order of one process.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tyro

DEVICES, STEPS, SAMPLES, SAVE_EVERY = 4, 20, 320, 4
LENGTH, CONTEXT, FIRST_DIGIT = 20, 3, 100
KILLED = 9
QUICK = "--xla_backend_optimization_level=0"
"""Most of the time here is compiling."""


# ---- one process -------------------------------------------------------------------------------------------------------------------


class Numbered:
    """Samples of one length whose two first tokens are their number; every other one has a picture. A `data.sources.Source`."""

    def __len__(self) -> int:
        return SAMPLES

    def length(self, index: int) -> tuple[int, int]:
        return LENGTH, (index + 1) % 2

    def __getitem__(self, index: int) -> Any:
        from monovl_jax.data.packing import Example

        rng = np.random.default_rng(index)
        ids = rng.integers(10, FIRST_DIGIT, LENGTH).astype(np.int32)
        ids[:2] = FIRST_DIGIT + index // 100, FIRST_DIGIT + index % 100
        tiles = rng.integers(0, 256, (self.length(index)[1], 32, 32, 3)).astype(np.uint8)
        ids[2 : 2 + 4 * len(tiles)] = CONTEXT
        return Example(ids, (np.arange(LENGTH) >= 8).astype(np.float32), tiles)


def numbers(batch: dict[str, np.ndarray]) -> list[int]:
    """The samples of a batch in order: where a position is 0, one begins."""
    begins = (batch["positions"] == 0) & (batch["segment_ids"] > 0)
    rows, columns = np.nonzero(begins)
    tokens = batch["tokens"]
    return ((tokens[rows, columns] - FIRST_DIGIT) * 100 + tokens[rows, columns + 1] - FIRST_DIGIT).tolist()


def worker(run: Path, sizes: tuple[int, int, int], part: int, die_at: int) -> None:
    """Trains on this process's devices; ends without a word when asked for batch `die_at`. part: number of the piece of the run."""
    from monovl_jax.parallel import hosts

    hosts.start()
    import jax

    from monovl_jax.config import tiny
    from monovl_jax.parallel.mesh import make_mesh, row_share
    from monovl_jax.recipes.feed import Feed
    from monovl_jax.training.loop import train
    from monovl_jax.training.stages import Recipe, Stage

    trained = (r"^vision/", r"^projector/", r"^decoder/blocks/mlp/visual/", r"^decoder/blocks/attention/")
    stage = Stage(
        "S1.3", trained, STEPS, SAMPLES // STEPS // 2, 1e-3, 2 * LENGTH, 2, {"numbered": 1.0}, accumulation=2, warmup_steps=2, eps=1e-6
    )
    mesh = make_mesh(*sizes)
    share = row_share(mesh)
    feed = Feed(tiny().vision, CONTEXT, lambda *_: [Numbered()], window=64, share=share)  # type: ignore[arg-type]

    def batches(stage: Stage, position: int) -> Iterator[tuple[dict[str, np.ndarray], ...]]:
        with open(run.parent / f"{run.name}.samples.{part}.{jax.process_index()}", "w") as file:
            for number, batch in enumerate(feed(stage, position), position):
                if number == die_at:
                    os._exit(KILLED)
                file.write(json.dumps({"step": number + 1, "share": share[0], "samples": numbers(batch[0])}) + "\n")
                file.flush()
                yield batch

    recipe = Recipe("numbered", dataclasses.replace(tiny(), max_tiles=1), (stage,), copy_experts_before=stage.name)
    train(recipe, run, batches, mesh=mesh, checkpoint_every=SAVE_EVERY, progress=False, tensorboard=False)


# ---- all processes of a run --------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(run: Path, processes: int, sizes: tuple[int, int, int], part: int = 0, die_at: int = -1) -> None:
    """One piece of a run, to its end or to `die_at`. Raises RuntimeError with what a process said when it ends otherwise."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} {QUICK} --xla_force_host_platform_device_count={DEVICES // processes}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    if processes > 1:
        environment |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(processes)}
    command = [sys.executable, "-m", "experiments.reliability.process_count", "worker", str(run), *map(str, sizes), str(part), str(die_at)]
    logs = [run.parent / f"{run.name}.output.{part}.{number}" for number in range(processes)]
    children = []
    for number, log in enumerate(logs):
        with open(log, "w") as output:
            own = {**environment, "JAX_PROCESS_ID": str(number)}
            children.append(subprocess.Popen(command, env=own, stdout=output, stderr=subprocess.STDOUT))
    codes = [child.wait() for child in children]
    if (any(codes) and die_at < 0) or (die_at >= 0 and KILLED not in codes):
        said = "\n".join(f"-- process {n}, exit code {c}\n{log.read_text()[-3000:]}" for n, (c, log) in enumerate(zip(codes, logs)))
        raise RuntimeError(f"{run.name}, part {part} of {processes} processes ended with {codes}\n{said}")


def samples_read(run: Path, processes: list[int]) -> list[list[int]]:
    """Per step the samples that its update saw, in the order of the shares; a step that was made again counts as made last."""
    steps: dict[int, dict[int, list[int]]] = {}
    for part, count in enumerate(processes):
        here: dict[int, dict[int, list[int]]] = {}
        for process in range(count):
            for line in (run.parent / f"{run.name}.samples.{part}.{process}").read_text().splitlines():
                row = json.loads(line)
                known = here.setdefault(row["step"], {}).setdefault(row["share"], row["samples"])
                assert known == row["samples"], f"{run.name}, step {row['step']}: two processes of share {row['share']} read other samples"
        steps |= here
    return [[sample for share in sorted(steps[step]) for sample in steps[step][share]] for step in range(1, STEPS + 1)]


def losses(run: Path) -> np.ndarray:
    from monovl_jax.training.metrics import read_log

    rows = read_log(run / "log.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1)), f"{run.name}: the log has the steps {[row['step'] for row in rows]}"
    return np.array([row["loss"] for row in rows])


Pieces = list[tuple[int, int]]
"""(processes, batch at which they die or -1) of each piece of a run."""

RUNS: list[tuple[str, tuple[int, int, int], Pieces]] = [
    ("1 process", (2, 2, 1), [(1, -1)]),
    ("2 processes", (2, 2, 1), [(2, -1)]),
    ("4 processes", (2, 2, 1), [(4, -1)]),
    ("4 processes, tensor 2", (1, 2, 2), [(4, -1)]),
    ("4, then 1, then 2 processes", (2, 2, 1), [(4, 11), (1, 17), (2, -1)]),
]


def compare(folder: Path, runs: list[tuple[str, tuple[int, int, int], Pieces]]) -> list[dict[str, Any]]:
    """Runs them all; each against the first."""
    rows: list[dict[str, Any]] = []
    first_losses, first_samples = np.zeros(0), []
    for number, (name, sizes, pieces) in enumerate(runs):
        run, began = folder / f"run{number}", time.time()
        for part, (processes, die_at) in enumerate(pieces):
            start(run, processes, sizes, part, die_at)
        got, read = losses(run), samples_read(run, [processes for processes, _ in pieces])
        if number == 0:
            first_losses, first_samples = got, read
        every = sorted(sample for step in read for sample in step)
        rows.append(
            {
                "run": name,
                "mesh": sizes,
                "loss_first": float(got[0]),
                "loss_last": float(got[-1]),
                "loss_difference": float(np.max(np.abs(got / first_losses - 1))),
                "samples": len(every),
                "each_once": every == list(range(SAMPLES)),
                "same_order": read == first_samples,
                "seconds": time.time() - began,
            }
        )
        print(
            f"{name:28s} mesh {sizes}  loss {got[0]:.5f} -> {got[-1]:.5f}  largest relative difference {rows[-1]['loss_difference']:.1e}  "
            f"{len(every)} samples, each once: {rows[-1]['each_once']}, same order: {rows[-1]['same_order']}  {rows[-1]['seconds']:.0f} s",
            flush=True,
        )
    return rows


def main(out: Path | None = None) -> list[dict[str, Any]]:
    """Runs the table.

    Args:
        out: a JSON file for the result.
    """
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(Path(folder), RUNS)
    if out is not None:
        import jax

        result = {"devices": DEVICES, "steps": STEPS, "runs": rows, "jax": jax.__version__, "python": platform.python_version()}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return rows


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        place, *given = sys.argv[2:]
        data, fsdp, tensor, piece, death = map(int, given)
        worker(Path(place), (data, fsdp, tensor), piece, death)
    else:
        tyro.cli(main)
