"""Fingerprints of parameters, made where they lie: equal for equal bits, on whatever mesh, without a copy on the host.

Each word of a leaf (its bits, 32 at a time) is scrambled together with its place, and the results are summed modulo 2^32. Sums of integers
do not depend on their order, so neither does a fingerprint on how the leaf is divided over devices. Two such sums are kept. A change of
one word always shows; other damage is missed with a chance of about 2^-64. It is a guard against bad disks, not against people.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, UInt32

_SEEDS = (0x9E3779B9, 0x85EBCA6B)


def _scramble(x: jax.Array) -> jax.Array:
    """A bijection of uint32 that leaves no pattern of the input visible (the finaliser of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _words(x: jax.Array) -> jax.Array:
    """The bits of an array as uint32, of its shape (with one more axis for numbers of 64 bits)."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    bits = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, bits).astype(jnp.uint32)


def _sums(x: jax.Array) -> UInt32[Array, 2]:
    words = _words(x)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        stride = math.prod(words.shape[axis + 1 :]) % (1 << 32)
        place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride) if size > 1 else jnp.uint32(0)
    return jnp.stack([jnp.sum(_scramble(words ^ _scramble(place ^ jnp.uint32(seed))), dtype=jnp.uint32) for seed in _SEEDS])


@functools.cache
def _compiled(out: NamedSharding | None) -> Any:
    return jax.jit(_sums, out_shardings=out)


def paths(tree: Any) -> dict[str, Any]:
    """{path: leaf} of any tree of arrays (parameters, optimizer state), the keys joined with `/`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def kind(leaf: Any) -> str:
    """Dtype and shape in words: `float32[2,64,128]`."""
    return f"{jnp.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


def fingerprints(tree: Any) -> dict[str, str]:
    """{path: "float32[2,64,128] 0123456789abcdef"} of every leaf: dtype, shape and 64 bits over the contents.

    Leaves may be spread over the devices of several hosts; every process must call it, and gets the same.
    """
    sums = {}
    for path, leaf in paths(tree).items():
        sharding = getattr(leaf, "sharding", None)
        out = NamedSharding(sharding.mesh, P()) if isinstance(sharding, NamedSharding) else None
        sums[path] = kind(leaf), _compiled(out)(leaf)
    got = jax.device_get({path: value for path, (_, value) in sums.items()})
    return {path: f"{words} {got[path][0]:08x}{got[path][1]:08x}" for path, (words, _) in sums.items()}


def digest(marks: Mapping[str, str]) -> str:
    """One sha256 over the fingerprints of a tree."""
    return hashlib.sha256("".join(f"{path} {marks[path]}\n" for path in sorted(marks)).encode()).hexdigest()
