"""Sizes, slices, shares of the rows, and what is said when something does not fit."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from monovl_jax.config import tiny
from monovl_jax.parallel import hosts
from monovl_jax.parallel.hosts import HostsError, in_turn, several_hosts
from monovl_jax.parallel.mesh import AXES, MeshError, device_grid, make_mesh, mesh_shape, row_share
from monovl_jax.parallel.sharding import check_rows, parameter_sharding, place_parameters
from monovl_jax.training.loop import check_mesh
from tests.training.worlds import plain_parameters, recipe, stage


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh looks at in a device."""

    id: int
    process_index: int = 0
    slice_index: int = 0
    platform: str = "cpu"
    device_kind: str = "fake"


def grid_of(shape: tuple[int, int, int], per_process: int = 1) -> Mesh:
    """A mesh of devices that are not there."""
    devices: Any = np.array([Device(n, n // per_process) for n in range(int(np.prod(shape)))]).reshape(shape)
    return Mesh(devices, AXES)


def test_sizes() -> None:
    assert mesh_shape(8) == (8, 1, 1)
    assert mesh_shape(8, fsdp=2, tensor=2) == (2, 2, 2)
    assert mesh_shape(8, 2, -1, 2) == (2, 2, 2)
    assert mesh_shape(16, data=1, fsdp=8, tensor=2) == (1, 8, 2)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"fsdp": 3}, r"data -1, fsdp 3, tensor 1 does not fit 8 devices; change sizes so that they multiply to 8"),
        ({"data": 4, "fsdp": 4}, "does not fit 8 devices"),
        ({"fsdp": 16}, "does not fit 8 devices"),
        ({"data": -1, "fsdp": -1}, "at most one may be -1"),
        ({"tensor": 0}, "must be positive"),
        ({"tensor": -2}, "must be positive"),
    ],
)
def test_sizes_that_do_not_fit(sizes: dict[str, int], words: str) -> None:
    with pytest.raises(MeshError, match=words):
        mesh_shape(8, **sizes)


def test_only_data_crosses_slices() -> None:
    """Devices of two slices, listed in turn: fsdp and tensor stay inside one."""
    devices = [Device(n, slice_index=n % 2) for n in range(8)]
    grid = device_grid((4, 1, 2), devices)
    slices = np.vectorize(lambda device: device.slice_index)(grid)
    assert grid.shape == (4, 1, 2) and len({device.id for device in grid.flat}) == 8
    assert (slices == slices[:, :1, :1]).all() and slices[:, 0, 0].tolist() == [0, 0, 1, 1]
    with pytest.raises(MeshError, match="data is 1 on 2 TPU slices, which only data can cross; make it a multiple of 2"):
        device_grid((1, 8, 1), [dataclasses.replace(device, platform="tpu") for device in devices])


@pytest.mark.parametrize(
    ("shape", "per_process", "process", "share"),
    [
        ((2, 2, 1), 4, 0, (0, 1)),
        ((2, 2, 1), 1, 3, (3, 4)),
        ((2, 2, 1), 2, 1, (1, 2)),
        ((2, 1, 2), 1, 1, (0, 2)),  # tensor between processes 0 and 1: the same rows
        ((2, 1, 2), 1, 2, (1, 2)),
        ((1, 1, 4), 1, 3, (0, 1)),
    ],
)
def test_share_of_the_rows(monkeypatch, shape: tuple[int, int, int], per_process: int, process: int, share: tuple[int, int]) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: process)
    assert row_share(grid_of(shape, per_process)) == share


def test_processes_that_hold_uneven_blocks() -> None:
    with pytest.raises(MeshError, match="processes hold the row groups"):
        row_share(grid_of((3, 1, 2), 3))  # process 0 has half of the middle group


def test_a_model_or_batch_that_the_mesh_cannot_divide() -> None:
    words = r"qkv has shape \[2, 64, 2, 4, 16\]; its dimension 2 cannot be divided over 4 devices of the mesh axis 'tensor': the 2 kv heads"
    with pytest.raises(MeshError, match=words):
        parameter_sharding("decoder/blocks/attention/text/qkv", (2, 64, 2, 4, 16), grid_of((1, 1, 4)))
    with pytest.raises(MeshError, match=r"'S2': batch_size has 4 rows a micro-batch, which 8 devices .* cannot share equally"):
        check_rows(4, "stage 'S2': batch_size", grid_of((2, 4, 1)))
    check_mesh(recipe(stages=(stage(),)), make_mesh())


def test_parameters_are_placed_from_the_host() -> None:
    tree = {"decoder": {"embedding": np.arange(12, dtype=np.float32).reshape(4, 3)}, "vision": {"bias": np.ones(2, np.float16)}}
    placed = place_parameters(tree, make_mesh())
    assert placed["decoder"]["embedding"].sharding.mesh.axis_names == ("data", "fsdp", "tensor")
    assert placed["vision"]["bias"].dtype == np.float16
    np.testing.assert_array_equal(placed["decoder"]["embedding"], tree["decoder"]["embedding"])
    parameters = place_parameters(plain_parameters(tiny()), make_mesh())
    again = place_parameters(parameters, make_mesh())
    first, second = parameters["decoder"]["head"], again["decoder"]["head"]
    assert first.unsafe_buffer_pointer() == second.unsafe_buffer_pointer()  # no second copy


# ---- hosts -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"JAX_COORDINATOR_ADDRESS": "host:1234"}, True),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "16"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "host"}, True),
    ],
)
def test_signs_of_several_hosts(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], several: bool) -> None:
    for name in (
        "JAX_COORDINATOR_ADDRESS",
        "SLURM_STEP_NUM_TASKS",
        "OMPI_COMM_WORLD_SIZE",
        "TPU_PROCESS_ADDRESSES",
        "TPU_WORKER_HOSTNAMES",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert several_hosts() is several


def test_joining(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: asked.append(given))
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1234")
    monkeypatch.setenv("JAX_PROCESS_COUNT", "4")
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    hosts.start(False)
    assert not asked
    hosts.start()
    assert asked == [{"coordinator_address": "host:1234", "num_processes": 4, "process_id": 2}]
    monkeypatch.setenv("JAX_PROCESS_ID", "two")
    with pytest.raises(HostsError, match="JAX_PROCESS_ID is 'two'; give a number"):
        hosts.start()


def test_nobody_to_join(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with pytest.raises(
        HostsError, match=r"were not found \(coordinator_address should be defined.\); set JAX_COORDINATOR_ADDRESS=HOST:PORT"
    ):
        hosts.start(True)


def test_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    assert in_turn(lambda: 3) == 3
    told: list[int] = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts.multihost_utils, "broadcast_one_to_all", lambda value: told.append(int(value)) or value)
    assert in_turn(lambda: 4) == 4
    with pytest.raises(ZeroDivisionError):
        in_turn(lambda: 1 // 0)
    assert told == [0, 1]  # the others hear of a failure as well, and do not wait
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(hosts.multihost_utils, "broadcast_one_to_all", lambda value: np.int32(1))
    with pytest.raises(HostsError, match="process 0 has stopped"):
        in_turn(lambda: 5)
