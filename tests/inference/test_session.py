"""A conversation with a cache answers what the whole conversation gives at once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from monovl_jax.inference.prompts import Prompt
from monovl_jax.inference.sampling import Sampling
from monovl_jax.inference.session import ContextFull, Session
from tests.inference.helpers import CONFIG, NEVER, V, generator, prompt, quick

__all__ = ["quick"]  # a fixture
TURNS = [prompt(9, 1, 0), prompt(5, 0, 1), prompt(14, 2, 2)]  # text between two pictures; the last picture comes late
NEW = 6


def whole(turns: list[Prompt], answers: list[np.ndarray]) -> Prompt:
    """The conversation up to the last turn as one prompt."""
    ids = [part for turn, answer in zip(turns, [*answers, np.zeros(0, np.int32)], strict=True) for part in (turn.ids, answer)]
    tiles = [t.tiles for t in turns if t.tiles is not None]
    return Prompt(np.concatenate(ids), np.concatenate(tiles) if tiles else None)


@pytest.mark.parametrize("piece", [1024, 8])
def test_every_answer_is_that_of_the_whole_conversation(piece: int) -> None:
    made, answers = generator(piece=piece), []
    session = Session(made)
    for number, turn in enumerate(TURNS, 1):
        answers.append(session(turn, NEW))
        (want,) = generator()([whole(TURNS[:number], answers[:-1])], NEW, slots=64, tiles=3)
        np.testing.assert_array_equal(answers[-1], want)
    np.testing.assert_array_equal(session.tokens, np.concatenate([whole(TURNS, answers[:2]).ids, answers[2]]))
    assert session.room == CONFIG.decoder.max_position_embeddings - len(session.tokens)


def test_stop_tokens_end_an_answer_and_are_forgotten() -> None:
    free = Session(generator())(TURNS[0], NEW)
    stop = int(free[3])
    assert stop not in free[:3]
    session = Session(generator(stop))
    np.testing.assert_array_equal(session(TURNS[0], NEW), free[:3])
    np.testing.assert_array_equal(session.tokens, np.concatenate([TURNS[0].ids, free[:3]]))
    got = session(TURNS[1], NEW)
    (want,) = generator(stop)([whole(TURNS[:2], [free[:3]])], NEW, slots=64, tiles=3)
    np.testing.assert_array_equal(got, want)


def test_the_stream_is_the_answer_in_parts() -> None:
    want = Session(generator())(TURNS[0], NEW)
    parts = [*Session(generator()).stream(TURNS[0], NEW)]
    assert len(parts) > 1 and all(len(p) for p in parts)
    np.testing.assert_array_equal(np.concatenate(parts), want)


def test_leaving_a_stream_keeps_what_was_made() -> None:
    session = Session(generator())
    stream = session.stream(TURNS[0], NEW)
    first = next(stream)
    stream.close()
    made = session.tokens[len(TURNS[0].ids) :]
    np.testing.assert_array_equal(made[: len(first)], first)
    (want,) = generator()([whole(TURNS[:2], [made])], NEW, slots=64, tiles=3)
    np.testing.assert_array_equal(session(TURNS[1], NEW), want)


def test_a_cache_grows_with_the_conversation() -> None:
    session = Session(generator())
    turns, answers = [prompt(60, 0, n) for n in range(3)], []
    for turn in turns:
        answers.append(session(turn, 5))
    assert session._cache is not None and session._cache.segments.shape[1] >= 195 + 8
    (want,) = generator()([whole(turns, answers[:2])], 5, slots=192)
    np.testing.assert_array_equal(answers[2], want)


def test_a_full_context() -> None:
    session = Session(generator(), context=20)
    assert len(session(TURNS[0], 8)) == 8, "9 + 8 tokens"
    with pytest.raises(ContextFull, match="17 tokens and the new turn 5, which leaves none of the context of 20"):
        session(TURNS[1], 8)
    session.reset()
    session(TURNS[0], 4)
    assert len(session(TURNS[1], 8)) == 2, "as many as there is room for"
    assert session.room == 0
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        Session(generator())(TURNS[0], 0)


def test_sampling_in_a_session() -> None:
    hot = Sampling(temperature=3.0, seed=1)
    answers = [Session(generator())(TURNS[1], NEW, hot, draw).tolist() for draw in (0, 0, 1)]
    assert answers[0] == answers[1] != answers[2]
    (batched,) = generator()([TURNS[1]], NEW, sampling=hot, draws=[1])
    assert batched.tolist() == answers[2]


def test_upstream_sends_late_pictures_to_the_text_experts() -> None:
    """As upstream (modeling_internlm2_ve.py:690-706): after a cache exists, a picture's tokens are text to the experts."""
    ours, theirs = Session(generator()), Session(generator(), as_upstream=True)
    late, rows = TURNS[2], []
    for session in (ours, theirs):
        session(TURNS[1], 1)
        batch = session._batch(late, 32, len(session.tokens))
        logits, _ = session.generator.read(batch, 20, len(late.ids) - 1, 0, session._with_room(64))
        rows.append(np.asarray(logits))
        assert ("token_types" in batch) == (session is ours)
    assert np.abs(rows[0] - rows[1])[:, : CONFIG.decoder.vocab_size].max() > 0.1
    np.testing.assert_array_equal(Session(generator())(TURNS[0], NEW), Session(generator(), as_upstream=True)(TURNS[0], NEW))
    assert (late.ids == 299).sum() == 2 * V and NEVER not in late.ids


