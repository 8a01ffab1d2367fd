"""Exactness against upstream's recorded preprocessing."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from monovl_jax.evaluation.parity_preprocess import run_preprocess_case

SMALL = Path(__file__).parents[1] / "golden" / "preprocess"
FULL = Path(os.environ.get("MONOVL_GOLDEN", Path(__file__).parents[3] / "shared" / "golden")) / "preprocess"


def _cases(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []


@pytest.mark.parametrize("case", _cases(SMALL), ids=lambda path: path.name)
def test_small_copies(case: Path) -> None:
    checks = run_preprocess_case(case)
    assert checks and all(check.passed for check in checks), [check for check in checks if not check.passed]


@pytest.mark.parametrize("case", _cases(FULL) or [None], ids=lambda path: path.name if path else "absent")
def test_all_recorded_cases(case: Path | None) -> None:
    if case is None:
        print(reason := f"no recorded cases under {FULL}")
        pytest.skip(reason)
    checks = run_preprocess_case(case)
    assert checks and all(check.passed for check in checks), [check for check in checks if not check.passed]


def test_a_wrong_record_fails(tmp_path: Path) -> None:
    case = shutil.copytree(SMALL / "labels_internlm2", tmp_path / "case")
    arrays = dict(np.load(case / "outputs.npz"))
    arrays["text_single/labels"][0, -1] = -100
    np.savez(case / "outputs.npz", **arrays)
    assert [check.name for check in run_preprocess_case(case) if not check.passed] == ["text_single labels"]


def test_an_expected_error_must_happen(tmp_path: Path) -> None:
    case = shutil.copytree(SMALL / "labels_internlm2", tmp_path / "case")
    record = json.loads((case / "case.json").read_text())
    record["cases"] = [dict(record["cases"][0], error="KeyError: robot"), dict(record["cases"][0], name="robot", error="KeyError")]
    record["cases"][1]["conversation"] = [{"from": "robot", "value": "x"}]
    (case / "case.json").write_text(json.dumps(record))
    verdicts = {check.name: check.passed for check in run_preprocess_case(case)}
    assert verdicts["text_single error"] is False and verdicts["robot error"] is True


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds none of"),
        ({"case.json": {"loss": 1}}, "neither 'function'"),
        ({"prompts.json": [{"template": "vicuna", "dialog": "x", "messages": [], "prompt": ""}]}, "'vicuna' is unknown"),
        ({"grids.json": [{"width": 3}]}, "image_size"),
        ({"grids.json": []}, "compares nothing"),
        ({"case.json": {"function": "preprocess_x"}}, "'preprocess_x' is unknown"),
    ],
)
def test_unknown_content_is_a_clear_error(tmp_path: Path, files: dict, message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        run_preprocess_case(tmp_path)
