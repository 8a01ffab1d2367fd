"""What the tests of the routed layers share: inputs, and how results compare."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
LAYERS = ("linear", "swiglu")


def masks(tokens: int) -> dict[str, np.ndarray]:
    """The expert of each token, in the ways that routing can be lopsided."""
    t = np.arange(tokens)
    named = {
        "random": np.random.default_rng(1).integers(-1, 2, tokens),
        "all_text": np.zeros(tokens),
        "all_visual": np.ones(tokens),
        "all_padding": np.full(tokens, -1),
        "alternating": t % 2,
        "one_visual_token": t == 41,
        "one_token_in_padding": np.where(t == tokens - 1, 1, -1),
        "image_first_then_padding": np.where(t < tokens // 2, 1, np.where(t < tokens - 9, 0, -1)),
    }
    return {name: mask.astype(np.int32) for name, mask in named.items()}


def make_inputs(kind: str, shape: tuple[int, int, int], dtype: str = "float32", seed: int = 0, bias: bool = True):
    """x, weights of both experts (float32, as masters are) and dy."""
    (t, d, f), rng = shape, np.random.default_rng(seed)

    def array(*shape: int) -> np.ndarray:
        return (rng.normal(size=shape) * shape[0] ** -0.5).astype(np.float32)

    one = (lambda: (array(d, f), array(f) if bias else None)) if kind == "linear" else (lambda: (array(d, f), array(d, f), array(f, d)))
    x, dy = (rng.normal(size=(t, width)).astype(jnp.dtype(dtype)) for width in (d, f if kind == "linear" else d))
    return x, (one(), one()), dy


def close(got: Any, want: Any, relative: float) -> None:
    """Every leaf to `relative` of its largest element."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=relative * max(1e-3, np.abs(b).max(initial=0)))


def same(got: Any, want: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, got, want)


def stack(*trees: Any) -> Any:
    return jax.tree.map(lambda *a: np.stack(a), *trees)
