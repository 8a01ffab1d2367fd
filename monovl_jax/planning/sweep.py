"""Meshes and remat policies ranked by formula, before anything is compiled: which of them are worth a compiler's minute.

The collectives of a step are guessed from what `parallel.ops` does; the rest is `estimate`. A guess is for choosing alone: the plans of
the best candidates read theirs from the compiled program.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from monovl_jax.config import ModelConfig
from monovl_jax.model.ops import Remat
from monovl_jax.parallel.mesh import MeshError, make_mesh
from monovl_jax.parallel.sharding import partition_spec
from monovl_jax.planning.collectives import Collective
from monovl_jax.planning.estimate import CHIPS, FILL, Costs, estimate, step_counts
from monovl_jax.training.stages import Recipe, Stage
from monovl_jax.training.trainable import flatten, model_structure

REMATS: tuple[Remat, ...] = ("none", "save_projections", "full")

MOST_TENSOR = 8
"""Devices of `tensor`: those of a host, at most."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A mesh and a remat policy for a stage. stage: with its micro-batches. filled: share of the HBM that the formula fills."""

    mesh: Mesh
    remat: Remat
    stage: Stage
    filled: float
    costs: Costs

    @property
    def sizes(self) -> dict[str, int]:
        return dict(self.mesh.shape)

    def as_json(self) -> dict[str, Any]:
        return {
            "mesh": self.sizes,
            "remat": self.remat,
            "accumulation": self.stage.accumulation,
            "filled": self.filled,
            "step": self.costs.step,
            "exposed": self.costs.exposed,
            "mfu": self.costs.mfu,
        }


def guessed_collectives(model: ModelConfig, stage: Stage, trained: frozenset[str], mesh: Mapping[str, int], remat: str) -> list[Collective]:
    """The collectives of a step as `parallel.ops` writes them, without small change.

    Weights are gathered over fsdp forward and backward in bfloat16; gradients of trained ones are scattered over fsdp and summed over
    data in float32; activations are summed over tensor after attention and feed-forward, twice backward, and where remat repeats them.
    """
    data, fsdp, tensor = mesh["data"], mesh["fsdp"], mesh["tensor"]
    gathered = reduced = summed = 0
    for path, leaf in flatten(model_structure(model).shapes).items():
        spec, size = partition_spec(path), math.prod(leaf.shape)
        piece = math.prod(mesh[axis] for axis in spec if axis is not None)
        own = size // (tensor if "tensor" in spec else 1)
        if "fsdp" in spec and path != "decoder/embedding":
            gathered += 2 * own
            reduced += 4 * own * (path in trained)
        summed += 4 * (size // piece) * (path in trained)
    runs = stage.accumulation
    tokens = step_counts(model, stage)["tokens"] / (data * fsdp)
    repeated = {"none": 0, "save_projections": 1, "full": 2}[remat]
    activations = int(2 * tokens * model.decoder.hidden_size * model.decoder.num_layers)
    rows = (
        Collective("all-gather", "fsdp", fsdp, 2 * gathered * runs, runs, False),
        Collective("reduce-scatter", "fsdp", fsdp, reduced * runs, runs, False),
        Collective("all-reduce", "data", data, summed * runs, runs, False),
        Collective("all-reduce", "tensor", tensor, (4 + repeated) * activations, runs, False),
    )
    return [row for row in rows if row.size > 1 and row.bytes]


def meshes(devices: Sequence[Any], kv_heads: int, fixed: tuple[int | None, int | None, int | None]) -> Iterator[Mesh]:
    """The meshes of powers of two whose `tensor` divides the heads and stays within a host, and that have the `fixed` sizes."""
    for tensor in range(1, min(MOST_TENSOR, kv_heads) + 1):
        if kv_heads % tensor or len(devices) % tensor:
            continue
        rest = len(devices) // tensor
        for fsdp in (2**n for n in range(rest.bit_length())):
            if rest % fsdp == 0 and all(want in (None, -1, size) for want, size in zip(fixed, (rest // fsdp, fsdp, tensor), strict=True)):
                yield make_mesh(rest // fsdp, fsdp, tensor, devices=devices)


def ranked(
    recipe: Recipe,
    stage: Stage,
    name: str,
    devices: Sequence[Any],
    fixed: tuple[int | None, int | None, int | None],
    remats: Sequence[Remat],
    choose: Callable[[Mesh, Remat], tuple[Stage, int, int]],
) -> list[Candidate]:
    """All candidates that fit by the formula, fastest first; of those alike to 1%, first the one that gathers among the fewest chips.

    The formula knows no latency and takes every collective for one ring, which flatters long rings.

    choose: (mesh, remat) -> (the stage with its micro-batches, bytes of masters and of everything on a chip); MeshError for a mesh that
    does not divide.
    """
    found, hbm = [], CHIPS[name.split(":")[0]].hbm
    trained, kind = recipe.trainable_paths(stage), devices[0].device_kind
    for mesh in meshes(devices, recipe.model.decoder.num_kv_heads, fixed):
        for remat in remats:
            try:
                chosen, masters, need = choose(mesh, remat)
            except MeshError:
                continue
            if need <= FILL * hbm:
                rows = guessed_collectives(recipe.model, chosen, trained, mesh.shape, remat)
                costs = estimate(recipe, chosen, rows, masters, remat, dict(mesh.shape), name, kind)
                found.append(Candidate(mesh, remat, chosen, need / hbm, costs))
    return sorted(found, key=lambda candidate: (round(100 * math.log(candidate.costs.step)), candidate.mesh.shape["fsdp"]))
