import json
import threading
import time
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monovl_jax.data.chat import Turn
from monovl_jax.data.jsonl import JsonlSource
from monovl_jax.data.pipeline import Part, Pipeline, one_pass, shuffled_indices
from monovl_jax.data.sources import MemorySource, Sample, TextSource
from tests.data.helpers import World, line, save_picture, tiny_encoding, tiny_spec, tiny_tokenizer


def pipeline(seed: int = 0, rows: int = 4, **options: object) -> Pipeline:
    encoding = tiny_encoding()
    parts = [Part(World(50, encoding), 3.0, "small"), Part(World(7, encoding, offset=100), 1.0, "tiny")]
    return Pipeline(parts, tiny_spec(encoding), rows, seed, **{"window": 40, "threads": 0, **options})


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and np.array_equal(a[name], b[name]) for name in a)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 5))
def test_the_shuffle_is_a_permutation(length: int, seed: int) -> None:
    assert sorted(shuffled_indices(np.arange(length), length, [seed])) == list(range(length))


def test_the_shuffle_depends_on_the_seed_and_needs_no_table() -> None:
    a, b = (shuffled_indices(np.arange(100), 1 << 40, [seed]) for seed in (0, 1))
    assert (a != b).any() and len(set(a.tolist())) == 100 and a.max() < 1 << 40
    first = np.arange(1000)
    assert abs(np.corrcoef(first, shuffled_indices(first, 1000, [3]))[0, 1]) < 0.15


def answers(batch: dict[str, np.ndarray]) -> Counter[str]:
    """How often each answer (the number of the sample) is in a batch."""
    tokenizer, found = tiny_tokenizer(), Counter()
    for row in range(len(batch["tokens"])):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            mine = (batch["segment_ids"][row] == segment) & (batch["loss_weights"][row] > 0)
            found[tokenizer.decode(batch["targets"][row, mine])] += 1
    return found


def test_each_epoch_has_every_sample_once_and_shares_hold() -> None:
    source = World(40, tiny_encoding())
    single = Pipeline([source], tiny_spec(source.encoding), 1, 5, window=40, threads=0)
    seen: Counter[str] = Counter()
    number = 0
    for epoch in (1, 2, 3):
        while sum(seen.values()) < 40 * epoch:
            seen += answers(single.batch(number))
            number += 1
        assert seen == Counter({str(i): epoch for i in range(40)})
    mixed = sum((answers(batch) for batch in islice(pipeline().batches(), 40)), Counter())
    total, tiny = sum(mixed.values()), sum(count for name, count in mixed.items() if int(name) >= 100)
    assert abs(tiny / total - 0.25) < 0.03 and len(mixed) == 57


@pytest.mark.parametrize("options", [{}, {"threads": 3, "prefetch": 5}, {"threads": 1, "prefetch": 1}])
def test_resuming_gives_the_same_batches(options: dict) -> None:
    with pipeline(**options).batches() as straight:
        expected = list(islice(straight, 9))
        assert straight.index == 9
    for start in (0, 1, 6, 8):
        with pipeline(**options).batches(start) as resumed:
            assert all(equal(a, b) for a, b in zip(islice(resumed, 9 - start), expected[start:], strict=True))
    assert equal(pipeline().batch(7), expected[7])
    assert not equal(pipeline(seed=1).batch(0), expected[0])


def test_going_back_plans_a_window_once_not_once_per_row() -> None:
    source = World(40, tiny_encoding())
    measured: list[int] = []
    source.lengths = lambda indices: measured.append(len(indices)) or [source.length(int(i)) for i in indices]
    single = Pipeline([source], tiny_spec(source.encoding), 1, 0, window=40, threads=0)
    single.batch(100)
    before = len(measured)
    for number in range(10):
        single.batch(number)
    assert len(measured) <= before + 2


def test_worker_processes_change_nothing() -> None:
    with pipeline(workers=2, prefetch=2).batches(3) as iterator:
        made = list(islice(iterator, 5))
    assert all(equal(batch, pipeline().batch(3 + i)) for i, batch in enumerate(made))


