"""What is known about kinds of devices: their peak, the XLA options they like, the memory they have in use.

`monovl train` prints the options it uses; `--xla-option NAME=VALUE` sets one, `--xla-option NAME=` leaves it out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax

PEAK_FLOPS: dict[str, float] = {
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA B200": 2250e12,
}
"""Dense bfloat16 FLOP/s of one device as jax counts devices, by the words that `device_kind` begins with; the longest entry counts.

From the makers' own sheets: Google's Cloud TPU pages "TPU v3", "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x" (peak compute per
chip; a v3 and a TPU7x chip are two devices), and NVIDIA's data sheets "A100 Tensor Core GPU", "H100 Tensor Core GPU", "H200 Tensor Core
GPU", "L4", "L40S" and "DGX B200", whose figures with sparsity are halved. What is not here, CPUs among them, has no MFU."""

_TPU = {
    "xla_tpu_enable_latency_hiding_scheduler": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_overlap_compute_collective_tc": True,
    "xla_enable_async_all_gather": True,
}

XLA_OPTIONS: dict[str, dict[str, Any]] = {
    "TPU": _TPU,
    "TPU7x": _TPU,
    "NVIDIA": {"xla_gpu_enable_latency_hiding_scheduler": True},
}
"""Options of the train step's compilation by the beginning of `device_kind`: collectives run beside the arithmetic."""


def _longest(table: Iterable[str], kind: str) -> str | None:
    """The longest name that `kind` begins with as whole words: an "NVIDIA L40" is no "NVIDIA L4"."""
    return max((name for name in table if kind.startswith(name) and not kind[len(name) :][:1].isalnum()), key=len, default=None)


def peak_flops(kind: str) -> float | None:
    """bfloat16 FLOP/s of a device by its `device_kind`; None when it is not known."""
    name = _longest(PEAK_FLOPS, kind)
    return None if name is None else PEAK_FLOPS[name]


def parse_value(text: str) -> bool | int | float | str:
    """The value of an option as XLA takes it: `true` and `false`, a number, or text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def compiler_options(kind: str, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The XLA options for a kind of device.

    overrides: `NAME=VALUE` sets one, `NAME=` takes one of the table out. Raises ValueError for anything else.
    """
    name = _longest(XLA_OPTIONS, kind)
    options = dict(XLA_OPTIONS[name]) if name else {}
    for override in overrides:
        option, equals, value = override.partition("=")
        if not equals or not option.startswith("xla_"):
            raise ValueError(f"the XLA option {override!r} is not of the form xla_NAME=VALUE (or xla_NAME= to leave one of the table out)")
        if value:
            options[option] = parse_value(value)
        else:
            options.pop(option, None)
    return options


def bytes_in_use() -> int | None:
    """The most memory that any local device has in use; None where the backend does not say (CPU)."""
    used = [stats["bytes_in_use"] for device in jax.local_devices() if (stats := device.memory_stats()) and "bytes_in_use" in stats]
    return max(used, default=None)