@pytest.mark.parametrize("attempts", [25, pytest.param(1000, marks=pytest.mark.slow)])
def test_the_next_turn_works_after_any_interrupt(run_python: Callable[..., str], attempts: int) -> None:
    """Real SIGINTs at random moments of an answer: the conversation goes on, and its next answer is that of all its tokens."""
    printed = run_python(
        f"""
import os, signal, threading, time
import numpy as np
from monovl_jax.inference.generate import Generator
from monovl_jax.inference.prompts import Prompt
from monovl_jax.inference.session import Session
from tests.inference.helpers import CONTEXT, NEVER, PAD, prompt
from tests.model.helpers import REFERENCE, random_params, tiny_with

config = tiny_with("none")
made = Generator(config, random_params(config), REFERENCE, CONTEXT, [NEVER], PAD)
first, second = prompt(9, 0, 0), prompt(5, 0, 1)
for _ in range(3):
    began = time.perf_counter()
    warm = Session(made)
    warm(first, 24), warm(second, 4)
    took = time.perf_counter() - began
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in the background with SIGINT ignored
rng, stopped = np.random.default_rng(0), 0
for attempt in range({attempts}):
    session = Session(made)
    timer = threading.Timer(rng.uniform(0, took), os.kill, (os.getpid(), signal.SIGINT))
    try:
        timer.start()
        for _ in session.stream(first, 24):
            pass
        while True:  # the interrupt is still to come
            time.sleep(0.01)
    except KeyboardInterrupt:
        stopped += 1
    timer.join()
    past = session.tokens
    got = session(second, 4)
    (want,) = made([Prompt(np.concatenate([past, second.ids]).astype(np.int32))], 4, slots=64)
    assert np.array_equal(got, want), (attempt, past, got, want)
print(stopped)
"""
    )
    assert int(printed) == attempts


def test_a_caller_keeps_its_batch() -> None:
    from monovl_jax.inference.prompts import prompt_batch

    made = generator()
    batch = prompt_batch([prompt(6, 0, 0)], made.config.vision, made.context_id, 8)
    before = set(batch)
    made.read(batch, 6, 7, 16)
    assert set(batch) == before


def test_tokens_that_the_model_does_not_have_are_refused() -> None:
    bad = Prompt(np.array([1, CONFIG.decoder.vocab_size], np.int32))
    for ask in (lambda: generator()([bad], 2), lambda: Session(generator())(bad, 2)):
        with pytest.raises(ValueError, match=r"the token id 300, and the model has a vocabulary of 300"):
            ask()


def test_a_prompt_beyond_the_context_is_refused() -> None:
    long = Prompt(np.ones(CONFIG.decoder.max_position_embeddings + 1, np.int32))
    with pytest.raises(ValueError, match=r"has 513 tokens, and the model takes 512"):
        generator()([long], 2)
