"""Which token goes to which expert, and where it sits when tokens are sorted by expert.

Tokens in order (t text, v visual, . padding), blocks of 2 rows:

    token     0 1 2 3 4 5 6 7          slot      0 1 | 2 3 | 4 5 | 6 7 | ...
    expert    t t v v v . t .          source    0 1 | 6 - | 2 3 | 4 - | - - ...
    slot      0 1 4 5 6 - 2 -          owner     text  text  visual visual none

Every expert starts on a block boundary, so a block belongs to one expert, and each expert wastes less than one block.

A TPU kernel reads all weights of the owner for every tile, on some generations in the time of half a tile's products. So there no tile but
an expert's only one is less than half full: where the last would be, half a tile of slots before it stays empty.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import checkify

from pallas_kernels.device import hopper_cores, tpu_generation

BLOCKS = 16
"""A row count is rounded up to a sixteenth of the token count: two experts then waste less than an eighth of it."""

TPU_ROWS = {"v5e": 512, "v5p": 512, "v6e": 1024, "tpu7x": 512}
"""The most rows that a kernel's tile has on a TPU, by generation; 512 on others. A block is a multiple of the tile (docs/kernels.md)."""

TPU_HALF_FULL = ("v5e", "v6e", "tpu7x")
"""The generations whose tiles are at least half full. A tpu7x needs about as many operations a byte as a v5e. A v5p reads the weights in
a third of the time of a tile's products, and its two cores would share the tiles less evenly."""

TPU_LEAST_ROWS = 128
"""The rows of the smallest tile, and of the smallest part of a tile that is computed by itself."""

GPU_ROWS = 128
"""The rows of a kernel's tile on a Hopper GPU."""

LINE = 128
"""Tokens are counted by lines of so many, as they lie in a TPU's memory."""

SMALL = 64
"""Below this many tokens sorting costs more than computing every expert on all of them (decode steps)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """The sorted order of N tokens. Made by `make_routing`.

    expert: int32[N], the expert of each token, -1 for none (padding).
    source: int32[S], the token in each slot; N where the slot is empty. S = (max_blocks + num_experts - 1) * block_rows.
    slot:   int32[N], the slot of each token; S where it has none.
    counts: int32[num_experts], how many tokens each expert owns.
    first_slot: int32[num_experts], where the slots of each expert begin.
    tile_rows: the rows of a TPU kernel's largest tile, half of which an expert may leave empty (`gap`); 0 where slots follow one another.
    """

    expert: jax.Array | Any  # Any: JAX rebuilds pytrees with placeholders in place of arrays
    source: jax.Array | Any
    slot: jax.Array | Any
    counts: jax.Array | Any
    first_slot: jax.Array | Any
    num_experts: int = dataclasses.field(metadata={"static": True})
    block_rows: int = dataclasses.field(metadata={"static": True})
    tile_rows: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def max_blocks(self) -> int:
        """The most blocks that one expert can own; all experts together own at most num_experts - 1 more."""
        return -(-self.expert.shape[-1] // self.block_rows)

    @property
    def blocks(self) -> jax.Array:
        """int32[num_experts], how many blocks each expert owns."""
        return (self.counts + self.block_rows - 1) // self.block_rows


def gap(count: Any, tile_rows: int) -> tuple[Any, Any]:
    """Of the slots of an expert with so many tokens: where the empty ones begin that it leaves, counted from its first, and how many."""
    if not tile_rows:
        return count, count * 0
    last = (count - 1) // tile_rows * tile_rows
    rows = (tile_rows // 2) * ((last > 0) & (count - last <= tile_rows // 2))
    return last - rows, rows


def before(x: jax.Array) -> jax.Array:
    """The sum of what comes before each element, along the last axis. For few: one masked sum, where a running sum is many steps."""
    i = jnp.arange(x.shape[-1])
    return jnp.sum(jnp.where(i < i[:, None], x[..., None, :], 0), axis=-1)


def _running(mine: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The running sums of a mask [experts, tokens] along its tokens, and the sums. By lines: the product of each with a triangle of ones,
    and what the lines before it hold; a `cumsum` is many steps on a TPU."""
    experts, tokens = mine.shape
    lines = jnp.pad(mine, ((0, 0), (0, -tokens % LINE))).reshape(experts, -1, LINE)
    i = jnp.arange(LINE)
    within = jnp.dot(lines.astype(jnp.float32), (i[:, None] <= i).astype(jnp.float32)).astype(jnp.int32)
    sums = jnp.sum(lines, axis=2, dtype=jnp.int32)
    return (within + before(sums)[:, :, None]).reshape(experts, -1)[:, :tokens], jnp.sum(sums, axis=1)


