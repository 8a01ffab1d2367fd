"""How much of the waiting was compiling."""

from __future__ import annotations

import functools
from typing import Any

import jax


@functools.cache
def _meter() -> list[float]:
    seconds = [0.0]

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds[0] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    return seconds


def compile_seconds() -> float:
    """Seconds that XLA has compiled (or loaded from its cache on disk) in this process since the first call, which gives 0."""
    return _meter()[0]
