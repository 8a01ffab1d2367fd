"""Claim: a run that is killed (-9) again and again ends with the bits of one left alone, and no kill costs more than two save intervals.

    python -m experiments.reliability.kill [--kills 50] [--seconds 450] [--out experiments/results/kill.json]

A tiny model is trained through two stages with a checkpoint every 5 steps, once in peace and once under fire. Of ten kills about six fall
while something is being written (a base, a step checkpoint, a final), two while training and two anywhere from the start of the process
on. `--seconds` stops it early; the same command goes on where it stopped. Exit code 0: every bar is met; 1: one is not; 3: to be
continued. The result has one row per kill: when, what lay half written on disk, where the run went on, steps lost.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tyro

EVERY = 5
ROOT = Path(__file__).resolve().parents[2]
MODES = ("saving",) * 6 + ("training",) * 2 + ("anywhere",) * 2


# ---- the run that is killed ----------------------------------------------------------------------------------------------------------


def steps_of(kills: int) -> dict[str, int]:
    """Steps of the two stages: long enough for so many kills."""
    return {"S1.1": max(20, 6 * kills // 5), "S2": max(40, 4 * kills)}


def child(run_dir: Path, kills: int) -> None:
    """Trains, or goes on training."""
    from experiments.benchmarks.train_step import half_visual_batch
    from monovl_jax.config import tiny
    from monovl_jax.recipes.evip import VISUAL
    from monovl_jax.training.loop import train
    from monovl_jax.training.stages import Recipe, Stage

    config = tiny()

    def stage(name: str, trainable: tuple[str, ...], steps: int) -> Stage:
        return Stage(
            name, trainable, steps=steps, batch_size=2, learning_rate=1e-3, sequence_length=8, tiles_per_row=1, mixture={"noise": 1.0}
        )

    stages = tuple(stage(name, t, n) for (name, n), t in zip(steps_of(kills).items(), (VISUAL, (r".*",)), strict=True))

    def batches(stage: Stage, position: int) -> Iterator[dict[str, Any]]:
        while True:
            yield half_visual_batch(config, stage.batch_size, stage.tiles_per_row, seed=1000 * len(stage.name) + position)
            position += 1

    recipe = Recipe("kill", config, stages, copy_experts_before="S1.1")
    train(recipe, run_dir, batches, checkpoint_every=EVERY, tensorboard=False, progress=False)


def start(run_dir: Path, kills: int, home: Path) -> subprocess.Popen[str]:
    """A process that trains; compiled programs are kept, so that it starts quickly."""
    cache = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(home / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    code = f"from experiments.reliability.kill import child; from pathlib import Path; child(Path({str(run_dir)!r}), {kills})"
    with open(home / "child.log", "a") as log:
        return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **cache}, stderr=log, stdout=log, text=True)


# ---- what is on disk -----------------------------------------------------------------------------------------------------------------


def newer(path: Path, since: float) -> bool:
    try:
        return path.stat().st_mtime >= since
    except FileNotFoundError:
        return False


def half_written(run_dir: Path, since: float) -> list[str]:
    """What has been being written since a wall-clock time: names of temporary folders, relative to `stages`."""
    stages = run_dir / "stages"
    found = [*stages.glob("*/*.orbax-checkpoint-tmp*"), *stages.glob("*/steps/*.orbax-checkpoint-tmp*")]
    return sorted(str(path.relative_to(stages)).replace(".orbax-checkpoint-tmp", "*") for path in found if newer(path, since))


def rows(run_dir: Path, since: float = 0.0) -> int:
    """Steps that the log has; 0 when it was not touched since."""
    log = run_dir / "log.jsonl"
    return log.read_bytes().count(b"\n") if newer(log, since) else 0


def resumes_at(run_dir: Path, steps: dict[str, int]) -> int:
    """Steps of all stages that the checkpoints on disk hold."""
    from monovl_jax.training.store import StageStore

    done = 0
    for name, count in steps.items():
        store = StageStore(run_dir, name)
        done += count if store.has_final() else store.latest() or 0
    return done


# ---- killing -------------------------------------------------------------------------------------------------------------------------


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 120.0) -> None:
    """Returns when the condition is true, the process has ended, or the time is over; looks twice a millisecond."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None and not condition():
        time.sleep(0.0005)


def pause(process: subprocess.Popen[str], seconds: float) -> None:
    wait_for(lambda: False, process, seconds)


