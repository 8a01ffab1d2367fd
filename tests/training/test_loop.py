"""Whole runs of a tiny recipe: resumed after a crash or a kill, refused in a foreign directory, read back."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from monovl_jax.config import tiny
from monovl_jax.training import checkpoint
from monovl_jax.training.checkpoint import RunError, StageStore, load_run, read_experiment, read_recipe
from monovl_jax.training.files import sealed
from monovl_jax.training.loop import Prefetcher, TrainingError, train
from monovl_jax.training.metrics import read_log, truncate_log
from monovl_jax.training.stages import RecipeError
from monovl_jax.training.trainable import digests
from tests.conftest import ROOT
from tests.training.worlds import OPS, make_batches, plain_parameters, recipe, stage, text_stage

SMALL = recipe(stages=(text_stage(), stage(text_rows=0, text_length=0, text_mixture={}, accumulation=1, steps=7)))
QUIET: dict[str, Any] = dict(ops=OPS, initial=lambda: plain_parameters(tiny()), checkpoint_every=2, progress=False, tensorboard=False)


class Crash(Exception):
    """What a data source might raise."""


def crashing(at: dict[str, int]):
    """`make_batches` that fails when asked for batch `at[stage]`."""

    def make(stage, position: int) -> Iterator:
        for number, batch in enumerate(make_batches(stage, position), position):
            if number == at.get(stage.name):
                raise Crash(f"batch {number}")
            yield batch

    return make


def losses(run: Path) -> list[tuple[str, int, str]]:
    return [(row["stage"], row["step"], row["loss"].hex()) for row in read_log(run / "log.jsonl")]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, dict]:
    """An uninterrupted run: (directory, records, digests of what evaluate was given)."""
    run, seen = tmp_path_factory.mktemp("straight") / "run", {}

    def evaluate(name: str, graphdef: Any, parameters: dict) -> dict:
        seen[name] = digests(parameters)
        return {"leaves": len(seen[name])}

    records = train(SMALL, run, make_batches, evaluate=evaluate, **{**QUIET, "tensorboard": True})
    return run, records, seen


def test_a_run_from_start_to_end(straight: tuple) -> None:
    run, records, seen = straight
    assert list(records) == ["S0", "S1.1"] and records["S1.1"]["steps"] == 7 and records["S1.1"]["evaluation"] == {"leaves": 24}
    assert [(stage, step) for stage, step, _ in losses(run)] == [("S0", n) for n in (1, 2, 3)] + [("S1.1", n) for n in range(1, 8)]
    assert json.loads((run / "stages/S1.1/done.json").read_text()) == sealed(records["S1.1"])
    row = read_log(run / "log.jsonl")[-1]
    assert (
        row["loss"] == records["S1.1"]["loss"] and row["tokens"] == 4 * 18 and 0 <= row["data_wait"] <= 1 and row["tokens_per_second"] > 0
    )
    assert list((run / "tensorboard").glob("events*"))
    # Delta tuning: only what S1.1 names has changed.
    changed = {path for path in seen["S0"] if seen["S0"][path] != seen["S1.1"][path]}
    assert changed == SMALL.trainable_paths(SMALL.stages[1])
    assert not (run / "stages/S1.1/steps").exists() and not (run / "stages/S1.1/base").exists()


def test_load_run(straight: tuple) -> None:
    run, _, seen = straight
    config, last = load_run(run)
    assert config == tiny() and digests(last) == seen["S1.1"]
    assert digests(load_run(run, "S0")[1]) == seen["S0"]
    assert read_recipe(run) == SMALL
    with pytest.raises(RunError, match=r"has no stage 'S5'; its stages: S0, S1\.1"):
        load_run(run, "S5")
    with pytest.raises(RunError, match="is no run directory"):
        load_run(run / "stages")


def test_a_finished_run_does_nothing(straight: tuple) -> None:
    run, records, _ = straight
    before = (run / "log.jsonl").read_text()

    def never(stage, position):
        raise AssertionError("no data is needed")

    assert train(SMALL, run, never, **QUIET) == records
    assert (run / "log.jsonl").read_text() == before


def test_resume_gives_the_same_bits(straight: tuple, tmp_path: Path) -> None:
    """Crashes before the first checkpoint, in the evaluation and between checkpoints; losses and end are those of the straight run."""
    run, attempts = tmp_path / "run", []

    def evaluate(name: str, graphdef: Any, parameters: dict) -> None:
        attempts.append((name, digests(parameters)))
        if len(attempts) == 1:
            raise Crash("while evaluating")

    for at, where in (({"S0": 1}, "batch 1"), ({}, "evaluating"), ({"S1.1": 5}, "batch 5")):
        with pytest.raises(Crash, match=where):
            train(SMALL, run, crashing(at), evaluate=evaluate, **QUIET)
        if where == "batch 5":
            with StageStore(run, "S1.1") as store:
                assert store.latest() == 4
            with (run / "log.jsonl").open("a") as log:
                log.write('{"stage": "S1.1", "step": 5, "loss": 1.0}\n{"stage": "S1.1", "st')  # rows that a kill leaves behind
    starts = []

    def counted(stage, position):
        starts.append((stage.name, position))
        return make_batches(stage, position)

    train(SMALL, run, counted, evaluate=evaluate, **QUIET)
    assert starts == [("S1.1", 4)]
    assert losses(run) == losses(straight[0])
    assert [name for name, _ in attempts] == ["S0", "S0", "S1.1"] and attempts[-1][1] == straight[2]["S1.1"]


class Places:
    """A `DataState` that tells where it was, and takes only what it told."""

    def __init__(self, name: str = "mine"):
        self.name, self.restored = name, []

    def state(self, stage: Any, position: int) -> Any:
        return [self.name, stage.name, position]

    def restore(self, stage: Any, state: Any) -> bool:
        self.restored.append(state)
        return state is not None and state[0] == self.name


@pytest.mark.parametrize(
    ("before", "after", "found", "said"),
    [
        (Places(), Places(), ["mine", "S1.1", 4], None),
        pytest.param(None, Places(), None, "holds no state of the data; the order of the 4 batches", marks=pytest.mark.slow),
        pytest.param(Places("other"), Places(), ["other", "S1.1", 4], "holds the state of other data", marks=pytest.mark.slow),
    ],
    ids=["kept", "a checkpoint of the first version", "other data"],
)
def test_checkpoints_keep_where_the_data_are(
    before: Places | None, after: Places, found: Any, said: str | None, straight: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Crash):
        train(SMALL, tmp_path, crashing({"S1.1": 5}), data_state=before, **QUIET)
    capsys.readouterr()
    train(SMALL, tmp_path, make_batches, data_state=after, **{**QUIET, "progress": True})
    assert after.restored == [found] and losses(tmp_path) == losses(straight[0])
    printed = " ".join("".join(capsys.readouterr()).split())
    assert said in printed if said else "planned again" not in printed


def test_interrupted_stages_do_not_load(tmp_path: Path) -> None:
    with pytest.raises(Crash):
        train(SMALL, tmp_path / "run", crashing({"S0": 0}), **{**QUIET, "initial": None})
    with pytest.raises(RunError, match="no stage has finished yet; finished: none"):
        load_run(tmp_path / "run")
    with pytest.raises(RunError, match="stage 'S0' has not finished"):
        load_run(tmp_path / "run", "S0")


# --- errors before anything compiles ---------------------------------------------------------------------------------------------------


@pytest.fixture
def no_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was about to compile")

    monkeypatch.setattr("monovl_jax.training.loop._train", refuse)


@pytest.mark.usefixtures("no_compilation")
@pytest.mark.parametrize(
    ("other", "message"),
    [
        (recipe(stages=(SMALL.stages[0], dataclasses.replace(SMALL.stages[1], steps=9))), r"stages\[S1\.1\]\.steps is 7 there and 9 here"),
        (dataclasses.replace(SMALL, model=tiny("ffn+attention")), r"model\.decoder\.experts is 'ffn' there and 'ffn\+attention' here"),
        (
            dataclasses.replace(SMALL, stages=SMALL.stages[:1], copy_experts_before=None),
            r"stages\[S1\.1\].*and 'absent' here; .*and \d+ more",
        ),
    ],
)
def test_another_experiment(straight: tuple, other: Any, message: str) -> None:
    run = straight[0]
    with pytest.raises(RunError, match=message) as error:
        train(other, run, make_batches, **QUIET)
    assert "Give another run directory, or delete" in str(error.value)


@pytest.mark.usefixtures("no_compilation")
def test_another_identity(straight: tuple) -> None:
    with pytest.raises(RunError, match=r"identity\.data is 'absent' there and 'x' here"):
        train(SMALL, straight[0], make_batches, identity={"data": "x"}, **QUIET)
    with pytest.raises(RunError, match=r"identity\.dtype is 'float32' there and 'bfloat16' here"):
        train(SMALL, straight[0], make_batches, **{**QUIET, "ops": dataclasses.replace(OPS, dtype=jnp.bfloat16)})


@pytest.mark.usefixtures("no_compilation")
def test_bad_directories_and_patterns(tmp_path: Path) -> None:
    (tmp_path / "stages").mkdir()
    with pytest.raises(RunError, match=r"holds stages but no experiment\.json"):
        train(SMALL, tmp_path, make_batches, **QUIET)
    (tmp_path / "experiment.json").write_text("{")
    with pytest.raises(RunError, match=r"experiment\.json cannot be read"):
        train(SMALL, tmp_path, make_batches, **QUIET)
    (tmp_path / "experiment.json").write_text('{"format": 99}')
    with pytest.raises(RunError, match="has format 99"):
        train(SMALL, tmp_path, make_batches, **QUIET)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is a file"):
        train(SMALL, tmp_path / "file", make_batches, **QUIET)
    wrong = recipe(stages=(text_stage(), stage(trainable=("^decoder/blocks/mlp/visula/",))))
    with pytest.raises(RecipeError, match=r"stage 'S1\.1'.*matches no parameter; nearest: decoder/blocks/mlp/visual/"):
        train(wrong, tmp_path / "new", make_batches, **QUIET)
    assert not (tmp_path / "new").exists()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with checkpoint.run_lock(tmp_path), pytest.raises(RunError, match="another process is training"), checkpoint.run_lock(tmp_path):
        pass
    with checkpoint.run_lock(tmp_path):
        pass


def test_initial_parameters_of_another_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="initial parameters: decoder/blocks/attention/visual/out is unknown"):
        train(SMALL, tmp_path / "run", make_batches, **{**QUIET, "initial": lambda: plain_parameters(tiny("ffn+attention"))})


# --- errors while training -------------------------------------------------------------------------------------------------------------


def test_loss_that_is_not_finite(tmp_path: Path) -> None:
    def spoiled(stage, position):
        for number, parts in enumerate(make_batches(stage, position)):
            if number == 1:
                parts[0]["loss_weights"][:] = np.inf
            yield parts

    with pytest.raises(TrainingError, match=r"stage 'S0', step 2: loss (nan|inf).*not_finite/step_2.npz"):
        train(SMALL, tmp_path / "run", spoiled, **QUIET, max_skipped=1)
    with StageStore(tmp_path / "run", "S0") as store:
        assert store.latest() is None


def test_data_that_ends(tmp_path: Path) -> None:
    def short(stage, position):
        return iter([next(make_batches(stage, position))])

    with pytest.raises(TrainingError, match="the data ended after 1 of 3 steps"):
        train(SMALL, tmp_path / "run", short, **QUIET)


def test_prefetcher() -> None:
    closed = []

    def numbers() -> Iterator[Any]:
        try:
            yield from range(100)
        finally:
            closed.append(True)

    batches = Prefetcher(numbers(), lambda n: n * 10)
    assert [batches.next() for _ in range(3)] == [0, 10, 20]
    batches.close()
    assert closed == [True]


# --- the log ----------------------------------------------------------------------------------------------------------------------------


def test_truncate_log(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    assert truncate_log(path, {}) == 0
    rows = [("A", 1), ("A", 2), ("B", 1), ("B", 1), ("B", 2), ("C", 1)]
    path.write_text("".join(json.dumps({"stage": s, "step": n, "loss": 0.1}) + "\n" for s, n in rows) + '{"stage": "B", "st')
    assert truncate_log(path, {"A": 2, "B": 1}) == 4
    assert [(row["stage"], row["step"]) for row in read_log(path)] == [("A", 1), ("A", 2), ("B", 1)]
    assert truncate_log(path, {"A": 2, "B": 1}) == 0


def test_loss_is_written_to_the_bit() -> None:
    for value in (np.float32(2.3456789), np.float32(0.1), np.nextafter(np.float32(1), np.float32(2))):
        assert np.float32(json.loads(json.dumps(float(value)))).tobytes() == value.tobytes()


# --- kill -9 ----------------------------------------------------------------------------------------------------------------------------

CHILD = """
import sys, time
from tests.training.test_loop import QUIET, SMALL
from tests.training.worlds import make_batches
from monovl_jax.training.loop import train

def slow(stage, position):
    for batch in make_batches(stage, position):
        time.sleep(0.1)
        yield batch

train(SMALL, sys.argv[1], slow, **{**QUIET, "checkpoint_every": 1})
"""


@pytest.mark.slow
def test_kill_nine_gives_the_same_bits(straight: tuple, tmp_path: Path) -> None:
    """SIGKILL from outside, three times, as soon as a certain row is in the log: right while its checkpoint is being written."""
    run = tmp_path / "run"

    def start() -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", CHILD, str(run)], cwd=ROOT, env=dict(os.environ), stderr=subprocess.PIPE, text=True)

    for rows in (2, 4, 8):
        child, deadline = start(), time.monotonic() + 200
        while len(read_log(run / "log.jsonl")) < rows:
            assert child.poll() is None and time.monotonic() < deadline, child.stderr.read() if child.stderr else ""
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    child = start()
    assert child.wait(timeout=200) == 0, child.stderr.read() if child.stderr else ""
    assert losses(run) == losses(straight[0])
    assert digests(load_run(run)[1]) == straight[2]["S1.1"]
    assert read_experiment(run) == read_experiment(straight[0])
