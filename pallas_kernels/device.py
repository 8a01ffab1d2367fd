"""Which device the program that is being traced is for."""

from __future__ import annotations

from typing import Any

import jax

HOPPER = ("H100", "H200", "H800", "H20", "GH200")
GENERATIONS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}
"""By the kind of device: what a topology's name begins with. A tpu7x chip is two devices."""


def _default_device() -> Any:
    """That of `jax.default_device` (a device or a platform's name), which is part of the key under which jit keeps programs."""
    default = jax.default_device.value
    if default is None:
        return jax.devices()[0]
    return jax.devices(default)[0] if isinstance(default, str) else default


def device_kind() -> str:
    """The kind of the current mesh's devices (also of a mesh that only exists on paper), or of the default device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device is not None else _default_device().device_kind


def tpu_generation() -> str | None:
    """'v5e', 'v5p', 'v6e' or 'tpu7x'; another TPU's own name; None where the device is no TPU."""
    kind = device_kind()
    return GENERATIONS.get(kind, kind) if kind.startswith("TPU") else None


def hopper_cores() -> int | None:
    """Streaming multiprocessors of the Hopper GPU that the program is traced for; None where the device is none."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:  # perhaps a mesh that only exists on paper: all there is to go by is a name
        return device.num_cores if any(f"NVIDIA {name}" in device.device_kind for name in HOPPER) else None
    device = _default_device()
    return device.core_count if device.platform == "gpu" and device.compute_capability == "9.0" else None
