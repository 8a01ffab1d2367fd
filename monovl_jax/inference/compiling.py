"""How much of the waiting was compiling."""

from __future__ import annotations

import functools
import os
from pathlib import Path
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


CACHE_BYTES = 4 << 30
"""Most that the programs kept on disk take together; those not used for longest go first."""


def keep_programs() -> None:
    """Keeps compiled programs on disk for the next time: where JAX_COMPILATION_CACHE_DIR says, by default in the user's cache folder."""
    config: Any = jax.config
    if not config.jax_compilation_cache_dir:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        config.update("jax_compilation_cache_dir", str(Path(home) / "monovl_jax"))
        if "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:
            config.update("jax_compilation_cache_max_size", CACHE_BYTES)
        config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def kept_where() -> str:
    """For people: whether what was compiled is kept, and where."""
    folder = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    return f"kept in {folder} for the next time" if folder else "not kept for the next time (JAX_COMPILATION_CACHE_DIR names a folder)"


def compile_seconds() -> float:
    """Seconds that XLA has compiled (or loaded from its cache on disk) in this process since the first call, which gives 0."""
    return _meter()[0]
