"""Prefill and decode compiled for one chip of a TPU topology: does a batch of conversations fit, and how fast can it be at best.

Every chip holds the whole model and answers for itself, as `monovl generate` does; a pod of n chips answers n times as much.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from monovl_jax.config import RELEASED, ModelConfig, named_config
from monovl_jax.inference.generate import Rules, abstract_model, begin, decode, extend, prefill
from monovl_jax.inference.prompts import bucket, slots_for
from monovl_jax.inference.sampling import GREEDY, row_keys
from monovl_jax.model import Ops
from monovl_jax.parallel.mesh import make_mesh
from monovl_jax.planning.compile import shard_bytes
from monovl_jax.planning.estimate import CHIPS, EFFICIENCY
from monovl_jax.planning.plan import known_topology
from monovl_jax.planning.program import PlanError, Program, cache_folder, compile_program
from monovl_jax.recipes import launch
from monovl_jax.training.devices import peak_flops
from monovl_jax.training.flops import step_flops

PIECE = 1024
"""Slots of a prompt that are read at a time, as `Generator` does."""


@dataclasses.dataclass(frozen=True)
class Served:
    """`prefill` or `decode` of a batch on one chip. state: bytes of `weights`, `cache` and the rest. seconds: of reading one piece of every
    prompt, or of one token of every row, estimated; None where it does not fit."""

    name: str
    program: Program
    state: dict[str, int]
    hbm: int
    seconds: float | None

    @property
    def fits(self) -> bool:
        return self.program.memory.over is None and self.program.memory.peak <= self.hbm


@dataclasses.dataclass(frozen=True)
class ServePlan:
    """rows: conversations at a time. prompt, new: tokens of each. pieces: in which a prompt is read. chips: of the topology."""

    rows: int
    prompt: int
    new: int
    pieces: int
    chips: int
    prefill: Served
    decode: Served

    @property
    def fits(self) -> bool:
        return self.prefill.fits and self.decode.fits

    @property
    def first_token(self) -> float | None:
        """Seconds until the first token of every row."""
        return None if self.prefill.seconds is None else self.pieces * self.prefill.seconds

    @property
    def tokens_per_second(self) -> float | None:
        """New tokens of one chip, the reading of the prompts included."""
        if self.first_token is None or self.decode.seconds is None:
            return None
        return self.rows * self.new / (self.first_token + (self.new - 1) * self.decode.seconds)

    def as_json(self) -> dict[str, Any]:
        parts = {
            part.name: {
                "fits": part.fits,
                "state_bytes": part.state,
                "memory_bytes": dataclasses.asdict(part.program.memory) | {"peak": part.program.memory.peak, "hbm": part.hbm},
                "compile_seconds": round(part.program.seconds, 1),
                "seconds": part.seconds,
            }
            for part in (self.prefill, self.decode)
        }
        sizes = {"rows": self.rows, "prompt": self.prompt, "new": self.new, "pieces": self.pieces, "chips": self.chips}
        return sizes | {"first_token_seconds": self.first_token, "tokens_per_second_per_chip": self.tokens_per_second} | parts


def find_model(name: str) -> ModelConfig:
    """A released size by name, or the config of a run directory or model folder. Raises one of `launch.EXPECTED_ERRORS`."""
    if name in RELEASED or not Path(name).is_dir():
        return named_config(name)
    return launch.find_start(Path(name)).config


def serve(
    config: ModelConfig,
    name: str,
    *,
    rows: int = 8,
    prompt: int = 2048,
    new: int = 256,
    cache: bool = True,
    say: Callable[[str], None] = print,
) -> ServePlan:
    """Compiles reading and answering for one chip of a topology.

    Args:
      rows: conversations at a time. prompt: tokens of each, as many of them visual as tiles fit. new: tokens of each answer.

    Raises PlanError.
    """
    for what, value in (("batch_size", rows), ("sequence_length", prompt), ("new_tokens", new)):
        if value < 1:
            raise PlanError(f"{what} is {value}; give at least 1")
    devices, hbm = known_topology(name)
    mesh = make_mesh(1, 1, 1, devices=devices[:1])
    graphdef, shapes = abstract_model(config)
    ops, vision, folder = Ops(dtype=jnp.bfloat16), config.vision, cache_folder() if cache else None
    chip, peak = CHIPS[name.split(":")[0]], peak_flops(devices[0].device_kind)
    assert peak is not None

    def placed(tree: Any, dtype: Any = None) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=NamedSharding(mesh, P())), tree)

    def compiled(what: str, lower: Callable[[], Any], state: dict[str, Any]) -> tuple[Program, dict[str, int]]:
        sizes = {part: shard_bytes(tree) for part, tree in state.items()}
        say(f"compiling {what} of {rows} rows for one chip of {name}")
        return compile_program(lower(), what, sum(sizes.values()), devices[:1], {}, folder), sizes

    slots = slots_for(prompt, PIECE)
    room, width = slots + bucket(new, 8), min(slots, PIECE)
    tiles = min(width // vision.tokens_per_tile, config.max_tiles + config.use_thumbnail)
    weights = placed(shapes, jnp.bfloat16)
    fields: dict[str, tuple[tuple[int, ...], Any]] = {
        "tokens": ((rows, width), jnp.int32),
        "token_types": ((rows, width), jnp.int8),
        "positions": ((rows, width), jnp.float32),
        "segment_ids": ((rows, width), jnp.int32),
        "last": ((), jnp.int32),
        "key_length": ((), jnp.int32),
    }
    if tiles:
        fields |= {
            "visual_index": ((rows, width), jnp.int32),
            "visual_slot": ((rows, tiles * vision.tokens_per_tile), jnp.int32),
            "tiles": ((rows, tiles, vision.tile_size, vision.tile_size, 3), jnp.uint8),
        }
    batch = placed({field: jax.ShapeDtypeStruct(shape, dtype) for field, (shape, dtype) in fields.items()})
    lengths = placed(jax.ShapeDtypeStruct((rows,), jnp.int32))
    rules = placed(jax.eval_shape(lambda: Rules(GREEDY.numbers(), row_keys(0, np.zeros(rows)), jnp.zeros(2, jnp.int32), jnp.int32(0))))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        read = functools.partial(prefill, graphdef, ops=ops, room=room)
        logits, kept = placed(jax.eval_shape(read, weights, batch))
        if slots > PIECE:
            reading = compiled(
                "prefill",
                lambda: extend.lower(graphdef, weights, batch, kept, ops=ops),
                {"weights": weights, "cache": kept, "batch": batch},
            )
        else:
            reading = compiled(
                "prefill", lambda: prefill.lower(graphdef, weights, batch, ops=ops, room=room), {"weights": weights, "batch": batch}
            )
        first = functools.partial(begin, columns=bucket(new, 8), split=False)
        state = placed(jax.eval_shape(first, logits, kept, lengths, rules))
        until = placed(jax.ShapeDtypeStruct((), jnp.int32))
        answering = compiled(
            "decode",
            lambda: decode.lower(graphdef, weights, None, state, rules, until, ops=ops),
            {
                "weights": weights,
                "cache": state.cache,
                "rest": [state.token, state.lengths, state.longest, state.done, state.seen, state.ids, state.step, rules],
            },
        )
    flops, visual = step_flops(config, frozenset()), tiles * vision.tokens_per_tile
    pairs = rows * width * (width + 1) / 2 + rows * width * (slots - width) / 2  # a later piece sees half of the others, on average
    read_flops = rows * ((width - visual) * flops.text + visual * flops.visual + tiles * flops.tile + flops.supervised) + flops.pair * pairs
    one_flops = rows * (flops.text + flops.supervised + flops.pair * (prompt + new / 2))
    held = shard_bytes(weights)
    text = held - sum(
        math.prod(leaf.shape) * 2 for path, leaf in jax.tree_util.tree_leaves_with_path(shapes) if "visual" in jax.tree_util.keystr(path)
    )

    def served(what: str, program: Program, sizes: dict[str, int], work: float, moved: float) -> Served:
        told = Served(what, program, sizes, hbm, max(work / (peak * EFFICIENCY), moved / chip.bandwidth))
        return told if told.fits else dataclasses.replace(told, seconds=None)

    return ServePlan(
        rows,
        prompt,
        new,
        -(-slots // PIECE),
        len(devices),
        served("prefill", *reading, read_flops, held + shard_bytes(kept)),
        served("decode", *answering, one_flops, text + shard_bytes(kept)),
    )
