"""Prompts to batches, and greedy decoding against the plain forward pass."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from monovl_jax.config import RopeConfig
from monovl_jax.inference.generate import Generated, Generator, abstract_model
from monovl_jax.inference.prompts import Prompt, bucket, pieces, prompt_batch, slots_for
from monovl_jax.inference.sampling import Sampling
from tests.inference.helpers import CONFIG, CONTEXT, NEVER, PAD, QUICK, SIDE, VISION, V, generator, prompt, quick
from tests.model.helpers import REFERENCE, pack, random_params, runner, tiny_with

__all__ = ["quick"]  # a fixture
greedy = QUICK["greedy"]


PROMPTS = [prompt(7, 1, 0), prompt(12, 2, 1), prompt(3, 0, 2)]
SLOTS, NEW = 14, 8


def decode(
    prompts: list[Prompt], config=CONFIG, stop: tuple[int, ...] = (), new: int = NEW, slots: int = SLOTS, **options: Any
) -> Generated:
    batch = prompt_batch(prompts, VISION, CONTEXT, slots, 2)
    params, graphdef = random_params(config), abstract_model(config)[0]
    stops = np.asarray([*stop, -1, -1, -1][:3], np.int32)  # three always: one compiled program
    return greedy(graphdef, params, batch, stops, np.int32(PAD), ops=REFERENCE, max_new_tokens=new, **options)


@pytest.fixture(scope="module")
def together() -> np.ndarray:
    """The ids that the three prompts give together, without any stop."""
    return np.asarray(decode(PROMPTS).ids)


def test_greedy_is_the_argmax_of_the_plain_forward(together: np.ndarray) -> None:
    """No cache, no left padding: the whole right-padded row again for every token."""
    params, run, samples = (
        random_params(CONFIG),
        runner(CONFIG),
        [(p.ids, p.tiles if p.tiles is not None else np.zeros((0, SIDE, SIDE, 3), np.uint8)) for p in PROMPTS],
    )
    for step in range(NEW):
        grown = [[(np.concatenate([ids, together[i, :step]]), tiles)] for i, (ids, tiles) in enumerate(samples)]
        batch = pack(CONFIG, grown, slots=SLOTS + NEW, tiles=2)
        logits = np.asarray(run(params, batch))
        for i, ((ids, _),) in enumerate(grown):
            assert logits[i, len(ids) - 1].argmax() == together[i, step]


def test_each_row_alone_gives_the_same(together: np.ndarray) -> None:
    for i, p in enumerate(PROMPTS):
        np.testing.assert_array_equal(np.asarray(decode([p]).ids)[0], together[i])


def test_rows_stop_by_themselves(together: np.ndarray) -> None:
    stops = (int(together[0, 2]), int(together[1, 4]))
    assert len({*stops}) == 2
    made = decode(PROMPTS, stop=stops)
    ids, longest = np.asarray(made.ids), 0
    for row in range(3):
        hits = np.flatnonzero(np.isin(together[row], stops))
        end = hits[0] + 1 if len(hits) else NEW
        np.testing.assert_array_equal(ids[row, :end], together[row, :end], "up to the stop id, which is part of it")
        assert (ids[row, end:] == PAD).all()
        longest = max(longest, end)
    assert int(made.steps) == longest


def test_decoding_ends_when_all_rows_have_stopped(together: np.ndarray) -> None:
    made = decode(PROMPTS, stop=(int(together[0, 0]), int(together[1, 1]), int(together[2, 1])))
    assert int(made.steps) <= 2 and (np.asarray(made.ids)[:, 2:] == PAD).all()


def test_scores_are_the_logits_of_each_step() -> None:
    made = decode(PROMPTS, keep_scores=True)
    scores = np.asarray(made.scores)
    assert scores.shape == (NEW, 3, CONFIG.decoder.vocab_size) and scores.dtype == np.float32
    np.testing.assert_array_equal(scores.argmax(-1).T, made.ids)
    assert decode(PROMPTS).scores is None


def test_padding_does_not_count_for_the_rotary_base() -> None:
    """Dynamic NTK beyond 8 positions takes the longest prompt, not the slots it is padded to."""
    config = tiny_with("ffn", rope=RopeConfig(theta=100.0, scaling="dynamic", factor=2.0), max_position_embeddings=8)
    exact, padded = (decode(PROMPTS[:2], config, slots=slots, keep_scores=True) for slots in (12, SLOTS))
    np.testing.assert_allclose(exact.scores, padded.scores, atol=2e-4)


# ---- Generator


def test_the_generator(together: np.ndarray) -> None:
    """Its decoding writes the layers out one by one, that of `greedy` scans them."""
    stop = int(together[0, 2])
    made = generator(stop)
    assert made.layers is not None
    out = made(PROMPTS, NEW, slots=SLOTS, tiles=2)
    assert len(out) == 3
    for row, ids in enumerate(out):
        hits = np.flatnonzero(together[row] == stop)
        np.testing.assert_array_equal(ids, together[row, : hits[0] if len(hits) else NEW], "without the stop id")


def test_a_generator_that_scans_gives_the_same(together: np.ndarray) -> None:
    scanning = Generator(CONFIG, random_params(CONFIG), REFERENCE, CONTEXT, [NEVER] * 3, PAD)
    scanning.layers = None  # as on an accelerator
    np.testing.assert_array_equal(scanning(PROMPTS, NEW, slots=SLOTS, tiles=2), together)


def test_the_generator_cuts_to_the_number_asked_for(together: np.ndarray) -> None:
    for n in (1, 4):
        for row, ids in enumerate(generator()(PROMPTS, n, slots=SLOTS, tiles=2)):
            np.testing.assert_array_equal(ids, together[row, :n])
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        generator()(PROMPTS, 0)


def test_long_prompts_in_pieces(together: np.ndarray) -> None:
    """Pieces of 6 slots cut through tiles; the first holds padding alone in some rows."""
    made = Generator(CONFIG, random_params(CONFIG), REFERENCE, CONTEXT, [NEVER] * 3, PAD, piece=6)
    np.testing.assert_array_equal(made(PROMPTS, NEW), together)


def test_weights_are_cast_once() -> None:
    made = Generator(CONFIG, random_params(CONFIG), dataclasses.replace(REFERENCE, dtype=jnp.bfloat16), CONTEXT, [NEVER], PAD)
    assert {leaf.dtype for leaf in jax.tree.leaves((made.params["decoder"], made.layers))} == {jnp.dtype(jnp.bfloat16)}
    assert made.params["vision"]["kernel"].dtype == np.float32, "the position table is interpolated in float32"


def test_split_layers_share_the_memory_of_the_stack() -> None:
    made = generator()
    whole, parts = made.params["decoder"]["blocks"]["mlp"]["text"]["gate"], [p["mlp"]["text"]["gate"] for p in made.layers]
    first, size = whole.unsafe_buffer_pointer(), whole.nbytes // len(parts)
    assert [p.unsafe_buffer_pointer() - first for p in parts] == [i * size for i in range(len(parts))]


# ---- sampling in a batch

HOT = Sampling(temperature=2.0, top_k=50, top_p=0.95, repetition_penalty=1.2, seed=3)


def test_a_sampled_row_does_not_depend_on_its_neighbours() -> None:
    made = generator()
    together = made(PROMPTS, NEW, slots=SLOTS, tiles=2, sampling=HOT)
    for row in (0, 2):
        (alone,) = made([PROMPTS[row]], NEW, slots=SLOTS, tiles=2, sampling=HOT, draws=[row])
        np.testing.assert_array_equal(alone, together[row])
    twice = made([PROMPTS[0]] * 3, NEW, slots=SLOTS, tiles=2, sampling=HOT, draws=[5, 5, 6])
    np.testing.assert_array_equal(twice[0], twice[1])
    assert not np.array_equal(twice[0], twice[2])


def test_a_large_penalty_lets_no_token_come_twice() -> None:
    made = generator()(PROMPTS, NEW, slots=SLOTS, tiles=2, sampling=Sampling(repetition_penalty=1e6))
    assert all(len({*ids.tolist()}) == NEW for ids in made)


# ---- prompts


@given(st.integers(1, 10_000), st.sampled_from([1, 8, 32]))
def test_buckets(n: int, smallest: int) -> None:
    size = bucket(n, smallest)
    assert size >= max(n, smallest)
    assert size == smallest or (size - n) < size / 3, "at most a third of padding"
    assert bucket(n + 1, smallest) >= size == bucket(size, smallest)


def test_bucket_values() -> None:
    assert [bucket(n) for n in (1, 32, 33, 48, 49, 64, 65, 97, 1000, 2048)] == [32, 32, 48, 48, 64, 64, 96, 128, 1024, 2048]
    assert [bucket(n, 1) for n in (1, 2, 3, 4, 5, 7)] == [1, 2, 3, 4, 6, 8]


def test_the_layout_of_the_docstring() -> None:
    batch = prompt_batch([Prompt(np.array([7, 8, 9])), Prompt(np.array([5, 6]))], VISION, CONTEXT, slots=3)
    assert batch["tokens"].tolist() == [[7, 8, 9], [0, 5, 6]]
    assert batch["positions"].tolist() == [[0, 1, 2], [1, 0, 1]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1], [0, 1, 1]]
    assert batch["token_types"].tolist() == [[0, 0, 0], [-1, 0, 0]]
    assert set(batch) == {"tokens", "positions", "segment_ids", "token_types"}, "no tiles, no visual fields"


def test_visual_slots_and_their_inverse() -> None:
    batch = prompt_batch(PROMPTS, VISION, CONTEXT)
    assert batch["tokens"].shape == (3, 32) and batch["tiles"].shape == (3, 2, SIDE, SIDE, 3)
    for row, p in enumerate(PROMPTS):
        index, slot, count = batch["visual_index"][row], batch["visual_slot"][row], int((p.ids == CONTEXT).sum())
        np.testing.assert_array_equal(np.flatnonzero(index >= 0), slot[:count])
        np.testing.assert_array_equal(index[slot[:count]], np.arange(count))
        assert (slot[count:] == -1).all() and (batch["token_types"][row][slot[:count]] == 1).all()
        np.testing.assert_array_equal(batch["tiles"][row, : count // V], p.tiles if p.tiles is not None else np.zeros((0, SIDE, SIDE, 3)))


def test_slots_of_long_prompts_are_whole_pieces() -> None:
    assert [slots_for(n, 64) for n in (1, 33, 64, 65, 128, 129)] == [32, 48, 64, 128, 128, 192]
    assert slots_for(5, 8) == 8, "never more than a piece"


def test_pieces_put_together_are_the_batch() -> None:
    batch = prompt_batch(PROMPTS, VISION, CONTEXT, slots=13, tiles=2)
    cut = pieces(batch, 5, V)
    assert [p["tokens"].shape[1] for p in cut] == [3, 5, 5] and pieces(batch, 13, V) == [batch]
    for name in ("tokens", "token_types", "positions", "segment_ids"):
        np.testing.assert_array_equal(np.concatenate([p[name] for p in cut], axis=1), batch[name])
    start = 0
    for part in cut:
        width = part["tokens"].shape[1]
        for row, slot in np.argwhere(batch["visual_index"][:, start : start + width] >= 0):
            whole, own = batch["visual_index"][row, start + slot], part["visual_index"][row, slot]
            assert own % V == whole % V and part["visual_slot"][row, own] == slot
            np.testing.assert_array_equal(part["tiles"][row, own // V], batch["tiles"][row, whole // V])
        start += width
    assert sum((p["visual_slot"] >= 0).sum() for p in cut) == 3 * V
    assert ["tiles" in p for p in pieces(batch, 3, V)] == [False, True, True, True, True], "none where none are shown"


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no prompts"),
        ([Prompt(np.zeros(0, np.int32))], {}, "prompt 0 is empty"),
        ([PROMPTS[0], Prompt(PROMPTS[1].ids, PROMPTS[0].tiles)], {}, "prompt 1 has 8 visual slots but 1 tiles of 4"),
        ([Prompt(PROMPTS[0].ids)], {}, "4 visual slots but 0 tiles"),
        ([Prompt(PROMPTS[2].ids, PROMPTS[0].tiles)], {}, "0 visual slots but 1 tiles"),
        ([PROMPTS[1]], {"slots": 11}, "prompt 0 has 12 tokens, more than the 11 slots"),
        ([PROMPTS[1]], {"tiles": 1}, "2 tiles, more than the 1 of a row"),
        ([PROMPTS[1]], {"tiles": 0}, "2 tiles, more than the 0 of a row"),
        ([Prompt(PROMPTS[0].ids, PROMPTS[0].tiles[:, 1:])], {}, r"uint8\[1, 31, 32, 3\]; they must be uint8\[k, 32, 32, 3\]"),
        ([Prompt(PROMPTS[0].ids, PROMPTS[0].tiles.astype(np.float32))], {}, r"float32\[1, 32, 32, 3\]; they must be uint8"),
    ],
)
def test_prompts_that_do_not_fit(prompts: list[Prompt], options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prompt_batch(prompts, VISION, CONTEXT, **options)
