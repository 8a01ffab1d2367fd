import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monovl_jax.data.packing import Example, PackSpec, pack_row, plan_packs, sample_weights

T, K, V, SIDE, CONTEXT = 64, 5, 3, 2, 9


def example(rng: np.random.Generator, text: int, tiles: int) -> Example:
    ids = rng.integers(10, 99, text).astype(np.int32)
    at = int(rng.integers(0, text + 1))
    ids = np.concatenate([ids[:at], np.full(V * tiles, CONTEXT, np.int32), ids[at:]])
    weights = ((rng.random(len(ids)) < 0.5) & (ids != CONTEXT)).astype(np.float32)
    return Example(ids, weights, rng.integers(0, 256, (tiles, SIDE, SIDE, 3), dtype=np.uint8))


shapes = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 4)), max_size=12)
weightings = st.sampled_from(["token", "sample", "square"])


@settings(max_examples=60, deadline=None)
@given(shapes, st.booleans())
def test_a_plan_has_every_sample_once_and_keeps_the_limits(shapes: list[tuple[int, int]], longest_first: bool) -> None:
    spec = PackSpec(T, K, V, SIDE, CONTEXT)
    lengths = np.asarray([(text + V * tiles, tiles) for text, tiles in shapes] + [(T + 1, 0), (3, K + 1)])
    plan = plan_packs(lengths, spec, longest_first=longest_first)
    assert sorted(np.concatenate([*plan, []]).tolist()) == list(range(len(shapes)))
    for row in plan:
        assert (lengths[row].sum(0) <= (T, K)).all() and len(row)
    sums = [lengths[row].sum(0) for row in plan]
    for i, later in enumerate(plan):
        for before in sums[:i]:
            assert (before + lengths[later[0]] > (T, K)).any(), "first fit: no sample opens a row while an earlier one has room"


@settings(max_examples=60, deadline=None)
@given(shapes, weightings, st.integers(0, 9))
def test_a_row_holds_every_token_once(shapes: list[tuple[int, int]], weighting: str, seed: int) -> None:
    spec = PackSpec(T, K, V, SIDE, CONTEXT, pad_id=7, loss_weighting=weighting)
    rng = np.random.default_rng(seed)
    every = [example(rng, *shape) for shape in shapes]
    plan = plan_packs(np.asarray([(len(e.ids), len(e.tiles)) for e in every]).reshape(-1, 2), spec)
    for pack in plan:
        check_row([every[i] for i in pack], spec)


def check_row(examples: list[Example], spec: PackSpec) -> None:
    row = pack_row(examples, spec)
    used = sum(len(e.ids) for e in examples)
    segments, tokens = row["segment_ids"], row["tokens"]
    assert (segments[used:] == 0).all() and (tokens[used:] == spec.pad_id).all() and (row["token_types"][used:] == -1).all()
    assert (np.diff(segments[:used]) >= 0).all() and segments[:used].min() == 1
    for number, e in enumerate(examples, 1):
        mine = segments == number
        assert tokens[mine].tolist() == e.ids.tolist() and row["positions"][mine].tolist() == list(range(len(e.ids)))
        weights = sample_weights(e.loss_weights, spec.loss_weighting)
        assert row["loss_weights"][mine].tolist() == [*weights[1:].tolist(), 0.0]
        expected = np.where(weights[1:] > 0, e.ids[1:], 0)
        assert row["targets"][mine].tolist() == [*expected.tolist(), 0]
    visual = row["token_types"] == 1
    assert (visual == (tokens == CONTEXT)).all() and ((row["token_types"] == 0) == ((segments > 0) & ~visual)).all()
    index, slot = row["visual_index"], row["visual_slot"]
    count = int(visual.sum())
    assert index[visual].tolist() == list(range(count)) and (index[~visual] == -1).all()
    assert (index[slot[:count]] == np.arange(count)).all() and (slot[count:] == -1).all()
    tiles = np.concatenate([e.tiles for e in examples])
    assert np.array_equal(row["tiles"][: len(tiles)], tiles) and not row["tiles"][len(tiles) :].any()
    dtypes = {name: array.dtype.name for name, array in row.items()}
    assert dtypes == {
        "tokens": "int32", "token_types": "int8", "visual_index": "int32", "visual_slot": "int32", "positions": "float32",
        "segment_ids": "int32", "targets": "int32", "loss_weights": "float32", "tiles": "uint8",
    }  # fmt: skip


def test_weightings() -> None:
    weights = np.asarray([0, 1, 1, 1, 1], np.float32)
    assert sample_weights(weights, "token").sum() == 4
    assert sample_weights(weights, "sample").sum() == 1
    assert sample_weights(weights, "square").tolist() == [0, 0.5, 0.5, 0.5, 0.5]
    assert not sample_weights(np.zeros(3, np.float32), "sample").any()


def test_wrong_examples_are_errors() -> None:
    spec, rng = PackSpec(T, K, V, SIDE, CONTEXT), np.random.default_rng(0)
    with pytest.raises(ValueError, match="do not fit"):
        pack_row([example(rng, 40, 0), example(rng, 40, 0)], spec)
    lacking = example(rng, 5, 2)
    with pytest.raises(ValueError, match="6 image slots for 1 tiles"):
        pack_row([example(rng, 5, 1), Example(lacking.ids, lacking.loss_weights, lacking.tiles[:1])], spec)
    assert (pack_row([], spec)["token_types"] == -1).all()
    with pytest.raises(ValueError, match="cannot be"):
        PackSpec(1, K, V, SIDE, CONTEXT)


def test_text_only_rows_need_no_tiles() -> None:
    spec = PackSpec(8, 0, 4, 16, CONTEXT)
    row = pack_row([Example(np.arange(10, 15, dtype=np.int32), np.ones(5, np.float32), np.zeros((0, 16, 16, 3), np.uint8))], spec)
    assert row["visual_slot"].shape == (0,) and row["tiles"].shape == (0, 16, 16, 3)
    assert row["targets"].tolist() == [11, 12, 13, 14, 0, 0, 0, 0]
