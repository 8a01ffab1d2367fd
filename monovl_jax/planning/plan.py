"""`monovl plan`: every stage of a recipe compiled for a TPU topology, with what it takes and what it costs."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from monovl_jax.model.ops import Remat
from monovl_jax.parallel.sharding import check_rows, parameter_shardings
from monovl_jax.planning.collectives import Collective, collectives, kernels, unknown_loops
from monovl_jax.planning.compile import CompiledStage, abstract_batch, abstract_state, compile_stage, plan_mesh, shard_bytes
from monovl_jax.planning.estimate import CHIPS, FILL, Costs, accumulations, estimate, working_bytes
from monovl_jax.planning.program import PlanError, cache_folder, topology
from monovl_jax.planning.sweep import REMATS, Candidate, guessed_collectives, ranked
from monovl_jax.recipes import launch
from monovl_jax.recipes.find import adapted, find_recipe
from monovl_jax.training.optimizer import make_optimizer
from monovl_jax.training.stages import Recipe, Stage
from monovl_jax.training.trainable import model_structure

COMPILED = 3
"""Candidates of a sweep that are compiled."""

TRIES = 3
"""How often a stage is compiled, at most, with ever smaller micro-batches until it fits, where their number is not given."""


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
            "arguments_bytes": self.compiled.arguments,
            "layout_padding_bytes": self.compiled.padding,
            "compile_seconds": round(self.compiled.program.seconds, 1),
            "lowering_seconds": round(self.compiled.lowering, 1),
            "kernels": self.kernels,
            "collectives": [dataclasses.asdict(row) for row in self.collectives],
            "costs": None if self.costs is None else dataclasses.asdict(self.costs) | {"exposed": self.costs.exposed},
        }


def held_bytes(recipe: Recipe, stage: Stage, mesh: Mesh) -> tuple[int, int, int]:
    """(trainable parameters; these, the frozen ones and the optimizer's state; the batch) of one chip, in bytes."""
    trees = abstract_state(recipe, stage, make_optimizer(stage), mesh)
    return shard_bytes(trees[0]), sum(shard_bytes(tree) for tree in trees), shard_bytes(abstract_batch(recipe.model, stage, mesh))


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A stage with its micro-batches. masters: bytes of them on a chip. need: bytes in all, by the formula."""

    stage: Stage
    masters: int
    need: int


def fitted(recipe: Recipe, stage: Stage, mesh: Mesh, remat: str, hbm: int, accumulation: int | None = None) -> Fitted:
    """The stage with the fewest micro-batches that the formula lets into FILL of the HBM; the most that divide the rows if none does.

    Raises MeshError when the mesh cannot divide the model, or the rows of a micro-batch.
    """
    if accumulation:
        stage = dataclasses.replace(stage, accumulation=accumulation)
    for field in ("batch_size", "text_rows"):
        check_rows(getattr(stage, field) // (accumulation or 1), f"stage {stage.name!r}: {field}", mesh)
    masters, held, batch = held_bytes(recipe, stage, mesh)
    trained, kind = recipe.trainable_paths(stage), mesh.devices.flat[0].device_kind
    numbers, need = [accumulation] if accumulation else accumulations(stage, mesh.shape["data"] * mesh.shape["fsdp"]), 0
    for number in numbers:
        stage = dataclasses.replace(stage, accumulation=number)
        need = held + batch + working_bytes(recipe.model, stage, masters, batch, trained, remat, mesh.shape, kind)
        if need <= FILL * hbm:
            break
    return Fitted(stage, masters, need)


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


def notes(text: str) -> list[str]:
    """What a reader of the figures should know about a stage."""
    loops = unknown_loops(text)
    return [f"{loops} loops have no known trip count; the collectives in them are counted once"] if loops else []


def plan(
    recipe: Recipe,
    name: str,
    *,
    mesh: tuple[int | None, int | None, int | None] = (None, None, None),
    accumulation: int | None = None,
    remat: Remat | None = None,
    cache: bool = True,
    say: Callable[[str], None] = print,
) -> Iterator[StagePlan]:
    """Plans the stages of a recipe one by one.

    Args:
      name: of the topology, such as `v5e:4x4`.
      mesh: sizes of data, fsdp and tensor as `monovl train` takes them; without any, parameters lie in up to 16 pieces.
      accumulation: micro-batches of a step; by default the fewest that a formula takes to fit, or more where the compiler disagrees.
      remat: by default `save_projections` or `full`, whichever is faster by the formula among those that fit.
      cache: whether what was compiled before is taken from the user's cache folder, and kept there.
      say: told what is compiled.

    Raises PlanError, MeshError or RecipeError; what is wrong in the arguments before anything compiles.
    """
    devices, hbm = known_topology(name)
    grid = plan_mesh(devices, *mesh)
    parameter_shardings(model_structure(recipe.model).shapes, grid)
    choose = functools.partial(fastest, name=name, accumulation=accumulation, remat=remat)
    for stage, first in [(stage, choose(recipe, stage, grid, hbm)) for stage in recipe.stages]:
        (found, policy), done = first, None
        for _ in range(TRIES):
            say(f"compiling {stage.name} for {name}: mesh {dict(grid.shape)}, accumulation {found.stage.accumulation}, remat {policy}")
            done = plan_stage(recipe, found.stage, grid, policy, name, hbm, cache)
            told = hbm * found.need // max(1, done.compiled.memory.peak)  # what the formula may say, by what the compiler says
            again = choose(recipe, stage, grid, told)
            if done.fits or again == (found, policy):
                break
            found, policy = again
        assert done is not None
        yield done


def fastest(
    recipe: Recipe, stage: Stage, mesh: Mesh, hbm: int, *, name: str, accumulation: int | None = None, remat: Remat | None = None
) -> tuple[Fitted, Remat]:
    """The stage with its micro-batches, and the policy: the one given, or the faster of those that fit by the formula."""
    policies: tuple[Remat, ...] = (remat,) if remat else ("save_projections", "full")
    options: list[tuple[Fitted, Remat]] = [(fitted(recipe, stage, mesh, policy, hbm, accumulation), policy) for policy in policies]
    fitting = [option for option in options if option[0].need <= FILL * hbm] or options[-1:]
    trained, kind = recipe.trainable_paths(stage), mesh.devices.flat[0].device_kind

    def seconds(option: tuple[Fitted, Remat]) -> float:
        found, policy = option
        rows = guessed_collectives(recipe.model, found.stage, trained, mesh.shape, policy)
        return estimate(recipe, found.stage, rows, found.masters, policy, mesh.shape, name, kind).step

    return min(fitting, key=seconds)


def known_topology(name: str) -> tuple[list[Any], int]:
    """(devices, bytes of HBM of one). Raises PlanError for a topology that libtpu or the table of chips does not have."""
    devices, generation = topology(name), name.split(":")[0]
    if generation not in CHIPS:
        raise PlanError(f"{generation} chips are not in the table of this command; use one of {', '.join(CHIPS)}")
    return devices, CHIPS[generation].hbm


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The candidates of a stage by formula, fastest first, and the plans of the first of them, fastest first."""

    stage: str
    candidates: list[Candidate]
    plans: list[StagePlan]


def sweep(
    recipe: Recipe,
    name: str,
    *,
    mesh: tuple[int | None, int | None, int | None] = (None, None, None),
    accumulation: int | None = None,
    remat: Remat | None = None,
    cache: bool = True,
    say: Callable[[str], None] = print,
) -> Iterator[Sweep]:
    """Ranks meshes and remat policies for each stage by formula, and compiles the best COMPILED of them.

    Args: as of `plan`; a size of the mesh, a number of micro-batches or a policy that is given is not varied.

    Raises as `plan`, and PlanError when nothing fits by the formula.
    """
    devices, hbm = known_topology(name)
    for stage in recipe.stages:

        def choose(at: Mesh, policy: str, stage: Stage = stage) -> tuple[Stage, int, int]:
            found = fitted(recipe, stage, at, policy, hbm, accumulation)
            return found.stage, found.masters, found.need

        candidates = ranked(recipe, stage, name, devices, mesh, REMATS if remat is None else (remat,), choose)
        if not candidates:
            raise PlanError(f"stage {stage.name!r}: no mesh fits {name} by the formula; take a larger topology or a smaller batch_size")
        plans = []
        for best in candidates[:COMPILED]:
            say(f"compiling {stage.name} for {name}: mesh {best.sizes}, accumulation {best.stage.accumulation}, remat {best.remat}")
            plans.append(plan_stage(recipe, best.stage, best.mesh, best.remat, name, hbm, cache))
        plans.sort(key=lambda plan: plan.costs.step if plan.fits and plan.costs else math.inf)
        yield Sweep(stage.name, candidates, plans)


def plan_stage(recipe: Recipe, stage: Stage, mesh: Mesh, remat: str, name: str, hbm: int, cache: bool = True) -> StagePlan:
    """One stage compiled and read."""
    compiled, sizes = compile_stage(recipe, stage, mesh, remat, cache_folder() if cache else None), dict(mesh.shape)
    rows: list[Collective] = []
    costs = None
    if compiled.text:
        rows = collectives(compiled.text, sizes)
        costs = estimate(recipe, stage, rows, compiled.state["masters"], remat, sizes, name, mesh.devices.flat[0].device_kind)
    told = mend(compiled, recipe, mesh, remat, hbm)
    return StagePlan(compiled, sizes, remat, hbm, rows, kernels(compiled.text), costs, told, notes(compiled.text))


def check_outputs(outputs: Sequence[Path | None]) -> None:
    """Raises PlanError for a file that cannot be written."""
    for path in outputs:
        if path is not None and (path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK)):
            raise PlanError(f"{path} cannot be written; give a file in a folder that is there and yours")


def prepare(
    recipe: str,
    *,
    init: Path | None = None,
    stages: Sequence[str] = (),
    batch_size: int | None = None,
    sequence_length: int | None = None,
    outputs: Sequence[Path | None] = (),
) -> Recipe:
    """A recipe by name, with the changes of the command line.

    init: a run directory or model folder, for a recipe that works on a model one brings. outputs: files to be written, whose folders must
    be there. Raises one of EXPECTED_ERRORS.
    """
    check_outputs(outputs)
    config = None if init is None else launch.find_start(init).config
    return adapted(find_recipe(recipe, config), stages, batch_size=batch_size, sequence_length=sequence_length)


EXPECTED_ERRORS = (PlanError, *launch.EXPECTED_ERRORS)
"""What `prepare` and the plans it gives raise when the user is at fault."""