def test_processes_share_the_global_batch() -> None:
    whole = pipeline()
    parts = [pipeline(process_index=i, process_count=2) for i in range(2)]
    for number in range(4):
        halves = [part.batch(number) for part in parts]
        joined = {name: np.concatenate([half[name] for half in halves]) for name in halves[0]}
        assert equal(joined, whole.batch(number))


def test_account_is_kept() -> None:
    with pipeline(threads=1).batches() as iterator:
        batches = list(islice(iterator, 6))
        stats = iterator.stats
        assert iterator.wait_seconds > 0
    assert stats.rows == 24 and stats.tokens == sum(int((b["segment_ids"] > 0).sum()) for b in batches)
    assert stats.supervised == sum(int((b["loss_weights"] > 0).sum()) for b in batches) and stats.failed == stats.too_large == 0
    assert 0.5 < stats.token_efficiency <= 1 and 0.5 < stats.tile_efficiency <= 1


def test_samples_too_large_are_left_out_and_counted() -> None:
    encoding = tiny_encoding()
    spec = tiny_spec(encoding, tiles=2)  # one sample in four has 4 tiles
    loose = Pipeline([World(40, encoding)], spec, 1, 0, window=40, threads=0).batches()
    while loose.stats.samples < 30:
        next(loose)
    assert loose.stats.too_large == 10
    with pytest.raises(ValueError, match="raise the limits of the rows or cut"):
        Pipeline([World(40, encoding)], spec, 2, 0, window=40, threads=0, strict=True).batch(0)
    with pytest.raises(ValueError, match="none of 4 samples fits"):
        Pipeline([World(40, encoding)], tiny_spec(encoding, tokens=3), 2, 0, window=4, threads=0).batch(0)


def test_a_broken_picture_is_counted_and_trains_nothing(tmp_path) -> None:
    save_picture(tmp_path / "a.png")
    save_picture(tmp_path / "cut.jpg", (32, 32), cut=0.6)
    (tmp_path / "data.jsonl").write_bytes(line("a.png") + line("cut.jpg"))
    encoding = tiny_encoding()
    source = JsonlSource(tmp_path / "data.jsonl", encoding)
    with Pipeline([source], tiny_spec(encoding, tokens=48, tiles=4), 2, 0, window=2, threads=1).batches() as iterator:
        batch = next(iterator)
        assert iterator.stats.failed == 1 and iterator.stats.samples == 2
    assert ((batch["loss_weights"] > 0).any(1).sum(), source.bad.count) == (1, 1)
    strict = JsonlSource(tmp_path / "data.jsonl", encoding, strict=True)
    with pytest.raises(ValueError, match=r"data\.jsonl:2: "):
        with Pipeline([strict], tiny_spec(encoding, tokens=48, tiles=4), 2, 0, window=2, threads=1).batches() as iterator:
            next(iterator)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": []}, "no source"),
        ({"parts": [Part(World(3, tiny_encoding()), 0.0)]}, "weight 0.0"),
        ({"parts": [World(0, tiny_encoding())]}, "no \\(good\\) sample"),
        ({"rows": 3, "process_count": 2}, "cannot be shared"),
        ({"process_index": 1}, "does not exist"),
        ({"window": 0}, "is empty"),
    ],
)
def test_impossible_settings(options: dict, message: str) -> None:
    settings = {"parts": [World(3, tiny_encoding())], "spec": tiny_spec(tiny_encoding()), "rows": 2, "seed": 0, **options}
    with pytest.raises(ValueError, match=message):
        Pipeline(**settings)


def test_one_pass_sees_everything_once() -> None:
    source = World(23, tiny_encoding())
    batches = list(one_pass(source, tiny_spec(source.encoding), 4))
    assert sum((answers(batch) for batch in batches), Counter()) == Counter({str(i): 1 for i in range(23)})
    assert {len(batch["tokens"]) for batch in batches} == {4}
    with pytest.raises(ValueError, match="raise the limits"):
        list(one_pass(source, tiny_spec(source.encoding, tiles=1), 4))


