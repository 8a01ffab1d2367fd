"""Several hosts: one process on each runs the same program (multi-controller SPMD). Starting them, and taking turns."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

Result = TypeVar("Result")

COORDINATOR, PROCESSES, PROCESS = "JAX_COORDINATOR_ADDRESS", ("JAX_NUM_PROCESSES", "JAX_PROCESS_COUNT"), "JAX_PROCESS_ID"
"""Environment variables that name the other processes: host:port of process 0, how many there are, which one this is."""


class HostsError(ValueError):
    """The processes of a run do not find each other, or one of them cannot go on."""


def _number(*names: str) -> int | None:
    for name in names:
        if text := os.environ.get(name):
            if not text.isdigit():
                raise HostsError(f"{name} is {text!r}; give a number")
            return int(text)
    return None


def several_hosts() -> bool:
    """Whether the environment speaks of several processes: ours above, a Slurm step, mpirun, or the workers of a TPU slice."""
    tpu_workers = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES") or ""
    return bool(
        os.environ.get(COORDINATOR)
        or max(_number("SLURM_STEP_NUM_TASKS") or 1, _number("OMPI_COMM_WORLD_SIZE") or 1) > 1
        or "," in tpu_workers
        or os.environ.get("MEGASCALE_COORDINATOR_ADDRESS")
    )


def start(distributed: bool | None = None) -> None:
    """Joins the other processes of a run; must come before anything else asks JAX for a device.

    Args:
      distributed: None joins when `several_hosts`; True joins always, and lets JAX find the others (TPU pods, Slurm, Open MPI);
        False never does.

    Raises HostsError when it is asked for and the others are not found.
    """
    if not (several_hosts() if distributed is None else distributed) or jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize(
            coordinator_address=os.environ.get(COORDINATOR), num_processes=_number(*PROCESSES), process_id=_number(PROCESS)
        )
    except (ValueError, RuntimeError) as error:
        raise HostsError(
            f"the other processes were not found ({str(error).splitlines()[0]}); set {COORDINATOR}=HOST:PORT, {PROCESSES[0]} and {PROCESS} "
            "on each, or run on this machine alone with --distributed False"
        ) from None


def in_turn(work: Callable[[], Result]) -> Result:
    """`work()` on process 0, and when that has ended, on all others: what the first writes the others find.

    Raises what `work` raises; on the others HostsError when process 0 failed, so that none waits for it.
    """
    if jax.process_count() == 1:
        return work()
    if jax.process_index() == 0:
        try:
            result = work()
        except BaseException:
            multihost_utils.broadcast_one_to_all(np.int32(1))
            raise
        multihost_utils.broadcast_one_to_all(np.int32(0))
        return result
    if multihost_utils.broadcast_one_to_all(np.int32(0)):
        raise HostsError("process 0 has stopped; its output says why")
    return work()
