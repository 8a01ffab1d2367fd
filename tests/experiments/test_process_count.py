"""Real processes on this machine, the rehearsal for several hosts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.readme import RESULTS
from experiments.reliability.process_count import RUNS, SAMPLES, compare


@pytest.mark.slow
def test_process_count_changes_nothing(tmp_path: Path) -> None:
    """One process; four between which tensor divides too; four, then one, then two, with a death between."""
    for row in compare(tmp_path, [RUNS[0], RUNS[3], RUNS[4]]):
        assert row["loss_difference"] <= 1e-5, row
        assert row["samples"] == SAMPLES and row["each_once"] and row["same_order"], row


def test_the_recorded_rehearsal_meets_the_bars() -> None:
    result = json.loads((RESULTS / "process_count.json").read_text(encoding="utf-8"))
    assert [row["run"] for row in result["runs"]] == [name for name, _, _ in RUNS]
    assert all(row["loss_difference"] <= 1e-5 and row["each_once"] and row["same_order"] for row in result["runs"])