def test_memory_and_text_sources() -> None:
    encoding = tiny_encoding()
    picture = np.zeros((16, 32, 3), np.uint8)
    memory = MemorySource([Sample([Turn("user", "a"), Turn("assistant", "b")], [picture])], encoding)
    assert memory.length(0) == (len(memory[0].ids), 2) == (16, 2)
    text = TextSource(["hello", "world"], encoding.tokenizer, 5, tile_size=16)
    assert len(text) == 3
    assert [tuple(row) for row in text.lengths(np.arange(3)).tolist()] == [text.length(i) for i in range(3)] == [(5, 0), (5, 0), (2, 0)]
    assert encoding.tokenizer.decode(np.concatenate([text[i].ids for i in range(3)]), skip_special=False) == "hello<|end|>world<|end|>"
    assert text[0].loss_weights.tolist() == [0, 1, 1, 1, 1]
    with Pipeline([memory, text], tiny_spec(encoding), 1, 0, window=8).batches() as iterator:
        assert (next(iterator)["token_types"] == 1).any()


@pytest.mark.parametrize("options", [{}, {"threads": 3}, {"process_index": 1, "process_count": 2}])
def test_a_state_goes_on_without_planning_what_lies_before(options: dict) -> None:
    """Through JSON, at places in and between windows; the batches are those of a run that was not interrupted, to the bit."""
    straight = pipeline(**options)
    with straight.batches() as iterator:
        expected = list(islice(iterator, 40))
        for start in (0, 1, 17, 33):
            state = json.loads(json.dumps(straight.state(start)))
            again = pipeline(**options)
            assert again.restore(state) and again.state(start) == state
            with again.batches(start) as resumed:
                assert all(equal(a, b) for a, b in zip(islice(resumed, 40 - start), expected[start:], strict=True))
    assert state["window"] > 3 and sum(state["drawn"]) == 40 * state["window"]


def test_a_far_state_costs_no_more_than_a_near_one() -> None:
    """Window 400,000 of samples that each fill a row, so that its first row is known: one window is planned."""
    encoding, measured = tiny_encoding(), []
    source = World(1 << 40, encoding)
    source.lengths = lambda indices: measured.append(len(indices)) or np.full((len(indices), 2), [96, 6])
    far = Pipeline([source], tiny_spec(encoding), 40, 0, window=40, threads=0)
    assert far.restore({**far.state(0), "window": 400_000, "row": 16_000_000, "drawn": [16_000_000]})
    assert far.state(400_000)["row"] == 16_000_000
    assert far._planner.row(16_000_000)[0].shape == (1, 2) and measured == [40]
    assert far._planner.row(0)[0].shape == (1, 2) and measured == [40, 40]


def test_states_of_other_data_are_not_taken() -> None:
    state = pipeline().state(9)
    assert pipeline(rows=2).restore(state)
    assert not any(pipeline(**options).restore(state) for options in ({"seed": 1}, {"window": 41}))
    for change in ({"window": -1}, {"row": True}, {"row": 1.0}, {"drawn": [1]}, {"drawn": [0, 0]}, {"drawn": None}, {"of": None}):
        fresh = pipeline()
        assert not fresh.restore({**state, **change}) and equal(fresh.batch(0), pipeline().batch(0))
    assert not any(pipeline().restore(value) for value in (None, 3, "x", []))


def test_a_thread_plans_ahead() -> None:
    source, measured = World(400, tiny_encoding()), []
    source.lengths = lambda indices: measured.append(len(indices)) or [source.length(int(i)) for i in indices]
    mixture = Pipeline([source], tiny_spec(source.encoding), 1, 0, window=4)
    mixture.batch(0)
    deadline = time.monotonic() + 20
    while len(measured) < 17 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(measured) == 17
    before = threading.active_count()
    with pytest.raises(ValueError, match="none of 4 samples fits"):
        Pipeline([World(40, source.encoding)], tiny_spec(source.encoding, tokens=3), 2, 0, window=4).batch(0)
    assert threading.active_count() <= before
