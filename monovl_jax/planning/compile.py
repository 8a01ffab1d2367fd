"""The training step of a stage, compiled by the TPU compiler for a pod that is not there. Nothing is allocated and nothing runs."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from monovl_jax.config import ModelConfig
from monovl_jax.model import Ops
from monovl_jax.parallel.mesh import make_mesh
from monovl_jax.parallel.sharding import batch_sharding, check_rows, parameter_shardings
from monovl_jax.planning.collectives import argument_bytes
from monovl_jax.planning.program import Memory, Program, compile_program
from monovl_jax.training.devices import compiler_options
from monovl_jax.training.lora import adapter_shapes
from monovl_jax.training.optimizer import Optimizer, make_optimizer
from monovl_jax.training.stages import Recipe, Stage
from monovl_jax.training.step import make_train_step, optimizer_shardings
from monovl_jax.training.store import abstract
from monovl_jax.training.trainable import Tree, flatten, model_structure, split_tree


def plan_mesh(devices: Sequence[Any], data: int | None, fsdp: int | None, tensor: int | None) -> Mesh:
    """The mesh of `monovl train` with the same sizes; without any, parameters in up to 16 pieces. Raises MeshError."""
    if data is None and fsdp is None and tensor is None:
        fsdp = math.gcd(len(devices), 16)
    return make_mesh(data or -1, fsdp or 1, tensor or 1, devices=devices)


def abstract_state(recipe: Recipe, stage: Stage, optimizer: Optimizer, mesh: Mesh) -> tuple[Tree, Any, Tree]:
    """(trainable, opt_state, frozen) of a stage as ShapeDtypeStructs with their places: float32 masters, bfloat16 frozen leaves."""
    structure, chosen = model_structure(recipe.model), recipe.trainable_paths(stage)
    masters, frozen = split_tree(structure.shapes, chosen)
    masters = masters | (adapter_shapes(structure.shapes, stage.lora) if stage.lora else {})
    masters = abstract(masters, parameter_shardings(masters, mesh), jnp.float32)
    state = abstract(jax.eval_shape(optimizer.transform.init, masters), optimizer_shardings(optimizer, masters, mesh))
    return masters, state, abstract(frozen, parameter_shardings(frozen, mesh), jnp.bfloat16)


def abstract_batch(model: ModelConfig, stage: Stage, mesh: Mesh) -> tuple[dict[str, jax.ShapeDtypeStruct], ...]:
    """The batch of a step (docs/batch.md) as ShapeDtypeStructs with their places. Raises MeshError when the mesh cannot divide its rows."""
    accumulated, vision = stage.accumulation > 1, model.vision
    sharding = batch_sharding(mesh, accumulated)

    def part(rows: int, tokens: int, tiles: int, what: str) -> dict[str, jax.ShapeDtypeStruct]:
        rows //= stage.accumulation
        check_rows(rows, f"stage {stage.name!r}: {what}", mesh)
        fields: dict[str, tuple[Any, tuple[int, ...]]] = {
            "tokens": (jnp.int32, (tokens,)),
            "positions": (jnp.float32, (tokens,)),
            "segment_ids": (jnp.int32, (tokens,)),
            "targets": (jnp.int32, (tokens,)),
            "loss_weights": (jnp.float32, (tokens,)),
        }
        if tiles:
            fields |= {
                "token_types": (jnp.int8, (tokens,)),
                "visual_index": (jnp.int32, (tokens,)),
                "visual_slot": (jnp.int32, (tiles * vision.tokens_per_tile,)),
                "tiles": (jnp.uint8, (tiles, vision.tile_size, vision.tile_size, 3)),
            }
        lead = (stage.accumulation, rows) if accumulated else (rows,)
        return {name: jax.ShapeDtypeStruct((*lead, *shape), dtype, sharding=sharding) for name, (dtype, shape) in fields.items()}

    main = part(stage.batch_size, stage.sequence_length, stage.tiles_per_row, "batch_size")
    return (main, part(stage.text_rows, stage.text_length, 0, "text_rows")) if stage.text_rows else (main,)


def shard_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of ShapeDtypeStructs with shardings: the sum over leaves of a shard's."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class CompiledStage:
    """A stage's program. state: bytes per chip that the shardings give for `masters`, `optimizer`, `frozen`, `batch`; leaves that are kept
    for export alone (`Structure.stored`, some KB) are left out. lowering: seconds."""

    stage: Stage
    state: dict[str, int]
    program: Program
    lowering: float

    @property
    def memory(self) -> Memory:
        return self.program.memory

    @property
    def text(self) -> str:
        return self.program.text

    @property
    def arguments(self) -> int:
        """Bytes of the compiled program's arguments by their shapes; what the shardings give for one that was not compiled."""
        return argument_bytes(self.text) if self.text else sum(self.state.values())

    @property
    def padding(self) -> int:
        """What the tiles of the TPU's layouts add to arguments."""
        return self.memory.arguments - self.arguments if self.text else 0


def compile_stage(recipe: Recipe, stage: Stage, mesh: Mesh, remat: str = "save_projections", cache: Path | None = None) -> CompiledStage:
    """The real step of a stage, compiled for the mesh's devices, or taken from the folder `cache`.

    Raises MeshError for a mesh that does not divide, before compiling, and PlanError.
    """
    optimizer = make_optimizer(stage)
    trainable, state, frozen = abstract_state(recipe, stage, optimizer, mesh)
    batch = abstract_batch(recipe.model, stage, mesh)
    structure = model_structure(recipe.model)
    read = {path: leaf for path, leaf in flatten(frozen).items() if path not in structure.stored}
    held = {"masters": trainable, "optimizer": state, "frozen": read, "batch": batch}
    options = compiler_options(mesh.devices.flat[0].device_kind)
    ops = Ops(dtype=jnp.bfloat16, remat=remat)  # pyright: ignore[reportArgumentType]
    graphdef, lora = structure.graphdef, stage.lora
    began = time.monotonic()
    step: Any = make_train_step(graphdef, optimizer, ops, trainable, frozen, mesh, stage.accumulation, lora=lora, compiler_options=options)
    lowered = step.lower(trainable, state, frozen, batch)
    lowering = time.monotonic() - began
    sizes = {name: shard_bytes(tree) for name, tree in held.items()}
    program = compile_program(lowered, f"stage {stage.name!r}", sum(sizes.values()), list(mesh.devices.flat), options, cache)
    return CompiledStage(stage, sizes, program, lowering)
