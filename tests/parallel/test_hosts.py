"""`monovl train` in two real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.reliability.process_count import QUICK, free_port
from monovl_jax.training.metrics import read_log
from tests.conftest import ROOT
from tests.data.helpers import line, save_picture, tiny_tokenizer

RECIPE = """
from monovl_jax.config import tiny
from monovl_jax.training.stages import Recipe, Stage

rows = dict(batch_size=4, sequence_length=96, tiles_per_row=4, learning_rate=1e-3, mixture={"*": 1.0})
recipe = Recipe("two", tiny(), (Stage("S1.1", (r"/visual/",), steps=2, **rows), Stage("S2", (r".*",), steps=2, **rows)))
"""


def train(home: Path, *options: str, processes: int = 2) -> list[subprocess.CompletedProcess[str]]:
    """Every process with two devices, to its end."""
    flags = f"--xla_force_host_platform_device_count=2 {QUICK}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    environment |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(processes)}
    given = ["--data", "meta.json", "--tokenizer", "tokenizer", "--run-dir", "run", *options]
    command = [sys.executable, "-m", "monovl_jax.cli", "train", "recipes.py:recipe", *given]
    children = [
        subprocess.Popen(
            command, cwd=home, env={**environment, "JAX_PROCESS_ID": str(n)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for n in range(processes)
    ]
    said = [child.communicate(timeout=280) for child in children]
    return [subprocess.CompletedProcess(command, child.returncode, *texts) for child, texts in zip(children, said, strict=True)]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    save_picture(tmp_path / "a.png", (64, 32))
    good = [line("a.png") if n % 2 else line(None, question=f"say {n}", answer=str(n)) for n in range(12)]
    (tmp_path / "street.jsonl").write_bytes(b"".join([*good, line("missing.png")]))
    (tmp_path / "meta.json").write_text(json.dumps({"street": {"annotation": "street.jsonl"}}))
    (tmp_path / "recipes.py").write_text(RECIPE)
    tiny_tokenizer().save(tmp_path / "tokenizer")
    return tmp_path


@pytest.mark.slow
def test_two_processes_train_as_one_command(home: Path) -> None:
    first, second = train(home, "--mesh.fsdp", "2")
    assert first.returncode == second.returncode == 0, f"{first.stderr}\n{second.stderr}"
    assert "mesh data 2, fsdp 2, tensor 1: 4 cpu devices of 2 processes" in first.stderr and "good samples" in first.stderr
    assert "mesh" not in second.stderr and "samples" not in second.stderr  # process 0 alone speaks
    rows = read_log(home / "run/log.jsonl")
    assert [(row["stage"], row["step"]) for row in rows] == [("S1.1", 1), ("S1.1", 2), ("S2", 1), ("S2", 2)]
    assert len((home / "run/bad_samples.jsonl").read_text().splitlines()) == 1
    assert (home / "run/stages/S2/done.json").is_file()


@pytest.mark.slow
def test_what_does_not_fit_is_one_sentence(home: Path) -> None:
    for options, words in {
        ("--mesh.fsdp", "3"): "a mesh of data -1, fsdp 3, tensor 1 does not fit 4 devices",
        ("--mesh.tensor", "4"): "the mesh axis 'tensor': the 2 kv heads of the model; make that axis smaller",
        ("--batch-size", "6"): "stage 'S1.1': batch_size has 6 rows a micro-batch, which 4 devices (data 4 * fsdp 1) cannot share equally",
    }.items():
        for process in train(home, *options):
            assert process.returncode == 2, process.stderr
            lines = [text for text in process.stderr.splitlines() if text.startswith("monovl train:")]
            assert len(lines) == 1 and words in lines[0], process.stderr
        assert not (home / "run").exists()
