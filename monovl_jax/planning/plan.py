"""`monovl plan`: every stage of a recipe compiled for a TPU topology, with what it takes and what it costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from monovl_jax.model.attention import SPLASH_TILE
from monovl_jax.parallel.sharding import check_rows, parameter_shardings
from monovl_jax.planning.collectives import Collective, collectives, kernels, unknown_loops
from monovl_jax.planning.compile import CompiledStage, PlanError, abstract_state, compile_stage, plan_mesh, shard_bytes, topology
from monovl_jax.planning.estimate import CHIPS, Costs, accumulations, estimate, working_bytes
from monovl_jax.recipes import launch
from monovl_jax.training.optimizer import make_optimizer
from monovl_jax.training.stages import Recipe, Stage
from monovl_jax.training.trainable import model_structure

FILL = 0.9
"""Share of the HBM that the formula may fill when it chooses the micro-batches."""


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """A stage on a mesh. hbm: bytes a chip has. costs: None for a program that does not fit. mend: what to try then, else empty."""

    compiled: CompiledStage
    mesh: dict[str, int]
    remat: str
    hbm: int
    collectives: list[Collective]
    kernels: dict[str, int]
    costs: Costs | None
    mend: str
    notes: list[str]

    @property
    def fits(self) -> bool:
        return self.compiled.memory.over is None and self.compiled.memory.peak <= self.hbm

    @property
    def headroom(self) -> int:
        return self.hbm - self.compiled.memory.peak

    def as_json(self) -> dict[str, Any]:
        stage, memory = self.compiled.stage, self.compiled.memory
        return {
            "stage": stage.name,
            "mesh": self.mesh,
            "batch_size": stage.batch_size,
            "accumulation": stage.accumulation,
            "remat": self.remat,
            "fits": self.fits,
            "mend": self.mend,
            "notes": self.notes,
            "state_bytes": self.compiled.state,
            "memory_bytes": dataclasses.asdict(memory) | {"peak": memory.peak, "hbm": self.hbm, "headroom": self.headroom},
            "compile_seconds": self.compiled.seconds,
            "kernels": self.kernels,
            "collectives": [dataclasses.asdict(row) for row in self.collectives],
            "costs": None if self.costs is None else dataclasses.asdict(self.costs) | {"exposed": self.costs.exposed},
        }


def masters_bytes(recipe: Recipe, stage: Stage, mesh: Mesh) -> tuple[int, int]:
    """(trainable parameters, all that a step takes but its batch) of one chip, in bytes."""
    trees = abstract_state(recipe, stage, make_optimizer(stage), mesh)
    return shard_bytes(trees[0]), sum(shard_bytes(tree) for tree in trees)


def with_accumulation(recipe: Recipe, stage: Stage, mesh: Mesh, remat: str, hbm: int) -> Stage:
    """The stage with the fewest micro-batches that the formula lets into FILL of the HBM; the most that divide the rows if none does.

    Raises MeshError when the mesh cannot divide the rows at all.
    """
    groups = mesh.shape["data"] * mesh.shape["fsdp"]
    check_rows(stage.batch_size, f"stage {stage.name!r}: batch_size", mesh)
    check_rows(stage.text_rows, f"stage {stage.name!r}: text_rows", mesh)
    masters, held = masters_bytes(recipe, stage, mesh)
    for number in accumulations(stage, groups):
        stage = dataclasses.replace(stage, accumulation=number)
        if held + working_bytes(recipe.model, stage, masters, remat, dict(mesh.shape)) <= FILL * hbm:
            break
    return stage


def mend(compiled: CompiledStage, recipe: Recipe, mesh: Mesh, remat: str, hbm: int) -> str:
    """`needs 1.4x the HBM: try ...`, or nothing for a stage that fits."""
    stage, need = compiled.stage, compiled.memory.peak
    if need <= hbm and compiled.memory.over is None:
        return ""
    shape, tries = dict(mesh.shape), []
    larger = [n for n in accumulations(stage, shape["data"] * shape["fsdp"]) if n > stage.accumulation]
    if larger:
        tries.append(f"--accumulation {larger[0]}")
    if shape["data"] > 1:
        tries.append(f"--mesh.fsdp {shape['fsdp'] * 2}")
    heads = recipe.model.decoder.num_kv_heads
    if heads % (shape["tensor"] * 2) == 0 and mesh.size % (shape["tensor"] * 2) == 0:
        tries.append(f"--mesh.tensor {shape['tensor'] * 2}")
    if remat != "full":
        tries.append("--remat full")
    return f"needs {need / hbm:.2g}x the HBM: try {' or '.join(tries) or 'a larger topology'}"


def notes(stage: Stage, text: str) -> list[str]:
    """What a reader of the figures should know about a stage."""
    found = []
    for field in ("sequence_length", "text_length"):
        if rest := getattr(stage, field) % SPLASH_TILE:
            length = getattr(stage, field)
            found.append(
                f"{field} {length} is no multiple of {SPLASH_TILE}, so that attention goes without the fused kernel; "
                f"{length - rest} or {length - rest + SPLASH_TILE} would have it"
            )
    if loops := unknown_loops(text):
        found.append(f"{loops} loops have no known trip count; the collectives in them are counted once")
    return found


def plan(
    recipe: Recipe,
    name: str,
    *,
    mesh: tuple[int | None, int | None, int | None] = (None, None, None),
    accumulation: int | None = None,
    remat: str = "save_projections",
    say: Callable[[str], None] = print,
) -> Iterator[StagePlan]:
    """Plans the stages of a recipe one by one.

    Args:
      name: of the topology, such as `v5e:4x4`.
      mesh: sizes of data, fsdp and tensor as `monovl train` takes them; without any, parameters lie in up to 16 pieces.
      accumulation: micro-batches of a step; by default the fewest that a formula takes to fit.
      say: told what is compiled.

    Raises PlanError, MeshError or RecipeError; what is wrong in the arguments before anything compiles.
    """
    devices = topology(name)
    grid = plan_mesh(devices, *mesh)
    generation, sizes = name.split(":")[0], dict(grid.shape)
    if generation not in CHIPS:
        raise PlanError(f"{generation} chips are not in the table of this command; use one of {', '.join(CHIPS)}")
    hbm = CHIPS[generation].hbm
    parameter_shardings(model_structure(recipe.model).shapes, grid)
    if accumulation is None:
        stages = [with_accumulation(recipe, stage, grid, remat, hbm) for stage in recipe.stages]
    else:
        stages = [dataclasses.replace(stage, accumulation=accumulation) for stage in recipe.stages]
    for stage in stages:
        for field in ("batch_size", "text_rows"):
            check_rows(getattr(stage, field) // stage.accumulation, f"stage {stage.name!r}: {field}", grid)
    for stage in stages:
        say(f"compiling {stage.name} for {name}: mesh {sizes}, accumulation {stage.accumulation}, remat {remat}")
        yield plan_stage(recipe, stage, grid, remat, name, hbm)


def plan_stage(recipe: Recipe, stage: Stage, mesh: Mesh, remat: str, name: str, hbm: int) -> StagePlan:
    """One stage compiled and read."""
    compiled, sizes = compile_stage(recipe, stage, mesh, remat), dict(mesh.shape)
    rows: list[Collective] = []
    costs = None
    if compiled.text:
        rows = collectives(compiled.text, sizes)
        costs = estimate(recipe, stage, rows, compiled.state["masters"], remat, sizes, name, mesh.devices.flat[0].device_kind)
    told = mend(compiled, recipe, mesh, remat, hbm)
    return StagePlan(compiled, sizes, remat, hbm, rows, kernels(compiled.text), costs, told, notes(stage, compiled.text))


def prepare(
    recipe: str,
    topology: str,
    *,
    init: Path | None = None,
    stages: Sequence[str] = (),
    batch_size: int | None = None,
    sequence_length: int | None = None,
    outputs: Sequence[Path | None] = (),
    **options: Any,
) -> Iterator[StagePlan]:
    """`plan` of a recipe by name, with the changes of the command line.

    init: a run directory or model folder, for a recipe that works on a model one brings. outputs: files to be written, whose folders must
    be there. options: of `plan`. Raises one of EXPECTED_ERRORS.
    """
    for path in outputs:
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise PlanError(f"{path} cannot be written; give a file in a folder that is there")
    config = None if init is None else launch.find_start(init).config
    changes = {"batch_size": batch_size, "sequence_length": sequence_length}
    return plan(launch.adapted(launch.find_recipe(recipe, config), stages, **changes), topology, **options)


EXPECTED_ERRORS = (PlanError, *launch.EXPECTED_ERRORS)
"""What `prepare` and the plans it gives raise when the user is at fault."""
