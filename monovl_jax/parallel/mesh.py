"""The mesh: axes `data` (rows), `fsdp` (rows, and parameters in pieces), `tensor` (heads, hidden units, vocabulary)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "tensor")


class MeshError(ValueError):
    """A mesh that does not fit the devices, the model or the batch; the message says which and what to change."""


def mesh_shape(count: int, data: int = -1, fsdp: int = 1, tensor: int = 1) -> tuple[int, int, int]:
    """(data, fsdp, tensor) for `count` devices; one of them may be -1, which takes what the others leave.

    Raises MeshError when the sizes do not multiply to the number of devices.
    """
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 for name, size in sizes.items() if name not in free):
        raise MeshError(f"mesh sizes are {sizes}; they must be positive, and at most one may be -1")
    if free:
        sizes[free[0]] = count // math.prod(size for size in sizes.values() if size != -1)
    if math.prod(sizes.values()) != count:
        raise MeshError(
            f"a mesh of data {data}, fsdp {fsdp}, tensor {tensor} does not fit {count} devices; change sizes so that they multiply to "
            f"{count}, or give one of them as -1"
        )
    return sizes["data"], sizes["fsdp"], sizes["tensor"]


def device_grid(shape: tuple[int, int, int], devices: Sequence[Any]) -> np.ndarray:
    """Devices as an array of `shape`, neighbours on the fast network along `tensor` and `fsdp`.

    Devices of several slices (TPU slices, GPU nodes) meet on the slow network (DCN); there `data` crosses it, and no other axis does.
    Raises MeshError when `data` is no multiple of the TPU slices; GPU nodes may then be crossed by the other axes too.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    data, fsdp, tensor = shape
    if slices > 1 and data % slices == 0:
        return mesh_utils.create_hybrid_device_mesh((data // slices, fsdp, tensor), (slices, 1, 1), devices)
    if slices > 1 and devices[0].platform == "tpu":
        raise MeshError(f"data is {data} on {slices} TPU slices, which only data can cross; make it a multiple of {slices}")
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over the devices that are there, every axis `AxisType.Auto` (the default of jax.make_mesh is Explicit).

    Args:
      data, fsdp, tensor: sizes; one of them may be -1, which takes what the others leave.
      devices: all devices of all hosts by default.

    Raises MeshError when the sizes do not multiply to the number of devices, or `data` does not to that of the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    grid = device_grid(mesh_shape(len(devices), data, fsdp, tensor), devices)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def row_share(mesh: Mesh) -> tuple[int, int]:
    """(index, count): which of `count` equal shares of the rows of a batch this process reads.

    Rows are divided over data and fsdp. Processes between which only `tensor` divides need the same rows and have the same share:

        mesh 2 x 1 x 2, one device a process     processes 0 1 | 2 3     shares 0 0 | 1 1 of 2

    Raises MeshError when the devices of the processes do not cover the rows in equal blocks.
    """
    groups = mesh.devices.reshape(-1, mesh.shape["tensor"])
    owned: dict[int, list[int]] = {}
    for number, devices in enumerate(groups):
        for process in {device.process_index for device in devices}:
            owned.setdefault(process, []).append(number)
    sizes = {len(rows) for rows in owned.values()}
    size = max(sizes)
    if len(sizes) > 1 or any(rows != list(range(rows[0], rows[0] + size)) or rows[0] % size for rows in owned.values()):
        raise MeshError(f"the processes hold the row groups {owned} of the mesh {dict(mesh.shape)}; make data * fsdp a multiple of them")
    return owned[jax.process_index()][0] // size, len(groups) // size
