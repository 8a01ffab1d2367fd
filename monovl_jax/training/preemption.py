"""SIGTERM: save, stop, and let the scheduler start the run again.

A scheduler that takes a machine away sends SIGTERM some seconds before. With one process the next step sees it. With several,
`multihost_utils.reached_preemption_sync_point` makes all of them stop at the same step, whichever got the signal: jax's own service
listens for it then, and no handler of ours is put in its way.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 143
"""128 + SIGTERM: what a process that died of it would return, on which schedulers restart a job."""


class PreemptedError(RuntimeError):
    """The run was asked to stop (SIGTERM), has saved, and goes on when it is started again."""


class Preemption:
    """Listens while it is entered. Only the main thread of a process can; elsewhere it hears nothing."""

    def __init__(self) -> None:
        self._asked = self._at_once = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[Preemption]:
        if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = signal.signal(signal.SIGTERM, self._hear)
        try:
            yield self
        finally:
            signal.signal(signal.SIGTERM, before)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if self._at_once:
            raise PreemptedError("stopped by SIGTERM while nothing had to be saved; start the same command again to go on")

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Everything is on disk in this block: a signal ends it where it is (one process), and one heard before does not let it begin."""
        if self._asked:
            self._hear(signal.SIGTERM, None)
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def reached(self, step: int) -> bool:
        """Whether to save and stop after this step, the same in all processes. Call it after every step, counting from their start."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked
