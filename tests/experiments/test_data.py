"""The packing bar, on fewer windows than the benchmark plans."""

import numpy as np

from experiments.benchmarks.data import TILING, V, llava_like, packing_waste, resume


def test_the_lengths_are_those_of_the_formula() -> None:
    lengths = llava_like(4_000, TILING)
    text_only = lengths[:, 1] == 0
    assert np.array_equal(lengths, llava_like(4_000, TILING)) and abs(text_only.mean() - 0.06) < 0.012
    assert abs(np.median(lengths[text_only, 0]) / 700 - 1) < 0.15
    text = (lengths[:, 0] - V * lengths[:, 1])[~text_only]
    assert abs(np.median(text) / 190 - 1) < 0.05 and (text.min(), text.max()) >= (50, 1_000)


def test_packing_wastes_little_when_rows_have_the_shape_of_the_data() -> None:
    shapes = packing_waste(windows=2)["shapes"]
    for name in ("rows of sft", "long rows, shaped like the data"):
        assert shapes[name]["token_waste"] < 0.05 and shapes[name]["tile_waste"] < 0.15
    assert all(0 <= row[key] < 1 for row in shapes.values() for key in ("token_waste", "tile_waste"))


def test_going_on_costs_the_same_everywhere() -> None:
    found = resume(windows=3)
    assert found["seconds"]["400000"] < found["bar"]
