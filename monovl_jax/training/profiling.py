"""A trace of some steps, for TensorBoard's profiler or xprof."""

from __future__ import annotations

import jax

from monovl_jax.training.files import AnyPath
from monovl_jax.training.metrics import RunLog


def parse_profile(text: str) -> tuple[int, int]:
    """(first step, how many) of `START:STEPS`. Raises ValueError for anything else."""
    start, _, steps = text.partition(":")
    if not (start.isdecimal() and steps.isdecimal() and int(start) >= 1 and int(steps) >= 1):
        raise ValueError(f"--profile {text} is not START:STEPS, the first step to trace (from 1) and how many, as in --profile 20:3")
    return int(start), int(steps)


class Profiler:
    """Traces (first, how many) steps of the first stage of this process that has them; nothing for None. A run continued beyond the first
    traces from where it goes on."""

    def __init__(self, folder: AnyPath, steps: tuple[int, int] | None):
        self._folder, self._steps = folder, steps
        self._until: int | None = None

    def before(self, step: int, log: RunLog | None) -> None:
        """Call it before a step is dispatched."""
        if self._steps is not None and self._until is None and step >= self._steps[0]:
            self._until = step + self._steps[1] - 1
            self._steps = None
            jax.profiler.start_trace(str(self._folder))
            if log is not None:
                log.event(f"tracing steps {step} to {self._until} into {self._folder}")

    def last(self, step: int) -> bool:
        """Whether the trace ends with this step; then wait for it, and `stop`."""
        return self._until is not None and step >= self._until

    def stop(self, log: RunLog | None) -> None:
        """Writes the trace, if one is being made."""
        if self._until is None:
            return
        self._until = None
        jax.profiler.stop_trace()
        if log is not None:
            log.event(f"the trace is in {self._folder}; look at it with `tensorboard --logdir {self._folder}` (plugin: xprof)")