def _row_multiple(tokens: int) -> int:
    """A quarter of the tokens as a power of two, within the tiles of the TPU; the tile of a Hopper GPU; 1 elsewhere."""
    generation = tpu_generation()
    if generation is None:
        return GPU_ROWS if hopper_cores() else 1
    return max(TPU_LEAST_ROWS, min(TPU_ROWS.get(generation, 512), 1 << (tokens // 4).bit_length()))


def make_routing(expert: jax.Array, num_experts: int = 2, row_multiple: int | None = None, tile_rows: int | None = None) -> Routing:
    """Sorts tokens by expert.

    Args:
      expert: integer array of any shape, the expert of each token in [0, num_experts), or -1 for none. It is flattened. Another number
        counts as none; under `jax.experimental.checkify.checkify` it is an error.
      num_experts: static.
      row_multiple: static; the rows of a block are a multiple of it. None takes the kernels' tile on a TPU or Hopper GPU, else 1.
      tile_rows: static; the rows of a TPU kernel's largest tile, a power of two that divides row_multiple, where tiles are to be half full
        at least; 0 where not, and where half of them are fewer than TPU_LEAST_ROWS. None takes what is best on this device.

    Raises ValueError for an empty or non-integer array, no experts, a row multiple below 1, and tile rows that do not halve down to one or
    do not fill a block.
    """
    if num_experts < 1:
        raise ValueError(f"make_routing: num_experts is {num_experts}; give at least 1")
    if row_multiple is not None and row_multiple < 1:
        raise ValueError(f"make_routing: row_multiple is {row_multiple}; give at least 1")
    if not jnp.issubdtype(expert.dtype, jnp.integer):
        raise ValueError(f"make_routing: expert ids have dtype {expert.dtype}; give integers")
    if expert.size == 0:
        raise ValueError(f"make_routing: no tokens (shape {expert.shape}); give at least one")
    expert = expert.reshape(-1).astype(jnp.int32)
    checkify.debug_check(
        jnp.all((expert >= -1) & (expert < num_experts)),
        f"make_routing: expert ids must lie in -1 to {num_experts - 1}; they are {{low}} to {{high}}",
        low=jnp.min(expert),
        high=jnp.max(expert),
    )
    tokens = expert.shape[0]
    multiple = row_multiple or _row_multiple(tokens)
    if tile_rows and (tile_rows < 2 or tile_rows & (tile_rows - 1) or multiple % tile_rows):
        raise ValueError(f"make_routing: tile_rows is {tile_rows}; give 0, or a power of two that divides the row multiple, {multiple}")
    rows = -(-tokens // (BLOCKS * multiple)) * multiple
    slots = (-(-tokens // rows) + num_experts - 1) * rows

    mine = expert == jnp.arange(num_experts)[:, None]  # [experts, tokens]
    running, counts = _running(mine)
    first_slot = before((counts + rows - 1) // rows) * rows
    generation = tpu_generation()
    if tile_rows is None:
        tile_rows = math.gcd(rows, TPU_ROWS[generation]) if generation in TPU_HALF_FULL else 0
    tile_rows = tile_rows if tile_rows >= 2 * TPU_LEAST_ROWS else 0
    empty, more = gap(counts, tile_rows)
    start = first_slot[:, None] + running - 1
    slot = jnp.min(jnp.where(mine, start + jnp.where(running > empty[:, None], more[:, None], 0), slots), axis=0)
    source = jnp.full((slots,), tokens, jnp.int32).at[slot].set(jnp.arange(tokens, dtype=jnp.int32), mode="drop")
    return Routing(expert, source, slot, counts, first_slot, num_experts, rows, tile_rows)


def to_slots(x: jax.Array, routing: Routing) -> jax.Array:
    """[N, D] tokens -> [S, D] slots; empty slots are zero, so that they add nothing to a weight gradient."""
    return x.at[routing.source].get(mode="fill", fill_value=0)


def to_tokens(x: jax.Array, routing: Routing) -> jax.Array:
    """[S, D] slots -> [N, D] tokens; padding tokens are zero."""
    return x.at[routing.slot].get(mode="fill", fill_value=0)
