"""Sources -> mixture -> shuffle -> packs -> batches, addressable by one integer.

    draws    0 1 2 3 4 5 6 7 | 8 9 ...         every draw is (source, index): shares by weight, order by seed
    window   `window` draws, shuffled, planned into rows by first fit over lengths alone, rows shuffled
    rows     r0 r1 r2 | r3 r4 ...              row numbers run on over the windows
    batch n  rows n * B ... n * B + B - 1, of which each process takes its own part

A batch is a pure function of (sources, seed, n): threads, worker processes and prefetch change nothing, and a run resumes from
n. Where a window begins depends on all windows before it: `Pipeline.state` says where the window of batch n begins, and after
`Pipeline.restore` planning goes on there. Without it the windows before are planned again (lengths only).
"""

from __future__ import annotations

import bisect
import hashlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from monovl_jax.data.packing import Example, PackSpec, fill_row, plan_packs
from monovl_jax.data.sources import Source, source_lengths

Batch = dict[str, np.ndarray]
"""The fields of design section 5, [B, ...]."""

_ENDLESS = 1 << 40
_AHEAD = 16
"""Windows planned beyond the last one asked for, where there are threads."""
_KEPT_WINDOWS = 64
"""Plans that are kept: enough for those ahead and for the batches that threads make at the same time."""
_KEPT_STARTS = 1 << 14
"""Starts of windows that are kept; going back before them plans from the first window on."""


@dataclass(frozen=True)
class Part:
    """One source of a mixture and its share of the samples (weights need not add up to 1)."""

    source: Source
    weight: float = 1.0
    name: str = ""


@dataclass
class PackStats:
    """Sums over batches. failed: samples whose picture was lost when decoding; too_large: samples that fit no row."""

    rows: int = 0
    samples: int = 0
    tokens: int = 0
    token_slots: int = 0
    tiles: int = 0
    tile_slots: int = 0
    supervised: int = 0
    failed: int = 0
    too_large: int = 0

    def __iadd__(self, other: PackStats) -> PackStats:
        for entry in fields(self):
            setattr(self, entry.name, getattr(self, entry.name) + getattr(other, entry.name))
        return self

    @property
    def token_efficiency(self) -> float:
        """Share of the token slots that hold a token (1 if there are none)."""
        return self.tokens / self.token_slots if self.token_slots else 1.0

    @property
    def tile_efficiency(self) -> float:
        """Share of the tile slots that hold a tile (1 if there are none)."""
        return self.tiles / self.tile_slots if self.tile_slots else 1.0


def shuffled_indices(draws: np.ndarray, length: int, seed: Sequence[int]) -> np.ndarray:
    """int64[n]: the places of `draws` (int64[n], each below length) in a permutation of 0 .. length - 1 that depends on seed.

    A Feistel network on the smallest even number of bits, walked until it lands inside: no table, whatever the length.
    """
    half = max(1, ((length - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = np.random.SeedSequence(list(seed)).generate_state(6, np.uint64)

    def permute(values: np.ndarray) -> np.ndarray:
        left, right = values >> np.uint64(half), values & mask
        for key in keys:
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(32))) & mask)
        return (left << np.uint64(half)) | right

    values = permute(np.asarray(draws, np.uint64))
    outside = np.flatnonzero(values >= length)
    while len(outside):
        values[outside] = permute(values[outside])
        outside = outside[values[outside] >= length]
    return values.astype(np.int64)


@dataclass(frozen=True)
class _Window:
    """rows: per row int64[n, 2] of (part, index). first: number of the first row. too_large: draws that fit no row."""

    rows: list[np.ndarray]
    first: int
    too_large: int


@dataclass(frozen=True, slots=True)
class _Start:
    """Where a window begins: the number of its first row, and the draws of each part before it."""

    row: int
    drawn: tuple[int, ...]


