"""The TPU compiler itself: a tiny recipe for v5e:2x2, kernels included. Needs libtpu (extra `aot`), and no TPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'monovl_jax[aot]'"),
]

RECIPE = """
import dataclasses
from monovl_jax.config import tiny
from monovl_jax.training.stages import Recipe, Stage

decoder = dataclasses.replace(tiny().decoder, hidden_size=256, intermediate_size=512, num_heads=2, num_kv_heads=2)
model = dataclasses.replace(tiny(), decoder=decoder)
VISUAL = ("^vision/", "^projector/", "^decoder/blocks/mlp/visual/")
rows = dict(steps=10, batch_size={rows}, learning_rate=1e-3, sequence_length={length}, tiles_per_row=2, mixture={{"x": 1.0}})
recipe = Recipe("small", model, (Stage("S1.1", VISUAL, **rows), Stage("S2", (".*",), **rows)), copy_experts_before="S1.1")
"""


def run(folder: Path, *flags: str, rows: int = 8, length: int = 256) -> subprocess.CompletedProcess[str]:
    (folder / "small.py").write_text(RECIPE.format(rows=rows, length=length))
    command = [sys.executable, "-m", "monovl_jax.cli", "plan", "small.py:recipe", *flags]
    paths = os.pathsep.join(path for path in (str(ROOT), os.environ.get("PYTHONPATH", "")) if path)
    environment = {**os.environ, "PYTHONPATH": paths, "XDG_CACHE_HOME": str(folder / "cache"), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=500)


def test_a_recipe_is_planned(tmp_path: Path) -> None:
    """Kernels, sums over shardings and collectives of a small model on four chips; the second time from the cache."""
    flags = ("--topology", "v5e:2x2", "--accumulation", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2", "--out", "plan.json")
    first = run(tmp_path, *flags)
    assert first.returncode == 0, first.stderr
    told = json.loads((tmp_path / "plan.json").read_text())
    visual, everything = told["stages"]
    for stage in (visual, everything):
        assert stage["fits"] and stage["arguments_bytes"] == sum(stage["state_bytes"].values())
        assert stage["memory_bytes"]["arguments"] == stage["arguments_bytes"] + stage["layout_padding_bytes"]
        assert stage["kernels"], "no Mosaic kernel in the program"
        rows = {(row["kind"], row["axes"]): row for row in stage["collectives"]}
        assert any("fsdp" in axes for _, axes in rows) and any("tensor" in axes for _, axes in rows)
        assert stage["costs"]["step"] > 0
        (note,) = stage["notes"]  # the loss walks over supervised tokens, of which only the data knows how many
        assert note.startswith("1 loops have no known trip count")
    assert visual["state_bytes"]["masters"] < everything["state_bytes"]["masters"]
    assert "equal to the sum over shardings" in first.stdout
    again = run(tmp_path, *flags)
    assert again.returncode == 0 and again.stdout.count("taken from the cache") == 2
    assert json.loads((tmp_path / "plan.json").read_text())["stages"][0]["collectives"] == visual["collectives"]


def test_one_that_does_not_fit_is_refused_with_the_mend(tmp_path: Path) -> None:
    done = run(tmp_path, "--topology", "v5e:2x2", "--stages", "S2", "--accumulation", "1", rows=4096, length=8192)
    assert done.returncode == 1, done.stderr
    assert "S2: does not fit, needs " in done.stdout and "x the HBM: try --accumulation 2" in done.stdout


def test_a_topology_that_libtpu_does_not_know(tmp_path: Path) -> None:
    done = run(tmp_path, "--topology", "v5e:3x5")
    assert done.returncode == 2 and "libtpu does not know the topology 'v5e:3x5'" in done.stderr