def kill_once(run_dir: Path, kills: int, home: Path, number: int) -> dict[str, Any]:
    """Starts the run, kills it at an instant that is drawn with `number` as seed, and says what that did."""
    rng, steps = random.Random(number), steps_of(kills)
    mode, before, began = rng.choice(MODES), resumes_at(run_dir, steps), time.time()
    last = sum(steps.values()) - EVERY
    process = start(run_dir, kills, home)

    def writing() -> bool:
        return bool(half_written(run_dir, began)) or rows(run_dir, began) >= last

    if mode == "anywhere":
        pause(process, rng.uniform(0, 5))
    elif mode == "training":
        wait_for(lambda: rows(run_dir, began) > before, process)
        pause(process, rng.uniform(0, 0.6))
    else:
        for _ in range(rng.randint(0, 2)):  # saves that are let through
            wait_for(writing, process)
            wait_for(lambda: not half_written(run_dir, began), process)
        wait_for(writing, process)
        pause(process, rng.uniform(0, 0.08))
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    logged, kept = rows(run_dir, began), resumes_at(run_dir, steps)
    return {
        "kill": number,
        "mode": mode,
        "killed": alive,
        "seconds": round(time.time() - began, 2),
        "began_at": before,
        "logged": logged,
        "half_written": half_written(run_dir, began),
        "continues_at": kept,
        "lost_steps": max(0, logged - kept),
    }


def compare(straight: Path, run_dir: Path) -> dict[str, Any]:
    """Whether parameters after each stage, and losses of all steps, have the same bits."""
    from monovl_jax.training.checkpoint import load_run, read_recipe
    from monovl_jax.training.metrics import read_log
    from monovl_jax.training.trainable import digests

    stages = [stage.name for stage in read_recipe(straight).stages]
    same = {name: digests(load_run(straight, name)[1]) == digests(load_run(run_dir, name)[1]) for name in stages}
    losses = [[(r["stage"], r["step"], r["loss"].hex()) for r in read_log(run / "log.jsonl")] for run in (straight, run_dir)]
    return {"parameters_identical": same, "losses_identical": losses[0] == losses[1], "steps": len(losses[0])}


def line(row: dict[str, Any]) -> str:
    where = ", ".join(row["half_written"]) or "-"
    return (
        f"{row['kill']:4d}  {row['mode']:9s} {row['seconds']:6.1f} s   {row['began_at']:5d} -> {max(row['logged'], row['began_at']):5d}   "
        f"goes on at {row['continues_at']:5d}   lost {row['lost_steps']:3d}   half written: {where}"
    )


@dataclasses.dataclass
class Settings:
    """kills: how many. seconds: after which it stops early. folder: where the two runs lie. out: the result."""

    kills: int = 50
    seconds: float = 450.0
    folder: Path = Path("runs/kill")
    out: Path = Path("experiments/results/kill.json")


def main(settings: Settings) -> int:
    """Kills until it is enough, lets the run end, compares, writes the result; see the exit codes above."""
    home, kills = settings.folder.absolute(), settings.kills
    home.mkdir(parents=True, exist_ok=True)
    straight, under_fire, table = home / "straight", home / "under_fire", home / "kills.jsonl"
    end = time.monotonic() + settings.seconds
    if not (straight / "stages" / "S2" / "done.json").exists():
        print(f"the run in peace ({sum(steps_of(kills).values())} steps) ...", flush=True)
        if start(straight, kills, home).wait():
            print(f"it failed: see {home / 'child.log'}", file=sys.stderr)
            return 1
    done = [json.loads(text) for text in table.read_text().splitlines()] if table.exists() else []
    while len(done) < kills:
        if time.monotonic() > end:
            print(f"{len(done)} of {kills} kills; the same command goes on", flush=True)
            return 3
        row = kill_once(under_fire, kills, home, len(done))
        if not row["killed"]:
            print(f"the run ended by itself before kill {len(done)}: see {home / 'child.log'}", file=sys.stderr)
            return 1
        done.append(row)
        with open(table, "a") as file:
            file.write(json.dumps(row) + "\n")
        print(line(row), flush=True)
    print("left alone to its end ...", flush=True)
    if start(under_fire, kills, home).wait():
        print(f"it failed: see {home / 'child.log'}", file=sys.stderr)
        return 1
    worst = max(row["lost_steps"] for row in done)
    result = {
        "kills": len(done),
        "while_something_was_half_written": sum(bool(row["half_written"]) for row in done),
        "checkpoint_every": EVERY,
        "most_steps_lost": worst,
        "most_save_intervals_lost": worst / EVERY,
        "steps_lost": sum(row["lost_steps"] for row in done),
        "seconds": round(sum(row["seconds"] for row in done), 1),
        **compare(straight, under_fire),
        "table": done,
    }
    passed = all(result["parameters_identical"].values()) and result["losses_identical"] and worst <= 2 * EVERY and len(done) >= kills
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    settings.out.write_text(json.dumps(result | {"passed": passed}, indent=1) + "\n", encoding="utf-8")
    print({key: value for key, value in result.items() if key != "table"})
    print("PASS" if passed else "FAIL")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings, description=__doc__)))
