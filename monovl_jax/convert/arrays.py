"""Bit-exact work on large arrays: fast transposed copies, the search for NaN, casts."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from monovl_jax.convert.errors import WeightsError

FLOATS: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
"""Element types a weight may be stored in, by their safetensors name."""

STORED = {dtype.name: dtype for code, dtype in FLOATS.items() if code != "F64"}
"""Element types of our leaves and of exported tensors, by name: float32, float16, bfloat16. JAX has no float64 by default."""

_TILE = 128
_BLOCK = 1 << 19


def stored_dtype(name: str | np.dtype | type | None) -> np.dtype | None:
    """The element type of a name (`bfloat16`), or None for None. Raises WeightsError for one that weights are not stored in."""
    if name is None:
        return None
    try:
        known = np.dtype(STORED.get(name, name) if isinstance(name, str) else name)
    except TypeError:
        known = None
    if known not in STORED.values():
        raise WeightsError(f"dtype {name!r} cannot hold weights; use {', '.join(STORED)}")
    return known


def bits(array: np.ndarray) -> np.ndarray:
    """The same memory as unsigned integers: numpy copies and compares those several times faster than bfloat16."""
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))


def copy_into(out: np.ndarray, array: np.ndarray) -> None:
    """out[...] = array for equal shapes and dtypes, bit by bit; a transposed `array` is read in tiles that fit the cache.

    numpy's own assignment walks a transposed matrix row by row, about five times slower for two-byte elements.
    """
    if array.ndim < 2 or array.flags.c_contiguous:
        bits(out)[...] = bits(array)
        return
    target, source = bits(out), bits(array)
    if array.ndim > 2 and out.flags.c_contiguous:  # the trailing axes as one, where that is a view
        target, source = target.reshape(len(target), -1), source.reshape(len(source), -1)
    for i in range(0, source.shape[0], _TILE):
        for j in range(0, source.shape[1], _TILE):
            target[i : i + _TILE, j : j + _TILE] = source[i : i + _TILE, j : j + _TILE]


def contiguous(array: np.ndarray) -> np.ndarray:
    """The array itself when it lies in order, or else a copy that does."""
    if array.flags.c_contiguous:
        return array
    out = np.empty(array.shape, array.dtype)
    copy_into(out, array)
    return out


def all_finite(array: np.ndarray) -> bool:
    """Whether no element of a float array is NaN or infinite: no exponent has all its bits set. Reads each byte once."""
    flat = bits(np.ascontiguousarray(array)).reshape(-1)
    exponent = bits(np.array([np.inf], array.dtype))[0]
    masked = np.empty(min(_BLOCK, flat.size), flat.dtype)
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        np.bitwise_and(block, exponent, out=masked[: block.size])
        if masked[: block.size].max() == exponent:
            return False
    return True


def cast(array: np.ndarray, dtype: np.dtype | None, where: str) -> np.ndarray:
    """The array in `dtype` (its own when None), checked to be finite. Raises WeightsError that starts with `where`."""
    if not all_finite(array):
        raise WeightsError(f"{where} holds NaN or infinite values; the weights are damaged, or the run that wrote them diverged")
    if dtype is None or dtype == array.dtype:
        return array
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if not all_finite(result):
        raise WeightsError(f"{where} holds values too large for {dtype.name}; convert to bfloat16 or float32")
    return result
