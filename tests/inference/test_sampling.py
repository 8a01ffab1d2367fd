"""Choosing tokens: against the rules written out in numpy, and against the probabilities they imply."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monovl_jax.inference.sampling import GREEDY, Sampling, _kept, choose, row_keys
from tests.quick import quick_jit

pick, kept = quick_jit(choose), quick_jit(_kept)
LOGITS = np.log(np.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]], np.float32))
UNSEEN = np.zeros((2, 4), bool)


def draws(sampling: Sampling, logits: np.ndarray, seen: np.ndarray, n: int = 4000) -> np.ndarray:
    """Relative frequency of each token of one row."""
    many = np.repeat(logits[None], n, 0), np.repeat(seen[None], n, 0), row_keys(sampling.seed, np.arange(n))
    return np.bincount(np.asarray(pick(*many, sampling.numbers())), minlength=len(logits)) / n


def test_greedy_takes_the_likeliest() -> None:
    assert pick(LOGITS, UNSEEN, row_keys(0, np.arange(2)), GREEDY.numbers()).tolist() == [0, 3]


def test_frequencies_are_the_probabilities() -> None:
    np.testing.assert_allclose(draws(Sampling(temperature=1.0), LOGITS[0], UNSEEN[0]), [0.4, 0.3, 0.2, 0.1], atol=0.03)
    squared = np.array([16, 9, 4, 1]) / 30  # temperature 1/2 squares the probabilities
    np.testing.assert_allclose(draws(Sampling(temperature=0.5), LOGITS[0], UNSEEN[0]), squared, atol=0.03)


def test_top_k_and_top_p_leave_the_rest_out() -> None:
    np.testing.assert_allclose(draws(Sampling(1.0, top_k=2), LOGITS[1], UNSEEN[0]), [0, 0, 3 / 7, 4 / 7], atol=0.03)
    np.testing.assert_allclose(draws(Sampling(1.0, top_p=0.69), LOGITS[1], UNSEEN[0]), [0, 0, 3 / 7, 4 / 7], atol=0.03)
    assert draws(Sampling(1.0, top_p=1e-6), LOGITS[0], UNSEEN[0], 50)[0] == 1
    assert draws(Sampling(1.0, top_k=1), LOGITS[1], UNSEEN[0], 50)[3] == 1


def test_top_p_counts_what_top_k_left() -> None:
    """Of 0.4 and 0.3 the first has 4/7: p = 0.5 needs it alone, though it has just 0.4 of all."""
    assert draws(Sampling(1.0, top_k=2, top_p=0.5), LOGITS[0], UNSEEN[0], 200)[0] == 1
    assert draws(Sampling(1.0, top_p=0.5), LOGITS[0], UNSEEN[0], 200)[1] > 0


def test_the_penalty_touches_seen_tokens_only() -> None:
    logits, seen = np.array([[2.0, 1.5, -1.0, 0.5]], np.float32), np.array([[True, False, True, False]])
    assert pick(logits, seen, row_keys(0, np.arange(1)), Sampling(repetition_penalty=2.0).numbers()).tolist() == [1]
    shown = np.exp([1.0, 1.5, -2.0, 0.5])
    np.testing.assert_allclose(draws(Sampling(1.0, repetition_penalty=2.0), logits[0], seen[0]), shown / shown.sum(), atol=0.03)


def test_keys_depend_on_seed_and_draw() -> None:
    data = [tuple(np.asarray(jax.random.key_data(row_keys(seed, np.array([draw]))))[0].tolist()) for seed in (0, 1) for draw in (0, 1)]
    assert len({*data}) == 4
    np.testing.assert_array_equal(jax.random.key_data(row_keys(0, np.array([4, 1])))[1], data[1])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(-400, 400), min_size=8, max_size=8, unique=True), st.integers(0, 9), st.floats(0.01, 1.0))
def test_what_is_kept(row: list[int], top_k: int, top_p: float) -> None:
    logits = np.array([row], np.float32) / 64
    got = np.asarray(kept(logits, np.int32(top_k), np.float32(top_p)))[0]
    order = np.argsort(-logits[0])[: top_k or 8]
    p = np.exp(logits[0, order].astype(np.float64))
    before = np.cumsum(p / p.sum()) - p / p.sum()
    if np.abs(before - top_p).min() < 1e-5:
        return  # on the edge, where float32 decides
    assert {*np.flatnonzero(got)} == {*order[(before < top_p) | (np.arange(len(order)) == 0)]}


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"repetition_penalty": 0},
        {"seed": -1},
    ],
)
def test_settings_outside_their_range(wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=f"sampling: {name} is"):
        Sampling(**wrong)
