"""Compiling quickly: tests of numbers need correct programs, not fast ones."""

import functools
from collections.abc import Callable

import jax

_jit = jax.jit  # tests put quick_jit in its place
FAST = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


@functools.cache
def compiler_options() -> dict[str, object]:
    """A fifth of XLA's compile time on the CPU; nothing where the options are unknown."""
    if jax.default_backend() != "cpu":
        return {}
    try:
        _jit(lambda x: x + 1, compiler_options=FAST)(0.0)
    except jax.errors.JaxRuntimeError:
        return {}
    return FAST


def quick_jit(f: Callable, **options: object) -> Callable:
    """jax.jit with the options above. A function jitted inside another is compiled by the outer one's options."""
    return _jit(f, compiler_options=compiler_options(), **options)
