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
    return jax.jit(lambda leaves: jnp.stack([_sums(leaf) for leaf in leaves]), out_shardings=out)


def paths(tree: Any) -> dict[str, Any]:
    """{path: leaf} of any tree of arrays (parameters, optimizer state), the keys joined with `/`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def kind(leaf: Any) -> str:
    """Dtype and shape in words: `float32[2,64,128]`."""
    return f"{jnp.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


def fingerprints(tree: Any) -> dict[str, str]:
    """{path: "float32[2,64,128] 0123456789abcdef"} of every leaf: dtype, shape and 64 bits over the contents.

    Leaves may be spread over the devices of several hosts; every process must call it, and gets the same. They lie on one mesh, or on one
    device. One program computes them all: programs in flight side by side could begin their sums between hosts in another order on each
    host, and would wait for each other for ever.
    """
    leaves = paths(tree)
    if not leaves:
        return {}
    shardings = [getattr(leaf, "sharding", None) for leaf in leaves.values()]
    mesh = next((sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding)), None)
    sums = _compiled(None if mesh is None else NamedSharding(mesh, P()))(list(leaves.values()))
    got = jax.device_get(jax.block_until_ready(sums))
    return {path: f"{kind(leaf)} {a:08x}{b:08x}" for (path, leaf), (a, b) in zip(leaves.items(), got, strict=True)}


def digest(marks: Mapping[str, str]) -> str:
    """One sha256 over the fingerprints of a tree."""
    return hashlib.sha256("".join(f"{path} {marks[path]}\n" for path in sorted(marks)).encode()).hexdigest()
