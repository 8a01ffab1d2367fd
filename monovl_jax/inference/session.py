"""A conversation that keeps what it has read: each turn prefills only what is new, and the answer arrives as it is made."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Generator as Stream
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from monovl_jax.inference.generate import Generator, State
from monovl_jax.inference.prompts import Prompt, bucket, prompt_batch, slots_for
from monovl_jax.inference.sampling import GREEDY, Sampling
from monovl_jax.model import KVCache

_stack = jax.jit(KVCache.stacked)
_resize = jax.jit(KVCache.resized, static_argnames="slots")

SOON = 0.05
"""Seconds that a step of streaming aims at: the device makes one token, then twice as many at a time until a step takes so long."""


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds a Ctrl-C back until the end of the block. For what must happen whole: buffers that one call uses up and the next one needs."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    held: list[tuple[Any, ...]] = []
    signal.signal(signal.SIGINT, lambda *arguments: held.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held:
            before(*held[0])


class ContextFull(ValueError):
    """The conversation leaves no room for another answer."""


class Session:
    """One conversation of token ids. What it answers equals what the whole conversation gives at once, but the past is not read again.

    Images may come in any turn; their tokens go to the visual experts also where a cache exists (upstream: to the text experts).

    Args:
      context: most tokens of the whole conversation, by default the model's `max_position_embeddings`. Within those, dynamic NTK does not
        stretch the rotary base, so that keys in the cache stay right.
      as_upstream: send every token that comes after a cache exists to the text experts, for comparisons with upstream.
    """

    def __init__(self, generator: Generator, context: int | None = None, as_upstream: bool = False):
        self.generator, self.as_upstream = generator, as_upstream
        self.context = context or generator.config.decoder.max_position_embeddings
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self._cache: KVCache | None = None
        self._pending = np.zeros(0, np.int32)  # made, but in no cache yet
        self.tokens = np.zeros(0, np.int32)
        """All ids so far, prompts and answers; stop tokens are left out."""

    @property
    def room(self) -> int:
        """How many more tokens the context takes."""
        return self.context - len(self.tokens)

    def __call__(self, turn: Prompt, max_new_tokens: int, sampling: Sampling = GREEDY, draw: int = 0) -> np.ndarray:
        """The whole answer at once: int32[n] ids without the stop token."""
        return np.concatenate([np.zeros(0, np.int32), *self.stream(turn, max_new_tokens, sampling, draw)])

    def stream(self, turn: Prompt, max_new_tokens: int, sampling: Sampling = GREEDY, draw: int = 0) -> Stream[np.ndarray]:
        """Ids of the answer as they are made, int32[n] at a time, without the stop token.

        The answer ends early where the context does. Leaving the iterator keeps what was made so far in the conversation.

        Args:
          turn: what follows the conversation so far, with the tiles of its own images.
          draw: together with the seed, decides over random draws.

        Raises ContextFull when the turn leaves no room for a token, ValueError as `prompt_batch` does.
        """
        generator, past = self.generator, len(self.tokens)
        new = min(max_new_tokens, self.room - len(turn.ids))
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; ask for at least one token")
        if new < 1:
            raise ContextFull(
                f"the conversation has {past} tokens and the new turn {len(turn.ids)}, which leaves none of the context of {self.context} "
                "for an answer; reset the conversation, shorten the turn or take smaller images"
            )
        read, columns = past - len(self._pending), bucket(max_new_tokens, 8)
        prompt = Prompt(np.concatenate([self._pending, turn.ids]).astype(np.int32), turn.tiles)
        slots = slots_for(len(prompt.ids), generator.piece)
        batch = self._batch(prompt, slots, read)
        cache = self._with_room(read + slots + columns)
        rules, length = generator.rules(sampling, [draw]), past + len(turn.ids)
        logits, cache = generator.read(batch, length, len(prompt.ids) - 1, bucket(slots + columns, 128), cache)
        with uninterrupted():
            self._cache, self._pending = cache, prompt.ids[:0]
            self.tokens = np.concatenate([self.tokens, turn.ids]).astype(np.int32)
        state = generator.begin(logits, cache, np.array([length]), rules, columns)
        told, width = 0, 1
        try:
            while True:
                made, stopped = self._made(state)
                if len(made) > told:
                    yield made[told:]
                    told = len(made)
                if stopped or told >= new:
                    return
                began = time.perf_counter()
                with uninterrupted():  # decode uses the old state up
                    state = generator.decode(state, rules, min(told + width, new))
                jax.block_until_ready(state.step)
                took = time.perf_counter() - began
                width = width * 2 if took < SOON / 2 else max(1, width // 2) if took > SOON else width
        finally:
            with uninterrupted():
                made, stopped = self._made(state)
                self._cache, self._pending = state.cache, made[:0] if stopped else made[-1:]
                self.tokens = np.concatenate([self.tokens, made])

    def _made(self, state: State) -> tuple[np.ndarray, bool]:
        """Ids made so far, without the stop token, and whether that has come."""
        ids, step, done = jax.device_get((state.ids[0], state.step, state.done[0]))
        return self.generator.until_stop(ids[: int(step)]), bool(done)

    def _batch(self, prompt: Prompt, slots: int, start: int) -> dict[str, np.ndarray]:
        """One row, padded on the right, at positions from `start` on."""
        generator, n = self.generator, len(prompt.ids)
        batch = prompt_batch([prompt], generator.config.vision, generator.context_id, n)
        back = [(0, 0), (0, slots - n)]
        empty = {"token_types": -1, "visual_index": -1, "positions": 1}
        batch["positions"] += np.float32(start)
        for name in ("tokens", "token_types", "positions", "segment_ids", "visual_index"):
            if name in batch:
                batch[name] = np.pad(batch[name], back, constant_values=empty.get(name, 0))
        if self.as_upstream and start:
            del batch["token_types"]
        return batch

    def _with_room(self, slots: int) -> KVCache | None:
        """The cache with at least so many slots: it grows to twice its size, so that few shapes are compiled."""
        if self._cache is None:
            return None
        cache, have = _stack(self._cache), self._cache.segments.shape[1]
        return cache if have >= slots else _resize(cache, slots=bucket(max(slots, 2 * have), 128))
