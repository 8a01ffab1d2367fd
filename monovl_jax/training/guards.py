"""What watches a run: values far from the usual, a step or a worker that does not return, a batch that spoils the numbers."""

from __future__ import annotations

import contextlib
import io
import math
import socket
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from monovl_jax import jsontext
from monovl_jax.training.files import AnyPath, write_json

SPIKE_WINDOW, SPIKE_LEAST, SPIKE_WIDTH = 100, 20, 8.0
"""Values that a spike is compared with, the fewest to compare with, and how many typical deviations it lies above their median."""


_WAITING = ("threading.py", "queue.py", "selectors.py", "thread.py", "connection.py", "socketserver.py")
"""Files in which a thread stands that waits for another."""


class SpikeDetector:
    """Finds values far above the recent ones, by series: more than SPIKE_WIDTH typical deviations (1.48 x the median absolute one, and at
    least 2% of the median) above the median of the last SPIKE_WINDOW. A value that is not finite is a spike and no part of the window."""

    def __init__(self) -> None:
        self._seen: dict[str, deque[float]] = {}

    def __call__(self, values: Mapping[str, float]) -> dict[str, float]:
        """{series: value / median} of the series that spike; then the values are part of the window."""
        spikes = {}
        for name, value in values.items():
            seen = self._seen.setdefault(name, deque(maxlen=SPIKE_WINDOW))
            if not math.isfinite(value):
                continue
            if len(seen) >= SPIKE_LEAST:
                median = statistics.median(seen)
                usual = max(1.48 * statistics.median(abs(x - median) for x in seen), 0.02 * abs(median))
                if value > median + SPIKE_WIDTH * usual:
                    spikes[name] = round(value / median, 3) if median > 0 else math.inf
            seen.append(value)
        return spikes


def save_batch(folder: AnyPath, name: str, parts: Sequence[Mapping[str, Any]]) -> AnyPath:
    """Writes this process's rows of a placed batch as `<name>.npz` with arrays `0.tokens`, `0.tiles`, ... ; returns the file.

    With several processes each writes its own, `<name>.process_<n>.npz`.
    """

    def rows(value: Any) -> np.ndarray:
        if not isinstance(value, jax.Array) or value.is_fully_addressable:
            return np.asarray(value)
        pieces = {str(shard.index): shard for shard in value.addressable_shards}.values()
        axis = next((n for n, cut in enumerate(value.sharding.shard_shape(value.shape)) if cut != value.shape[n]), 0)
        return np.concatenate([np.asarray(p.data) for p in sorted(pieces, key=lambda p: p.index[axis].start or 0)], axis=axis)

    folder.mkdir(parents=True, exist_ok=True)
    own = f".process_{jax.process_index()}" if jax.process_count() > 1 else ""
    path, data = folder / f"{name}{own}.npz", io.BytesIO()
    arrays: dict[str, Any] = {f"{number}.{key}": rows(value) for number, part in enumerate(parts) for key, value in part.items()}
    np.savez(data, **arrays)
    path.write_bytes(data.getvalue())
    return path


class Watchdog:
    """Says by name what a run waits for when it waits too long.

    The training thread tells what it does (`doing`). When one thing takes longer than `limit` seconds, a thread says which, at which step,
    in which process on which host, and for data also what its workers do. With several processes each leaves its state in
    `heartbeats/<process>.json`; process 0 reads them and names those that keep the others waiting.
    """

    def __init__(
        self,
        folder: AnyPath,
        say: Callable[[str], None],
        limit: float,
        index: int = 0,
        count: int = 1,
    ):
        self._folder, self._say, self._limit = folder / "heartbeats", say, limit
        self._index, self._count = index, count
        self._state: dict[str, Any] = {"process": index, "host": socket.gethostname(), "stage": "", "step": 0, "doing": "starting"}
        self._since, self._told, self._stop = time.monotonic(), False, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="monovl-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._count > 1:
            self._folder.mkdir(parents=True, exist_ok=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    @contextlib.contextmanager
    def doing(self, what: str, stage: str = "", step: int = 0) -> Iterator[None]:
        """`data` (waiting for a batch), `step` (waiting for the device, and so for every other host), `save` or `evaluation`."""
        before = self._state
        self._state = before | {"stage": stage, "step": step, "doing": what}
        self._since, self._told = time.monotonic(), False
        try:
            yield
        finally:
            self._state = before | {"stage": stage, "step": step, "doing": "between steps"}
            self._since, self._told = time.monotonic(), False

    def _watch(self) -> None:
        while not self._stop.wait(min(10.0, self._limit / 4)):
            state, waited = self._state, time.monotonic() - self._since
            if self._count > 1:
                with contextlib.suppress(OSError):
                    write_json(self._folder / f"{self._index}.json", state | {"waited": waited, "time": time.time()})
            if waited > self._limit and not self._told:
                self._told = True
                self._say(self.report(state, waited))

    def report(self, state: Mapping[str, Any], waited: float) -> str:
        """The sentence about a wait."""
        where = f"stage {state['stage']!r}, step {state['step']}" if state["stage"] else "before the first step"
        text = f"stalled: process {state['process']} on {state['host']}, {where}: {state['doing']} for {waited:.0f} s"
        if state["doing"] == "data":
            text += self._stands()
        if state["doing"] == "step" and self._count > 1 and self._index == 0 and (others := self._behind()):
            text += f"; waiting for {', '.join(others)}"
        return text

    def _stands(self) -> str:
        """Which threads are at work on the data and where, by name, function, file and line; threads that wait for others are left out."""
        alive = {thread.ident: thread.name for thread in threading.enumerate()}
        own = (threading.main_thread().ident, self._thread.ident)
        stands = []
        for ident, frame in sys._current_frames().items():
            last = traceback.extract_stack(frame)[-1]
            if ident not in own and ident in alive and not last.filename.endswith(_WAITING):
                stands.append(f"{alive[ident]} in {last.name} ({last.filename}:{last.lineno})")
        return f"; at work: {', '.join(sorted(stands)[:4])}" if stands else "; no thread is at work on it"

    def _behind(self) -> list[str]:
        """The processes that do something else than wait for the step, or have not been heard of, as words."""
        found = []
        for index in range(1, self._count):
            try:
                state = jsontext.read(self._folder / f"{index}.json")
                silent = time.time() - state["time"]
            except (OSError, ValueError, KeyError):
                found.append(f"process {index} (never heard of)")
                continue
            if silent > max(30.0, self._limit):
                found.append(f"process {index} on {state['host']} (silent for {silent:.0f} s, last at step {state['step']})")
            elif state["doing"] != "step":
                found.append(f"process {index} on {state['host']} ({state['doing']}, step {state['step']}, for {state['waited']:.0f} s)")
        return found
