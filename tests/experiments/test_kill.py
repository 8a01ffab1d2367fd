"""The kill test in short: five kills instead of fifty."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.reliability.kill import Settings, main


@pytest.mark.slow
def test_five_kills_change_no_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = Settings(kills=5, folder=tmp_path / "runs", out=tmp_path / "kill.json")
    assert main(settings) == 0, capsys.readouterr()
    result = json.loads(settings.out.read_text())
    assert result["kills"] == 5 == len(result["table"]) and result["steps"] == 60
    assert result["parameters_identical"] == {"S1.1": True, "S2": True} and result["losses_identical"]
    assert result["most_steps_lost"] <= 10
