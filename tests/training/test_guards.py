"""What watches a run: skipped updates, spikes, stalls, SIGTERM, what the logs say, profiles."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from monovl_jax.config import tiny
from monovl_jax.training import devices, guards
from monovl_jax.training.checkpoint import load_run, load_step
from monovl_jax.training.flops import step_flops
from monovl_jax.training.guards import SpikeDetector, Watchdog
from monovl_jax.training.loop import PreemptedError, TrainingError, train
from monovl_jax.training.metrics import read_log
from monovl_jax.training.profiling import parse_profile
from monovl_jax.training.stages import RecipeError
from monovl_jax.training.step import attended_pairs
from monovl_jax.training.store import RunError, StageStore
from monovl_jax.training.trainable import digests, flatten, model_structure
from tests.conftest import ROOT
from tests.training.test_loop import QUIET, SMALL, losses
from tests.training.worlds import make_batches

ONE = dataclasses.replace(SMALL, stages=SMALL.stages[:1], copy_experts_before=None)
"""The text stage alone: 3 steps."""


def spoiled(*bad: int) -> Any:
    """`make_batches` with loss weights that are infinite in the batches named."""

    def make(stage: Any, position: int) -> Iterator[Any]:
        for number, parts in enumerate(make_batches(stage, position), position):
            if number in bad:
                parts[0]["loss_weights"][:] = np.inf
            yield parts

    return make


def without(number: int) -> Any:
    """`make_batches` that leaves a batch out."""

    def make(stage: Any, position: int) -> Iterator[Any]:
        yield from (parts for n, parts in enumerate(make_batches(stage, position), position) if n != number)

    return make


def events(run: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (run / "events.jsonl").read_text().splitlines()]


# --- updates that are not finite --------------------------------------------------------------------------------------------------------


def test_a_spoiled_batch_changes_nothing(tmp_path: Path) -> None:
    """The end, to the bit, is that of a run which never saw it: parameters, moments and schedule stood still."""
    records = train(ONE, tmp_path / "spoiled", spoiled(1), **QUIET)
    train(ONE, tmp_path / "without", without(1), **QUIET, milestone_every=2)
    assert digests(load_run(tmp_path / "spoiled")[1]) == digests(load_step(tmp_path / "without", "S0", 2)[1])
    rows = read_log(tmp_path / "spoiled/log.jsonl")
    assert [(row["loss"] is None, row["skipped"]) for row in rows] == [(False, 0), (True, 1), (False, 0)]
    assert rows[2]["lr"] == rows[1]["lr"] != rows[0]["lr"]
    assert records["S0"]["skipped"] == 1 and records["S0"]["loss"] == rows[2]["loss"]
    (event,) = events(tmp_path / "spoiled")
    assert re.match(r"stage 'S0', step 2: loss (nan|inf), gradients .*text_expert.*left out \(1 in a row, 1 in all\)", event)


def test_too_many_in_a_row_stop_the_run_and_leave_the_batch(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(TrainingError, match=r"stage 'S0', step 3: .*2 updates in a row; the last batch is in .*step_3.npz"):
        train(ONE, run, spoiled(1, 2), **QUIET, max_skipped=2)
    with np.load(run / "stages/S0/not_finite/step_3.npz", allow_pickle=False) as saved:
        original = next(make_batches(ONE.stages[0], 2))[0]
        assert {f"0.{key}" for key in original} == set(saved)
        np.testing.assert_array_equal(saved["0.tokens"], original["tokens"])
        assert np.isinf(saved["0.loss_weights"]).all()
    # The count in a row survives a restart: the checkpoint of step 2 remembers that its update was left out.
    with pytest.raises(TrainingError, match="2 updates in a row"):
        train(ONE, run, spoiled(1, 2), **QUIET, max_skipped=2)


# --- spikes -----------------------------------------------------------------------------------------------------------------------------


def test_spikes_are_found_by_series() -> None:
    detect, rng = SpikeDetector(), np.random.default_rng(0)
    for _ in range(60):
        assert detect({"loss": 2 + 0.05 * rng.standard_normal(), "grad_norm_visual_expert": 1 + 0.3 * rng.random()}) == {}
    assert detect({"loss": 2.1, "grad_norm_visual_expert": 9.0}).keys() == {"grad_norm_visual_expert"}
    assert detect({"loss": 4.0, "grad_norm_visual_expert": 1.2})["loss"] == pytest.approx(2.0, rel=0.05)
    assert detect({"loss": float("nan")}) == {} and detect({"loss": 2.0}) == {}
    assert SpikeDetector()({"loss": 1e9}) == {}, "nothing to compare with"


# --- stalls -----------------------------------------------------------------------------------------------------------------------------


def wait_until(condition: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_stalled_data_worker_is_named(tmp_path: Path) -> None:
    said, release = [], threading.Event()

    def reads_a_slow_disk() -> None:
        while not release.is_set():
            time.sleep(0.01)

    worker = threading.Thread(target=reads_a_slow_disk, name="picture-reader-3")
    worker.start()
    try:
        with Watchdog(tmp_path, said.append, limit=0.2) as watchdog:
            with watchdog.doing("data", "S1.1", 118):
                wait_until(lambda: said)
                time.sleep(0.3)
            with watchdog.doing("step", "S1.1", 118):
                time.sleep(0.05)
    finally:
        release.set()
        worker.join()
    assert len(said) == 1, "once for each wait, and only for long ones"
    assert re.match(r"stalled: process 0 on \S+, stage 'S1.1', step 118: data for \d+ s", said[0])
    assert "picture-reader-3 in reads_a_slow_disk (" in said[0] and "test_guards.py:" in said[0]
    assert not (tmp_path / "heartbeats").exists()


def test_a_stalled_host_is_named(tmp_path: Path) -> None:
    """Process 0 waits for the step; 1 waits too, 2 for its data, 3 has not been heard of for long, 4 never."""
    folder = tmp_path / "heartbeats"
    folder.mkdir()
    now = time.time()
    states = [(1, "step", now), (2, "data", now), (3, "step", now - 500)]
    for index, doing, when in states:
        state = {"process": index, "host": f"tpu-{index}", "stage": "S2", "step": 40, "doing": doing, "waited": 61.0, "time": when}
        (folder / f"{index}.json").write_text(json.dumps(state))
    said: list[str] = []
    with Watchdog(tmp_path, said.append, limit=0.2, index=0, count=5) as watchdog, watchdog.doing("step", "S2", 41):
        wait_until(lambda: said)
    assert "process 1" not in said[0] and "process 2 on tpu-2 (data, step 40, for 61 s)" in said[0]
    assert "process 3 on tpu-3 (silent for 5" in said[0] and "process 4 (never heard of)" in said[0]
    assert json.loads((folder / "0.json").read_text())["step"] == 41


def test_the_loop_reports_a_stall(tmp_path: Path) -> None:
    def slow(stage: Any, position: int) -> Iterator[Any]:
        for number, parts in enumerate(make_batches(stage, position), position):
            if number == 2:
                wait_until(lambda: read_log(tmp_path / "run/log.jsonl"), 100)  # not while the first step compiles
                time.sleep(1.2)
            yield parts

    train(ONE, tmp_path / "run", slow, **QUIET, stall_seconds=0.5)
    assert any(
        re.match(r"stalled: process 0 on \S+, stage 'S0', step 3: data for .*monovl-prefetch in slow", e) for e in events(tmp_path / "run")
    )


# --- SIGTERM ----------------------------------------------------------------------------------------------------------------------------


def terminating(at: int) -> Any:
    """`make_batches` that sends this process SIGTERM when it makes batch `at` of S1.1."""

    def make(stage: Any, position: int) -> Iterator[Any]:
        for number, parts in enumerate(make_batches(stage, position), position):
            if stage.name == "S1.1" and number == at:
                os.kill(os.getpid(), signal.SIGTERM)
            yield parts

    return make


def test_sigterm_saves_and_the_run_goes_on(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    train(SMALL, tmp_path / "straight", make_batches, **QUIET)
    run, seen = tmp_path / "run", []
    with pytest.raises(PreemptedError, match=r"stopped by SIGTERM; stage 'S1.1' is saved at step \d") as stopped:
        train(SMALL, run, terminating(4), **{**QUIET, "checkpoint_every": 100})
    saved = int(str(stopped.value).split("step ")[1][0])
    assert signal.getsignal(signal.SIGTERM) == before and StageStore(run, "S1.1").all_steps() == [saved]

    def evaluate(name: str, graphdef: Any, parameters: Any) -> None:
        seen.append(name)
        if len(seen) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    with pytest.raises(PreemptedError, match="while nothing had to be saved"):
        train(SMALL, run, make_batches, **QUIET, evaluate=evaluate)
    train(SMALL, run, make_batches, **QUIET, evaluate=evaluate)
    assert seen == ["S1.1", "S1.1"]
    assert losses(run) == losses(tmp_path / "straight")
    assert digests(load_run(run)[1]) == digests(load_run(tmp_path / "straight")[1])


# --- milestones, evaluation in the middle, profile --------------------------------------------------------------------------------------


def test_milestones_evaluation_and_profile(tmp_path: Path) -> None:
    run, seen = tmp_path / "run", []

    def evaluate(name: str, graphdef: Any, parameters: Any) -> dict[str, float]:
        seen.append((name, digests(parameters)))
        return {"score": float(len(seen))}

    options: dict[str, Any] = {**QUIET, "checkpoint_every": 1, "keep": 1, "milestone_every": 2}
    train(ONE, run, make_batches, **options, evaluate=evaluate, evaluate_every=2, profile=(2, 1))
    rows = read_log(run / "evaluations.jsonl")
    assert [(row["stage"], row["step"], row["result"]) for row in rows] == [("S0", 2, {"score": 1.0})] and len(seen) == 2
    # The milestone outlives the end of the stage, with its base, and is what the evaluation saw.
    assert StageStore(run, "S0").all_steps() == [2]
    config, parameters = load_step(run, "S0", 2)
    assert config == tiny() and digests(parameters) == seen[0][1] != seen[1][1]
    with pytest.raises(RunError, match=r"stage 'S0' has no checkpoint of step 3; it has: 2"):
        load_step(run, "S0", 3)
    assert list((run / "profile").rglob("*.xplane.pb")) and "tracing steps 2 to 2" in events(run)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"milestone_every": 3}, "milestone_every is 3; it must be a multiple of checkpoint_every, 2"),
        ({"evaluate_every": 2}, "there is nothing to call; give evaluate"),
        ({"max_skipped": 0}, "max_skipped is 0"),
        ({"evaluate_every": 0}, "evaluate_every is 0"),
    ],
)
def test_bad_intervals(tmp_path: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        train(ONE, tmp_path / "run", make_batches, **QUIET, **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["3", "0:2", "2:0", "a:b", "2:3:4", ":", "-1:2"])
def test_bad_profile(text: str) -> None:
    assert parse_profile("20:3") == (20, 3)
    with pytest.raises(ValueError, match="START:STEPS"):
        parse_profile(text)


# --- what the log says ------------------------------------------------------------------------------------------------------------------


def test_a_row_says_how_full_and_how_fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 20 slots with 18 tokens, one tile slot, which is full; a device with a made-up peak and memory."""
    recipe = dataclasses.replace(SMALL, stages=(dataclasses.replace(SMALL.stages[1], steps=3),))
    monkeypatch.setitem(devices.PEAK_FLOPS, "cpu", 1e12)
    monkeypatch.setattr("monovl_jax.training.accounting.bytes_in_use", lambda: 3_000_000_000)
    train(recipe, tmp_path / "run", make_batches, **QUIET)
    row = read_log(tmp_path / "run/log.jsonl")[-1]
    visual = tiny().vision.tokens_per_tile
    assert (row["tokens"], row["visual_tokens"]) == (72, 4 * visual)
    assert row["token_fill"] == 0.9 and row["tile_fill"] == 1.0 and row["hbm_gb"] == 3.0
    # 18 tokens a row in segments of f and 18 - f, see `worlds.image_rows`.
    first = visual + (20 - visual) // 2
    pairs = 4 * (first * (first + 1) + (18 - first) * (19 - first)) / 2
    counts = {"tokens": 72, "visual_tokens": 4 * visual, "tile_tokens": 4 * visual, "supervised": row["supervised"], "pairs": pairs}
    flops = step_flops(tiny(), recipe.trainable_paths(recipe.stages[0])).step(counts, visual)
    assert row["mfu"] == pytest.approx(row["tflops"]) and row["tflops"] == pytest.approx(flops * row["tokens_per_second"] / 72 / 1e12)
    assert set(row["grad_norms"]) == {"vision", "visual_expert"}
    assert row["grad_norm"] == pytest.approx(sum(x**2 for x in row["grad_norms"].values()) ** 0.5, rel=1e-5)
    assert 0 < row["goodput"] < 1 and row["skipped"] == 0 and "spikes" not in row