@dataclass
class _Planner:
    """Which samples are in row r. Windows are planned in order; only where they begin and the last plans are kept.

    ahead: windows that a thread plans beyond the last one asked for (0: no thread).
    """

    parts: Sequence[Part]
    spec: PackSpec
    seed: int
    window: int
    strict: bool
    ahead: int = 0
    _base: int = 0  # number of the window that _starts[0] tells of
    _starts: list[_Start] = field(default_factory=list)  # the last one is of the first window that has not been planned
    _kept: dict[int, _Window] = field(default_factory=dict)
    _asked: int = 0  # the last window that a row was asked of
    _busy: bool = False  # whether the thread runs
    _planning: Any = field(default_factory=threading.Lock)  # held while a window is planned
    _lock: Any = field(default_factory=threading.Lock)  # held for an instant

    def __post_init__(self) -> None:
        weights = np.asarray([part.weight for part in self.parts], np.float64)
        self._shares = weights / weights.sum()
        self._lengths = [len(part.source) for part in self.parts]
        self._begin_at(0, _Start(0, (0,) * len(self.parts)))

    def _begin_at(self, window: int, start: _Start) -> None:
        with self._lock:
            self._base, self._starts, self._asked = window, [start], window
            self._kept.clear()

    def row(self, number: int) -> tuple[np.ndarray, int]:
        """(int64[n, 2] of (part, index), samples refused just before this row)."""
        window = self._planned(number)
        while window is None:
            with self._planning:
                if self._planned(number) is None:
                    self._plan(self._window_of(number))
            window = self._planned(number)
        if self.ahead:
            self._plan_ahead()
        place = number - window.first
        return window.rows[place], window.too_large if place == 0 else 0

    def state(self, number: int) -> dict[str, Any]:
        """Where the window of row `number` begins, in JSON values. Plans as far as needed."""
        while True:
            with self._lock:
                if self._starts[0].row <= number <= self._starts[-1].row:
                    at = self._place_of(number)
                    start = self._starts[at]
                    return {"window": self._base + at, "row": start.row, "drawn": list(start.drawn), "of": self.identity()}
            with self._planning:
                self._plan(self._window_of(number))

    def restore(self, state: Any) -> bool:
        """Goes on where `state` says; False, and nothing changes, when it is of other sources or settings, or not a state."""
        if not isinstance(state, dict) or state.get("of") != self.identity():
            return False
        window: Any
        row: Any
        window, row, drawn = state.get("window"), state.get("row"), state.get("drawn")
        if not isinstance(drawn, list) or len(drawn) != len(self.parts):
            return False
        if any(type(value) is not int or not 0 <= value < _ENDLESS for value in (window, row, *drawn)):
            return False
        if sum(drawn) != window * self.window:
            return False
        with self._planning:
            self._begin_at(window, _Start(row, tuple(drawn)))
        return True

    def identity(self) -> str:
        """Changes with what a state depends on: the sizes and shares of the sources, the seed, and the shape of rows and windows."""
        shape = [self.seed, self.window, self.spec.tokens, self.spec.tiles]
        shares = [[length, float(share)] for length, share in zip(self._lengths, self._shares, strict=True)]
        return hashlib.sha256(json.dumps([shape, shares]).encode()).hexdigest()[:16]

    def _place_of(self, number: int) -> int:
        return bisect.bisect_right(self._starts, number, key=lambda start: start.row) - 1

    def _planned(self, number: int) -> _Window | None:
        with self._lock:
            if not self._starts[0].row <= number < self._starts[-1].row:
                return None
            at = self._base + self._place_of(number)
            self._asked = max(self._asked, at)
            return self._kept.get(at)

    def _window_of(self, number: int) -> int:
        """The window to plan next on the way to row `number`: its own, or the first one that has not been planned."""
        with self._lock:
            before = number < self._starts[0].row
        if before:
            self._begin_at(0, _Start(0, (0,) * len(self.parts)))
        with self._lock:
            return self._base + self._place_of(number) if number < self._starts[-1].row else self._base + len(self._starts) - 1

    def _plan_ahead(self) -> None:
        with self._lock:
            if self._busy or self._base + len(self._starts) - 1 > self._asked + self.ahead:
                return
            self._busy = True
        threading.Thread(target=self._work, name="monovl-planner", daemon=True).start()

    def _work(self) -> None:
        try:
            while True:
                with self._planning:
                    with self._lock:
                        at = self._base + len(self._starts) - 1
                        if at > self._asked + self.ahead:
                            return
                    self._plan(at)
        except Exception:
            self.ahead = 0  # whoever asks for that window meets the same error
        finally:
            with self._lock:
                self._busy = False

    def _plan(self, at: int) -> None:
        """Plans a window whose start is known. The caller holds `_planning`."""
        start = self._starts[at - self._base]
        draws, counts = self._draws(at, np.asarray(start.drawn, np.int64))
        lengths = np.empty((self.window, 2), np.int64)
        for part in range(len(self.parts)):
            mine = draws[:, 0] == part
            if mine.any():
                lengths[mine] = source_lengths(self.parts[part].source, draws[mine, 1])
        self._check(draws, lengths)
        rows = [draws[row] for row in plan_packs(lengths, self.spec)]
        if not rows:
            limits = f"{self.spec.tokens} tokens and {self.spec.tiles} tiles"
            raise ValueError(f"none of {self.window} samples fits a row of {limits}; raise the limits of the rows.")
        order = np.random.default_rng([self.seed, 2, at]).permutation(len(rows))
        window = _Window([rows[i] for i in order], start.row, self.window - sum(map(len, rows)))
        with self._lock:
            if at == self._base + len(self._starts) - 1:
                drawn = tuple(before + more for before, more in zip(start.drawn, counts.tolist(), strict=True))
                self._starts.append(_Start(window.first + len(rows), drawn))
                if len(self._starts) > _KEPT_STARTS:
                    del self._starts[0]
                    self._base += 1
            self._kept[at] = window
            while len(self._kept) > _KEPT_WINDOWS:
                del self._kept[next(iter(self._kept))]  # the one planned longest ago

    def _draws(self, at: int, before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(int64[window, 2] of (part, index), int64[parts] draws of each): shares kept to within one sample over all windows so far."""
        ideal = (at + 1) * self.window * self._shares - before
        counts = np.maximum(np.floor(ideal).astype(np.int64), 0)
        behind = np.argsort(-(ideal - counts), kind="stable")
        counts[behind[: self.window - counts.sum()]] += 1
        parts = np.repeat(np.arange(len(self.parts)), counts)
        indices = np.concatenate([self._indices(p, int(before[p]), int(counts[p])) for p in range(len(self.parts))])
        order = np.random.default_rng([self.seed, 1, at]).permutation(self.window)
        return np.stack([parts, indices], axis=1)[order], counts

    def _indices(self, part: int, start: int, count: int) -> np.ndarray:
        """Draws start .. start + count - 1 of one source: epoch after epoch, each in its own order."""
        length, pieces = self._lengths[part], []
        while count:
            epoch, place = divmod(start, length)
            here = min(count, length - place)
            pieces.append(shuffled_indices(np.arange(place, place + here), length, (self.seed, 0, part, epoch)))
            start, count = start + here, count - here
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def _check(self, draws: np.ndarray, lengths: np.ndarray) -> None:
        if not self.strict:
            return
        for (part, index), (tokens, tiles) in zip(draws.tolist(), lengths.tolist(), strict=True):
            if not self.spec.fits(tokens, tiles):
                name = self.parts[part].name or f"number {part}"
                raise ValueError(
                    f"sample {index} of source {name} needs {tokens} tokens and {tiles} tiles, a row has {self.spec.tokens} and "
                    f"{self.spec.tiles}; raise the limits of the rows or cut the sample."
                )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "_planning": None, "_busy": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock, self._planning = threading.Lock(), threading.Lock()


class Pipeline:
    """Endless batches of packed rows from a mixture of sources.

    rows: B, rows of the global batch. process_index, process_count: this process gets rows B / count * index onwards.
    window: draws that are planned together (larger packs better). threads, workers: decode threads and processes (0 and 0:
    everything in the caller). prefetch: batches made ahead. strict: a sample too large for a row raises instead of being
    left out.
    Raises ValueError for an empty source, weights that are not positive, or rows that the processes cannot share evenly.
    """

    def __init__(
        self,
        parts: Sequence[Part | Source],
        spec: PackSpec,
        rows: int,
        seed: int,
        *,
        process_index: int = 0,
        process_count: int = 1,
        window: int = 2048,
        threads: int = 1,
        workers: int = 0,
        prefetch: int = 4,
        strict: bool = False,
    ) -> None:
        self.parts = [part if isinstance(part, Part) else Part(part) for part in parts]
        self.spec, self.rows, self.seed, self.window, self.strict = spec, rows, seed, window, strict
        self.process_index, self.process_count = process_index, process_count
        self.threads, self.workers, self.prefetch = threads, workers, prefetch
        self._validate()
        self._planner = _Planner(self.parts, spec, seed, window, strict, _AHEAD if threads or workers else 0)
        self._batches = _BatchSource(self._planner, rows, process_index, process_count)

    def _validate(self) -> None:
        if not self.parts:
            raise ValueError("the mixture has no source; give at least one.")
        for number, part in enumerate(self.parts):
            name = part.name or f"number {number}"
            if not 0 < part.weight < float("inf"):
                raise ValueError(f"source {name} has weight {part.weight}; give a positive number or leave the source out.")
            if len(part.source) < 1:
                raise ValueError(f"source {name} has no (good) sample; look at bad_samples.jsonl or leave the source out.")
        if not 0 <= self.process_index < self.process_count:
            raise ValueError(f"process {self.process_index} of {self.process_count} does not exist; count from 0.")
        if self.rows < 1 or self.rows % self.process_count:
            raise ValueError(f"{self.rows} rows cannot be shared by {self.process_count} processes; use a multiple.")
        if self.window < 1:
            raise ValueError(f"a window of {self.window} draws is empty; give at least 1.")

    def batch(self, number: int) -> Batch:
        """Batch `number`, made here and now: a dict of arrays [B / process_count, ...] as in design section 5."""
        return self._batches[number][0]

    def batches(self, start: int = 0) -> BatchIterator:
        """An endless iterator over batches start, start + 1, ...: the same as those of an uninterrupted run."""
        if start < 0:
            raise ValueError(f"batch {start} does not exist; count from 0.")
        return BatchIterator(self._iterate(start), start)

    def state(self, number: int) -> dict[str, Any]:
        """What lets another pipeline of the same sources and settings begin at batch `number` at once, on any number of processes.

        JSON values: window, row (the first of that window), drawn (draws of each part before it), of (what it belongs to).
        """
        return self._planner.state(number * self.rows)

    def restore(self, state: Any) -> bool:
        """Takes over what `state` returned; call it before `batches`. False for a state of other sources or settings: nothing changes."""
        return self._planner.restore(state)

    def _iterate(self, start: int) -> Iterator[tuple[Batch, PackStats]]:
        if self.threads == 0 and self.workers == 0:
            return (self._batches[number] for number in range(start, _ENDLESS))
        import grain

        dataset = grain.MapDataset.source(_From(self._batches, start))
        options = grain.ReadOptions(num_threads=max(1, self.threads), prefetch_buffer_size=max(1, self.prefetch, self.threads))
        batches = dataset.to_iter_dataset(options)
        if self.workers:
            from absl import flags

            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # grain's worker processes read absl flags, which only absl programs parse
            # One element is one whole batch, so that the number of workers cannot change what is in it.
            ahead = max(1, self.prefetch // self.workers)
            batches = batches.mp_prefetch(grain.multiprocessing.MultiprocessingOptions(self.workers, ahead))
        return iter(batches)


class BatchIterator:
    """Iterates over batches and keeps account.

    index: number of the next batch. wait_seconds: time spent waiting in `next` so far.
    stats: sums over the batches handed out (packing efficiency, failed pictures, samples too large).
    """

    def __init__(self, iterator: Iterator[tuple[Batch, PackStats]], start: int) -> None:
        self._iterator, self.index = iterator, start
        self.wait_seconds, self.stats = 0.0, PackStats()

    def __iter__(self) -> BatchIterator:
        return self

    def __next__(self) -> Batch:
        begin = time.perf_counter()
        batch, stats = next(self._iterator)
        self.wait_seconds += time.perf_counter() - begin
        self.index += 1
        self.stats += stats
        return batch

    def close(self) -> None:
        """Stops the threads and processes behind the iterator."""
        close = getattr(self._iterator, "close", None)
        if close is not None:
            close()

    def __enter__(self) -> BatchIterator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class _BatchSource:
    """Random access to (batch, stats)."""

    planner: _Planner
    rows: int
    process_index: int
    process_count: int

    def __getitem__(self, number: int) -> tuple[Batch, PackStats]:
        local = self.rows // self.process_count
        first = int(number) * self.rows + self.process_index * local
        spec = self.planner.spec
        planned = [self.planner.row(first + i) for i in range(local)]
        examples = [[self.planner.parts[part].source[index] for part, index in row.tolist()] for row, _ in planned]
        batch, stats = assemble(examples, spec, local)
        stats.too_large = sum(refused for _, refused in planned)
        return batch, stats


@dataclass
class _From:
    """A grain data source: the batches from `start` on."""

    batches: _BatchSource
    start: int

    def __len__(self) -> int:
        return _ENDLESS - self.start

    def __getitem__(self, index: int) -> tuple[Batch, PackStats]:
        return self.batches[self.start + int(index)]


def assemble(rows: Sequence[Sequence[Example]], spec: PackSpec, count: int) -> tuple[Batch, PackStats]:
    """A batch of `count` rows from the examples of each (missing rows are padding), and its statistics."""
    batch = spec.empty_rows(count)
    for number, examples in enumerate(rows):
        fill_row(examples, spec, batch, number)
    every = [example for examples in rows for example in examples]
    stats = PackStats(
        rows=count,
        samples=len(every),
        tokens=sum(len(example.ids) for example in every),
        token_slots=count * spec.tokens,
        tiles=sum(len(example.tiles) for example in every),
        tile_slots=count * spec.tiles,
        supervised=int(np.count_nonzero(batch["loss_weights"])),
        failed=sum(example.failed for example in every),
    )
    return batch, stats


def one_pass(source: Source, spec: PackSpec, rows: int) -> Iterator[Batch]:
    """Every sample of a source once, in packed batches of `rows` rows, for evaluation; the last batch may have padding rows.

    Raises ValueError if a sample fits no row: a score over a part of the data would mislead.
    """
    lengths = source_lengths(source, np.arange(len(source)))
    for index, (tokens, tiles) in enumerate(lengths.tolist()):
        if not spec.fits(tokens, tiles):
            need, have = f"{tokens} tokens and {tiles} tiles", f"{spec.tokens} and {spec.tiles}"
            raise ValueError(f"sample {index} needs {need}, a row has {have}; raise the limits of the rows.")
    packs = plan_packs(lengths, spec)
    for first in range(0, len(packs), rows):
        examples = [[source[int(index)] for index in pack] for pack in packs[first : first + rows]]
        yield assemble(examples, spec, rows)[0]
