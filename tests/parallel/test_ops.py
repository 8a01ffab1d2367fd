"""Every mesh computes what one device computes: loss, and each gradient."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from tests.parallel.meshes import EIGHT

# Correct programs, not fast ones.
QUICK = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
BAR = 1e-5

COMPARE = """
import json
from monovl_jax.model import Ops
from tests.parallel.meshes import differences, model, one_step

config, worst = model({experts!r}), {{}}
one = one_step(config, (1, 1, 1), Ops(), {adapted})
for sizes in {meshes!r}:
    found = differences(one, one_step(config, tuple(sizes), Ops(remat={remat!r}), {adapted}))
    path = max(found, key=found.get)
    worst[str(sizes)] = float(found["loss"]), path, found[path], len(found)
print(json.dumps(worst))
"""

COLLECTIVES = """
import json
import jax.numpy as jnp
from monovl_jax.model import Ops
from tests.parallel.meshes import collectives, model

ops, trained = Ops(dtype=jnp.bfloat16, remat="save_projections"), (r"^decoder/blocks/mlp/visual/", r"^decoder/norm$")
print(json.dumps(collectives(model("ffn"), (2, 2, 2), ops, trained)))
"""


def agree(
    run_python: Callable[..., str], experts: str, meshes: list[tuple[int, int, int]], remat: str = "none", adapted: bool = False
) -> None:
    code = COMPARE.format(experts=experts, meshes=meshes, remat=remat, adapted=adapted)
    worst = json.loads(run_python(code, timeout=900, XLA_FLAGS=QUICK))
    assert list(worst) == [str(sizes) for sizes in meshes]
    for sizes, (loss, path, difference, entries) in worst.items():
        assert entries >= 20 and loss <= BAR and difference <= BAR, f"mesh {sizes}: loss {loss}, gradient of {path} {difference}"


def test_a_mesh_of_three_axes_equals_one_device(run_python: Callable[..., str]) -> None:
    agree(run_python, "ffn+attention", [(2, 2, 2)])


@pytest.mark.slow
@pytest.mark.parametrize("experts", ["ffn", "ffn+attention", "none"])
def test_every_mesh_of_eight_devices_equals_one_device(run_python: Callable[..., str], experts: str) -> None:
    assert len(EIGHT) == 10
    agree(run_python, experts, EIGHT)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["save_projections", "full"])
def test_remat_over_a_mesh(run_python: Callable[..., str], remat: str) -> None:
    agree(run_python, "ffn+attention", [(2, 2, 2)], remat)


def test_adapters_over_a_mesh(run_python: Callable[..., str]) -> None:
    """Of every matrix: those that tensor divides by columns and by lines, those of both experts and of the projector."""
    agree(run_python, "ffn+attention", [(2, 2, 2)], "full", adapted=True)


@pytest.mark.slow
@pytest.mark.parametrize("experts", ["ffn", "none"])
def test_adapters_over_meshes(run_python: Callable[..., str], experts: str) -> None:
    agree(run_python, experts, [(1, 1, 8), (1, 8, 1), (2, 2, 2)], adapted=True)


def test_sums_are_float32_and_frozen_weights_have_none(run_python: Callable[..., str]) -> None:
    """With bfloat16 activations and weights: what is gathered is bfloat16, what is summed is not."""
    found = json.loads(run_python(COLLECTIVES, XLA_FLAGS=QUICK))
    sums = [operand for kind, operand in found if kind in ("all_reduce", "reduce_scatter")]
    assert sums and not [operand for operand in sums if operand.endswith("bf16")]
    gathered = [operand for kind, operand in found if kind == "all_gather"]
    assert gathered and {operand.rpartition("x")[2] for operand in gathered} == {"bf16", "i32"}  # weights, and the tokens to look up
    # One reduce-scatter over fsdp for gate, up and down of the visual expert, which are trained; every other weight is frozen.
    assert sorted(operand for kind, operand in found if kind == "reduce_scatter") == ["128x48xf32", "128x48xf32", "48x128xf32"]
