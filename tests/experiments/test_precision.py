"""What bfloat16 changes, over the small cases kept here."""

from pathlib import Path

import numpy as np
import pytest

from experiments.parity.precision import compare, main

CASES = sorted(p.parent for p in (Path(__file__).parent.parent / "golden").glob("mono_internvl*/*/case.json"))[:1]


def test_bfloat16_is_coarser_than_float32_and_close() -> None:
    result = main(tuple(CASES))
    assert result["cases"], "no recorded case has logits"
    assert result["float32"]["rms"] < 1e-5 < result["bfloat16"]["rms"] < 0.05
    assert result["float32"]["same_argmax"] == 1


def test_compare_counts_places_and_measures_in_spreads() -> None:
    want = np.array([[2.0, 0.0], [0.0, 2.0]], np.float32)
    got = np.array([[0.0, 2.0], [0.0, 2.0]], np.float32)
    found = compare(got, want)
    assert found["same_argmax"] == 0.5 and found["largest"] == pytest.approx(2.0) and found["kl"] > 0
