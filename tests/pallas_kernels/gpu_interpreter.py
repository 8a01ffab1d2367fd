"""Mosaic GPU's interpreter, in the jax versions that are supported: from 0.12 on it is public and transposes, before it does neither."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

PUBLIC = hasattr(plgpu, "InterpretGPUParams")


def parameters(**options: Any) -> Any:
    """The value of `interpret` that runs Mosaic GPU kernels on a CPU."""
    if PUBLIC:
        return plgpu.InterpretGPUParams(**options)
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    _teach_to_transpose()
    return InterpretGPUParams(**options)


def _teach_to_transpose() -> None:
    """Puts a product that knows transposed operands in place of the interpreter's, whose only fault is that it does not."""
    from jax._src.pallas.mosaic.interpret import utils
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
    from jax._src.state.types import TransposeTransform

    def wgmma(*, token, device_id, thread_id, acc_dtype, source_info=None, grid_point_coords=None, **operands):
        memory = gpu_callbacks._get_shared_memory()
        thread = memory.get_global_thread_id(int(device_id), int(thread_id))

        def place(name: str) -> tuple[Any, bool]:
            transforms = [t for t in operands[f"{name}_transforms"] if not isinstance(t, TransposeTransform)]
            key = gpu_callbacks.HostAllocationKey.from_array(operands[f"{name}_allocation_key_as_array"])
            where = utils.to_range(jax.tree.map(int, gpu_callbacks._remove_noop_transforms(tuple(transforms))))
            return (key, where, thread), len(transforms) < len(operands[f"{name}_transforms"])

        def read(name: str) -> np.ndarray:
            where, turned = place(name)
            value = memory.get_buffer_content(*where)[0]
            return value.T if turned else value

        key, where, _ = place("acc")[0]
        memory.store_buffer_content(key, where, read("acc") + np.matmul(read("a"), read("b"), dtype=acc_dtype), thread)
        return token

    gpu_callbacks.wgmma = wgmma


def reset() -> None:
    """Forgets what a failed kernel left behind, so that the next one runs."""
    with contextlib.suppress(ImportError):
        from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state

        reset_gpu_interpret_mode_state()
