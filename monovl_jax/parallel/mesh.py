"""The mesh: axes `data` (rows), `fsdp` (rows, and parameters in pieces), `tensor` (heads, hidden units, vocabulary)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "tensor")


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over the devices that are there, every axis `AxisType.Auto` (the default of jax.make_mesh is Explicit).

    Args:
      data, fsdp, tensor: sizes; one of them may be -1, which takes what the others leave.
      devices: all devices of all hosts by default.

    Raises ValueError when the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or any(size < 1 for name, size in sizes.items() if name not in free):
        raise ValueError(f"mesh sizes are {sizes}; they must be positive, and at most one may be -1")
    if free:
        sizes[free[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(f"a mesh of {sizes} has {math.prod(sizes.values())} places for {len(devices)} devices; change the sizes")
    return jax.make_mesh(tuple(sizes[a] for a in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
