"""The training step of a stage, compiled by the TPU compiler for a pod that is not there. Nothing is allocated and nothing runs."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from monovl_jax.config import ModelConfig
from monovl_jax.model import Ops
from monovl_jax.parallel.mesh import make_mesh
from monovl_jax.parallel.sharding import batch_sharding, check_rows, parameter_shardings
from monovl_jax.training.devices import compiler_options
from monovl_jax.training.lora import adapter_shapes
from monovl_jax.training.optimizer import Optimizer, make_optimizer
from monovl_jax.training.stages import Recipe, Stage
from monovl_jax.training.step import make_train_step, optimizer_shardings
from monovl_jax.training.store import abstract
from monovl_jax.training.trainable import Tree, model_structure, split_tree

LIBTPU = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
"""Environment under which libtpu compiles on a machine without a TPU, also in two processes at once."""

_NAME = re.compile(r"[a-z0-9]+:\d+x\d+(x\d+)?")
_USED = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm")


class PlanError(ValueError):
    """A plan that cannot be made; the message says in one sentence what is wrong and the mend."""


def topology(name: str) -> list[Any]:
    """The devices of a TPU topology such as `v5e:4x4`, as libtpu describes them.

    Raises PlanError when the name is malformed or unknown to libtpu, or libtpu is not installed.
    """
    if not _NAME.fullmatch(name):
        raise PlanError(f"the topology {name!r} is not of the form GENERATION:SIZES; write v5e:4x4, v5p:8x8x8 or v6e:16x16, for example")
    if importlib.util.find_spec("libtpu") is None:
        raise PlanError("libtpu, the TPU compiler, is not installed; pip install 'monovl_jax[aot]'")
    os.environ.update(LIBTPU)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:  # jax wraps what libtpu says in several types
        words = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise PlanError(
            f"libtpu does not know the topology {name!r} ({words}); write v5e:4x4, v5p:8x8x8 or v6e:16x16, for example"
        ) from None


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
class Memory:
    """HBM of one chip in bytes, as the compiler gives them. aliased: outputs that lie in donated arguments. over: None where the program
    compiled; else what it would need in all, found too much by the compiler, which then tells nothing else."""

    arguments: int = 0
    outputs: int = 0
    aliased: int = 0
    temporaries: int = 0
    code: int = 0
    over: int | None = None

    @property
    def peak(self) -> int:
        return self.over if self.over is not None else self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class CompiledStage:
    """state: bytes per chip that the shardings give for `masters`, `optimizer`, `frozen`, `batch`. text: the optimized HLO, empty when the
    program does not fit. seconds: lowering and compiling."""

    stage: Stage
    state: dict[str, int]
    memory: Memory
    text: str
    seconds: float


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * 1024 ** " KMGT".index(unit or " "))


def compile_stage(recipe: Recipe, stage: Stage, mesh: Mesh, remat: str = "save_projections") -> CompiledStage:
    """The real step of a stage, compiled for the mesh's devices. Raises MeshError for a mesh that does not divide, before compiling."""
    optimizer = make_optimizer(stage)
    trainable, state, frozen = abstract_state(recipe, stage, optimizer, mesh)
    batch = abstract_batch(recipe.model, stage, mesh)
    held = {"masters": trainable, "optimizer": state, "frozen": frozen, "batch": batch}
    options = compiler_options(mesh.devices.flat[0].device_kind)
    ops = Ops(dtype=jnp.bfloat16, remat=remat)  # pyright: ignore[reportArgumentType]
    graphdef, lora = model_structure(recipe.model).graphdef, stage.lora
    began = time.monotonic()
    step: Any = make_train_step(graphdef, optimizer, ops, trainable, frozen, mesh, stage.accumulation, lora=lora, compiler_options=options)
    memory, text = Memory(), ""
    try:
        compiled = step.lower(trainable, state, frozen, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        found = _USED.search(str(error))
        if found is None:
            raise PlanError(f"stage {stage.name!r}: the TPU compiler refuses the step: {str(error).splitlines()[0][:300]}") from error
        memory = Memory(over=_bytes(found[1], found[2]))
    else:
        m = compiled.memory_analysis()
        memory = Memory(
            m.argument_size_in_bytes,
            m.output_size_in_bytes,
            m.alias_size_in_bytes,
            m.temp_size_in_bytes,
            m.generated_code_size_in_bytes,
        )
        text = compiled.as_text()
    return CompiledStage(stage, {name: shard_bytes(tree) for name, tree in held.items()}, memory, text, time.monotonic() - began)