def test_attended_pairs() -> None:
    segments = jnp.asarray([[1, 1, 1, 2, 2, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    assert float(attended_pairs(segments)) == 3 * 4 / 2 + 2 * 3 / 2 + 6 * 7 / 2
    assert float(attended_pairs(jnp.stack([segments, segments]))) == 2 * 30


def test_flops_of_full_and_of_delta_tuning() -> None:
    """Trained whole, every matrix costs 6 per token; frozen text experts cost 4; a forward pass alone 2."""
    config = tiny()
    shapes = {path: leaf.shape for path, leaf in flatten(model_structure(config).shapes).items()}

    def matrices(expert: str, part: str) -> int:
        return sum(
            int(np.prod(s)) for p, s in shapes.items() if p.startswith(f"decoder/blocks/{part}/{expert}/") and not p.endswith("bias")
        )

    attention, text, visual = matrices("text", "attention"), matrices("text", "mlp"), matrices("visual", "mlp")
    everything = step_flops(config, frozenset(shapes))
    assert everything.text == 6 * (attention + text) and everything.visual == 6 * (attention + visual)
    assert everything.supervised == 6 * config.decoder.hidden_size * config.decoder.vocab_size
    assert everything.pair == 12 * config.decoder.num_layers * config.decoder.hidden_size
    delta = step_flops(config, SMALL.trainable_paths(SMALL.stages[1]))
    assert delta.text == 4 * (attention + text) and delta.visual == 4 * attention + 6 * visual
    assert delta.supervised == 4 * config.decoder.hidden_size * config.decoder.vocab_size
    patches, c, d = config.vision.grid**2, *shapes["projector/kernel1"]
    kernel = int(np.prod(shapes["vision/kernel"]))
    assert delta.tile == 4 * kernel * patches + config.vision.tokens_per_tile * 6 * (c * d + d * d)
    forward = step_flops(config, frozenset())
    assert forward.text == 2 * (attention + text) and forward.pair == everything.pair / 3
    head = step_flops(config, frozenset({"decoder/head"}))
    assert head.text == forward.text and head.pair == forward.pair and head.supervised == 2 * forward.supervised


# --- devices ----------------------------------------------------------------------------------------------------------------------------


def test_peaks_by_the_longest_name() -> None:
    assert (
        devices.peak_flops("TPU v5 lite") == 197e12 and devices.peak_flops("TPU v5") == 459e12 and devices.peak_flops("TPU v5p") == 459e12
    )
    assert devices.peak_flops("NVIDIA H100 80GB HBM3") == 989e12 and devices.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert devices.peak_flops("NVIDIA A100-SXM4-80GB") == 312e12 and devices.peak_flops("NVIDIA L40S") == 362e12
    assert devices.peak_flops("TPU7x") == 1153.5e12 and devices.compiler_options("TPU7x") == devices.compiler_options("TPU v6 lite")
    assert devices.peak_flops("NVIDIA L40") is None  # not an L4
    assert devices.peak_flops("cpu") is None and devices.bytes_in_use() is None


def test_xla_options_can_be_seen_and_overridden() -> None:
    name = "xla_tpu_enable_latency_hiding_scheduler"
    table = devices.compiler_options("TPU v5 lite")
    assert table[name] is True and devices.compiler_options("cpu") == {}
    assert devices.compiler_options("TPU v4", [f"{name}=false"])[name] is False
    assert name not in devices.compiler_options("TPU v4", [f"{name}="])
    assert devices.compiler_options("cpu", ["xla_a=3", "xla_b=0.5", "xla_c=text"]) == {"xla_a": 3, "xla_b": 0.5, "xla_c": "text"}
    for wrong in ("latency=1", name, "=3"):
        with pytest.raises(ValueError, match="not of the form"):
            devices.compiler_options("cpu", [wrong])


def test_the_step_is_compiled_with_the_options(tmp_path: Path) -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        train(ONE, tmp_path / "run", make_batches, **QUIET, xla_options={"xla_no_such_option": True})


def test_a_batch_is_saved_by_process(tmp_path: Path) -> None:
    path = guards.save_batch(tmp_path / "new", "step_1", ({"tokens": jnp.arange(6).reshape(2, 3)}, {"tokens": np.ones((1, 2))}))
    with np.load(path, allow_pickle=False) as saved:
        assert saved["0.tokens"].tolist() == [[0, 1, 2], [3, 4, 5]] and saved["1.tokens"].shape == (1, 2)


# --- several processes ------------------------------------------------------------------------------------------------------------------

LONG = dataclasses.replace(ONE, stages=(dataclasses.replace(ONE.stages[0], steps=60),))

PROCESS = """
import sys, time
import jax
index, port, run = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, index)
from monovl_jax.training.loop import PreemptedError, train
from tests.training.test_guards import LONG, QUIET
from tests.training.worlds import make_batches

def own_rows(stage, position):
    for parts in make_batches(stage, position):
        time.sleep(0.05)
        yield tuple({key: value[2 * index : 2 * index + 2] for key, value in part.items()} for part in parts)

try:
    train(LONG, run, own_rows, **{**QUIET, "checkpoint_every": 1000})
except PreemptedError as error:
    print(error)
    sys.exit(143)
"""


@pytest.mark.slow
def test_all_processes_stop_at_the_same_step_and_one_goes_on_alone(tmp_path: Path) -> None:
    """SIGTERM to process 1 of 2 alone; the checkpoint of both is continued by a single process to the end of a run never stopped."""
    run = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(index), str(port), str(run)],
            cwd=ROOT,
            env={**os.environ, **flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in (0, 1)
    ]
    try:
        wait_until(lambda: len(read_log(run / "log.jsonl")) >= 3 or any(p.poll() is not None for p in processes), 200)
        processes[1].send_signal(signal.SIGTERM)
        said = [process.communicate(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [143, 143], said
    words = {out.splitlines()[-1] for out, _ in said}
    assert len(words) == 1 and "stage 'S0' is saved at step" in (sentence := words.pop())
    (step,) = StageStore(run, "S0").all_steps()
    assert 3 <= step < 60 and f"at step {step}," in sentence
    beats = [json.loads((run / "heartbeats" / f"{index}.json").read_text()) for index in (0, 1)]
    assert [beat["process"] for beat in beats] == [0, 1]
    train(LONG, run, make_batches, **QUIET)
    train(LONG, tmp_path / "straight", make_batches, **QUIET)
    for one, other in zip(read_log(run / "log.jsonl"), read_log(tmp_path / "straight/log.jsonl"), strict=True):
        assert one["step"] == other["step"] and one["loss"] == pytest.approx(other["loss"], rel=1e-4)
