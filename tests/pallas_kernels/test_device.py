"""The device that kernels are chosen for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import pytest

from pallas_kernels import device


@pytest.mark.parametrize("by", ["a device", "a platform"])
def test_default_device_is_what_kernels_are_chosen_for(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU program on a host whose first device is a TPU."""
    cpu = jax.devices("cpu")[0]
    tpu: Any = SimpleNamespace(device_kind="TPU v5 lite", platform="tpu")
    monkeypatch.setattr(device.jax, "devices", lambda platform=None: [tpu] if platform is None else [cpu])
    assert device.tpu_generation() == "v5e"
    with jax.default_device(cpu if by == "a device" else "cpu"):
        assert device.device_kind() == cpu.device_kind
        assert device.tpu_generation() is None and device.hopper_cores() is None
